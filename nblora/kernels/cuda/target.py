"""What a kernel is compiled by: Numba's CUDA compiler, or its simulator."""

import warnings

from numba.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)

with warnings.catch_warnings():
    # The simulator inside Numba, which needs no extra, announces that NVIDIA's package replaces the compiler beside it.
    warnings.simplefilter("ignore")
    from numba import cuda


def kernel(threads):
    """Decorate a kernel that is launched with at most `threads` threads a block."""
    if SIMULATED:
        return cuda.jit
    return cuda.jit(launch_bounds=threads)


def device_function(function):
    """Decorate a function that kernels call: always inlined, so that its tuples stay in registers."""
    if SIMULATED:
        return cuda.jit(device=True)(function)
    return cuda.jit(device=True, forceinline=True)(function)
