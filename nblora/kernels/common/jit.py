"""`kernel`: Numba's `njit` with a cache that no source change leaves stale and that no read-only folder breaks.

Numba names a cached function by its own file's time stamp, so a helper edited in another file leaves a stale kernel.
Here one digest over every source file of `nblora.kernels` names the cache folder: any change starts an empty one.
The folder is the first writable of

1. `$NUMBA_CACHE_DIR/nblora-<digest>`, where the user has set that variable,
2. `__pycache__/nblora-<digest>` beside this file,
3. the user's cache folder (`$XDG_CACHE_HOME/nblora`, `~/Library/Caches/nblora`, `%LOCALAPPDATA%\\nblora`).

With none of them kernels compile in every process, after one warning.
Nothing is looked up before the first kernel is called.
"""

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numba
import numba.extending
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, _CacheLocator

from . import loading, notice
from .linking import PartCompiler

KERNELS = Path(__file__).parents[1]
JIT_DISABLED = bool(config.DISABLE_JIT)


@functools.cache
def source_digest() -> str:
    """Digest of every kernel source file and of what else shapes the machine code."""
    digest = hashlib.sha256()
    settings = (numba.__version__, config.BOUNDSCHECK, config.OPT, os.environ.get("NBLORA_VECTOR_BITS"))
    digest.update(repr(settings).encode())
    for path in sorted(KERNELS.rglob("*.py")):
        if "cuda" in path.relative_to(KERNELS).with_suffix("").parts:
            continue  # a change of a GPU's kernels leaves the CPU's as they are
        digest.update(str(path.relative_to(KERNELS)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _user_cache() -> Path:
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nblora"


def _candidates() -> list[Path]:
    folder = f"nblora-{source_digest()}"
    roots = [Path(config.CACHE_DIR)] if config.CACHE_DIR else []
    roots.append(KERNELS / "__pycache__")
    with contextlib.suppress(RuntimeError):  # a user without a home directory
        roots.append(_user_cache())
    return [root / folder for root in roots]


@functools.cache
def cache_folder() -> Path | None:
    """The folder that holds the compiled kernels, made if need be; None where nothing is writable."""
    for folder in _candidates():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    warnings.warn(
        "nblora found no writable folder for its compiled kernels and will compile them in every process; "
        "set NUMBA_CACHE_DIR to a writable folder to keep them",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


class _Locator(_CacheLocator):
    """Tells Numba where: in the digest's folder, under a name made of module and function."""

    def __init__(self, function):
        self._function = function

    @classmethod
    def from_function(cls, function, path):
        return cls(function)

    def get_cache_path(self):
        return str(cache_folder())

    def get_source_stamp(self):
        return source_digest()

    def get_disambiguator(self):
        return self._function.__module__.replace(".", "_")


class _Implementation(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012 - Numba's own attribute

    def reduce(self, compiled):
        return loading.pack(compiled)

    def rebuild(self, target_context, packed):
        return loading.load(target_context, packed)


class _Cache(FunctionCache):
    _impl_class = _Implementation

    def load_overload(self, sig, target_context):
        """Load without preparing the target for compiling, as Numba would."""
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


class _LazyCache(NullCache):
    """Opens the function's cache at its first compilation, so that importing nblora touches no disk."""

    def __init__(self, function):
        self._function = function

    @functools.cached_property
    def _cache(self):
        return NullCache() if cache_folder() is None else _Cache(self._function)

    @property
    def cache_path(self):
        return self._cache.cache_path

    def load_overload(self, sig, target_context):
        try:
            found = self._cache.load_overload(sig, target_context)
        except Exception:  # a damaged file may raise anything; an empty index makes room for a good one
            found = None
            with contextlib.suppress(OSError):
                self._cache.flush()
        if found is None and cache_folder() is not None:  # without a folder a warning has said more
            notice.say_once()
        return found

    def save_overload(self, sig, data):
        # A full disk costs the next process its compile time, not this one its result.
        with contextlib.suppress(OSError), _one_writer():
            self._cache.save_overload(sig, data)


@contextlib.contextmanager
def _one_writer():
    """Let one process at a time save, where the system has file locks (not on Windows).

    Numba reads a function's index, takes the next free number and writes the index back. Two processes that compile
    the same function for different types would take the same number, and one would later load the other's code.
    """
    folder = cache_folder()
    try:
        import fcntl
    except ImportError:
        folder = None
    if folder is None:
        yield
        return
    with open(folder / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kernel(function=None, **options):
    """Decorate a kernel: `njit`, without the interpreter lock, cached by the digest of all kernel sources.

    `options` go to `numba.njit` (`parallel`, `fastmath`, `inline`, ...). With `NUMBA_DISABLE_JIT=1` the plain
    function comes back.
    """
    if function is None:
        return functools.partial(kernel, **options)
    dispatcher = numba.njit(nogil=True, **options)(function)
    if not JIT_DISABLED:
        dispatcher._cache = _LazyCache(function)
    return dispatcher


def part(function=None, **options):
    """Decorate a function that only kernels call: without entry points, a cache and reference counts of its own.

    Compiling a step took three times as long when its inner functions were kernels themselves, and counting references
    to array slices took a tenth of a step at 64 x 768 x 768. Being uncounted, arrays may be handed to a part but not be
    returned by it to a kernel. Division by zero gives infinity: the check for it would keep loops from being
    vectorised. Called from Python it is the plain function.
    """
    options = {"_nrt": False, "error_model": "numpy", "pipeline_class": PartCompiler, **options}
    if function is None:
        return numba.extending.register_jitable(**options)
    return numba.extending.register_jitable(**options)(function)
