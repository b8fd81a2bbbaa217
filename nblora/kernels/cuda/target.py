"""What a kernel is compiled by: NVIDIA's numba-cuda, Numba's simulator, or nothing where there is neither."""

import importlib.util
import warnings
from types import SimpleNamespace

from numba.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)
COMPILED = not SIMULATED and importlib.util.find_spec("numba_cuda") is not None

BLOCKS_AT_ONCE = 2
"""Blocks an SM that the compiler must leave registers for: one computes while the other waits for memory."""

if SIMULATED or COMPILED:
    with warnings.catch_warnings():
        # The simulator inside Numba needs no extra, and announces that the compiler beside it has moved.
        warnings.simplefilter("ignore")
        from numba import cuda
else:
    cuda = SimpleNamespace()


def kernel(threads):
    """Decorate a kernel that is launched with at most `threads` threads a block."""
    if COMPILED:
        return cuda.jit(launch_bounds=(threads, BLOCKS_AT_ONCE))
    return _plain


def device_function(function):
    """Decorate a function that kernels call: always inlined, so that its tuples stay in registers."""
    if COMPILED:
        return cuda.jit(device=True, forceinline=True)(function)
    return _plain(function, device=True)


def _plain(function, device=False):
    """For the simulator; without CUDA only a holder of the Python function, which the tests' emulator runs."""
    if SIMULATED:
        return cuda.jit(device=device)(function)
    return SimpleNamespace(py_func=function)
