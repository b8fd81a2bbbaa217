"""Rotary positions: pairs of features turned by angles, in place."""

import functools

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import add_scaled, load, multiply, scale, store
from nblora.kernels.common.cuda.target import cuda, int32, int64, kernel


@functools.cache
def rotate(dtype: str, threads: int):
    """Kernel: features i and i + half of each head of row n turn by the angle positions[n], i.

    x (N, heads·size), changed; positions (N,) int64; cosines, sines (positions, half). `direction` is 1, or -1 to turn
    back. A thread turns vectors of a row. Grid (any,).
    """
    TYPE, LANES = getattr(types, dtype), 16 // np.dtype(dtype).itemsize
    ONE = TYPE(1)

    @kernel(threads)
    def rotate(x, positions, cosines, sines, heads, size, direction, aligned):
        half = int32(cosines.shape[1])
        across = (half + LANES - 1) // LANES
        n = int64(cuda.blockIdx.x)
        while n < positions.shape[0]:
            angles = int64(positions[n]) * half
            i = int32(cuda.threadIdx.x)
            while i < heads * across:
                head = i // across
                feature = (i - head * across) * LANES
                place, valid = n * x.shape[1] + head * size + feature, half - feature
                c = load(cosines, angles + feature, valid, aligned, LANES)
                s = scale(load(sines, angles + feature, valid, aligned, LANES), direction)
                one, other = load(x, place, valid, aligned, LANES), load(x, place + half, valid, aligned, LANES)
                store(x, place, valid, aligned, add_scaled(multiply(one, c), multiply(other, s), -ONE))
                store(x, place + half, valid, aligned, add_scaled(multiply(other, c), multiply(one, s), ONE))
                i = int32(i + cuda.blockDim.x)
            n += cuda.gridDim.x

    return rotate
