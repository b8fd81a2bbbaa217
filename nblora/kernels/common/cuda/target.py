"""What a kernel is compiled by: NVIDIA's numba-cuda, Numba's simulator, or nothing where there is neither."""

import importlib.util
import warnings
from types import SimpleNamespace

import numpy as np
from numba.core import config, types

SIMULATED = bool(config.ENABLE_CUDASIM)
COMPILED = not SIMULATED and importlib.util.find_spec("numba_cuda") is not None

if SIMULATED or COMPILED:
    with warnings.catch_warnings():
        # The simulator inside Numba needs no extra, and announces that the compiler beside it has moved.
        warnings.simplefilter("ignore")
        from numba import cuda as module
else:
    module = SimpleNamespace()


class SimulatedModule:
    """The module `cuda` as kernels see it on Numba's simulator: what the launch at hand offers.

    The simulator itself changes the global `cuda` of a device function's module at every call and back at its end,
    for all threads of a block at once: one that was still inside then lost its `cuda`. It leaves this object alone.
    """

    def __getattr__(self, name):
        from numba.cuda.simulator.kernel import _get_kernel_context

        return getattr(_get_kernel_context(), name)


cuda = SimulatedModule() if SIMULATED else module

# Casts inside kernels. Without a compiler Python's own numbers: Numba's cost the simulator as much as all arithmetic.
if COMPILED:
    int32, int64, float64 = types.int32, types.int64, types.float64
else:
    int32, int64, float64 = int, int, np.float64


def kernel(threads, blocks=2):
    """Decorate a kernel of at most `threads` threads a block; the compiler leaves registers for `blocks` on one SM.

    Of two blocks one computes while the other waits for memory.
    """
    if COMPILED:
        return cuda.jit(launch_bounds=(threads, blocks))
    return module.jit if SIMULATED else _plain


def device_function(function):
    """Decorate a function that kernels call: always inlined, so that its tuples stay in registers."""
    if COMPILED:
        return cuda.jit(device=True, forceinline=True)(function)
    if SIMULATED:
        function.py_func = function  # called as it is, and found by the tests' emulator
        return function
    return _plain(function)


def _plain(function):
    """Without CUDA only a holder of the Python function, which the tests' emulator runs."""
    return SimpleNamespace(py_func=function)
