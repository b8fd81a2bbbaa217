"""Norms of a weight's outputs, and what DoRA makes of them."""

import functools
import math
from types import SimpleNamespace

from numba.core import types

from nblora.kernels.common.cuda.intrinsics import load, store
from nblora.kernels.common.cuda.target import cuda, int32, int64, kernel

GROUP = 32
"""Threads that read neighbours."""


@functools.cache
def norms(dtype: str, threads: int, transposed: bool):
    """Kernels on the outputs of a weight (in, out), or (out, in) where `transposed`."""
    TYPE, GROUPS = getattr(types, dtype), threads // GROUP
    ZERO, ONE = TYPE(0), TYPE(1)

    @kernel(threads)
    def output_norms(weight, norms):
        """norms[o] = √Σ_i W[i, o]², added up in a tree, always in the same order.

        A block has one group of threads an output where outputs are rows, grid (⌈out / groups⌉,), and else one column
        of threads for each of 32 outputs, grid (⌈out / 32⌉,).
        """
        shared = cuda.shared.array(threads, TYPE)
        t = int32(cuda.threadIdx.x)
        across, along = t % GROUP, t // GROUP
        outputs = int64(norms.size)
        inputs = int64(weight.size) // outputs
        if transposed:
            output, i, step = int64(cuda.blockIdx.x) * GROUPS + along, int64(across), int64(GROUP)
        else:
            output, i, step = int64(cuda.blockIdx.x) * GROUP + across, int64(along), int64(GROUPS)
        total = ZERO
        if output < outputs:
            while i < inputs:
                place = output * inputs + i if transposed else i * outputs + output
                value = load(weight, place, 1, 0, 1)[0]
                total += value * value
                i += step
        shared[t] = total
        cuda.syncthreads()  # every share is there
        width = int32(GROUP // 2 if transposed else GROUPS // 2)
        while width > 0:
            if (across if transposed else along) < width:
                shared[t] += shared[t + (width if transposed else width * GROUP)]
            cuda.syncthreads()  # this level of the tree is there
            width //= 2
        if (across if transposed else along) == 0 and output < outputs:
            store(norms, output, 1, 0, (math.sqrt(shared[t]),))

    @kernel(threads)
    def per_norms(magnitude, norms, factor, inverse):
        """Factor = m / norm, inverse = 1 / norm; 0 where the norm is 0. All (out,); grid (any,)."""
        i = int64(cuda.grid(1))
        while i < norms.size:
            norm = load(norms, i, 1, 0, 1)[0]
            per = ONE / norm if norm != ZERO else ZERO
            m = load(magnitude, i, 1, 0, 1)[0]
            store(inverse, i, 1, 0, (per,))
            store(factor, i, 1, 0, (m / norm if norm != ZERO else ZERO,))
            i += cuda.gridsize(1)

    return SimpleNamespace(output_norms=output_norms, per_norms=per_norms)
