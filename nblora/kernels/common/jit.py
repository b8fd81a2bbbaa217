"""`kernel`: Numba's `njit` with a cache of its own; `part`: what only kernels call."""

import functools

import numba
import numba.extending
from numba.core import config
from numba.core.caching import NullCache

from . import loading, notice
from .cache import KernelFiles, cache_folder
from .linking import PartCompiler

JIT_DISABLED = bool(config.DISABLE_JIT)


class _Cache(NullCache):
    """Numba's door to the files of a function, opened at its first compilation: importing nblora touches no disk."""

    def __init__(self, function):
        self._function = function

    @functools.cached_property
    def _files(self):
        return KernelFiles(self._function)

    @property
    def cache_path(self):
        return None if cache_folder() is None else str(cache_folder())

    def load_overload(self, sig, target_context):
        """Load without preparing the target for compiling, as Numba would."""
        try:
            packed = self._files.load(sig, target_context.codegen())
            found = None if packed is None else loading.load(target_context, packed)
        except Exception:  # whole, but of a library that has changed since: compiled again, and replaced
            found = None
        if found is None and cache_folder() is not None:  # without a folder a warning has said more
            notice.say_once()
        return found

    def save_overload(self, sig, data):
        if not data.library.has_dynamic_globals and all(lifted.can_cache for lifted in data.lifted):
            self._files.save(sig, data.codegen, loading.pack(data))


def kernel(function=None, **options):
    """Decorate a kernel: `njit`, without the interpreter lock, cached by the digest of all kernel sources.

    `options` go to `numba.njit` (`parallel`, `fastmath`, `inline`, ...). With `NUMBA_DISABLE_JIT=1` the plain
    function comes back.
    """
    if function is None:
        return functools.partial(kernel, **options)
    dispatcher = numba.njit(nogil=True, **options)(function)
    if not JIT_DISABLED:
        dispatcher._cache = _Cache(function)
    return dispatcher


PART_OPTIONS = {"_nrt": False, "error_model": "numpy", "pipeline_class": PartCompiler}


def part(function=None, **options):
    """Decorate a function that only kernels call: without entry points, a cache and reference counts of its own.

    Compiling a step took three times as long when its inner functions were kernels themselves, and counting references
    to array slices took a tenth of a step at 64 x 768 x 768. Being uncounted, arrays may be handed to a part but not be
    returned by it to a kernel. Division by zero gives infinity: the check for it would keep loops from being
    vectorised. Called from Python it is the plain function.
    """
    options = {**PART_OPTIONS, **options}
    if function is None:
        return numba.extending.register_jitable(**options)
    return numba.extending.register_jitable(**options)(function)
