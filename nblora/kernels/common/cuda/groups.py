"""Threads that share a row: groups of 2^bits neighbours of a block, and what they add up.

A row is a run of 128-bit vectors, of which the members of its group take every 2^bits-th.
"""

import functools
from types import SimpleNamespace

import numpy as np
from numba.core import types

from .intrinsics import add_scaled, zeros
from .target import cuda, device_function


@device_function
def group_sum(shared, t, member, size, value):
    """The sum of one value a thread over a group of `size` threads, in a tree, the same for each of them.

    Every thread of the block comes by; `shared`, of one element a thread, is free again afterwards.
    """
    shared[t] = value
    cuda.syncthreads()  # every value is there
    width = size >> 1
    while width > 0:
        if member < width:
            shared[t] += shared[t + width]
        cuda.syncthreads()  # this level of the tree is there
        width >>= 1
    total = shared[t - member]
    cuda.syncthreads()  # every thread has the sum
    return total


@device_function
def group_sums(shared, t, threads, member, size, first, second):
    """Two sums at once; `shared` has two elements a thread."""
    shared[t] = first
    shared[threads + t] = second
    cuda.syncthreads()  # all values are there
    width = size >> 1
    while width > 0:
        if member < width:
            shared[t] += shared[t + width]
            shared[threads + t] += shared[threads + t + width]
        cuda.syncthreads()  # this level of both trees is there
        width >>= 1
    first, second = shared[t - member], shared[threads + t - member]
    cuda.syncthreads()  # every thread has both sums
    return first, second


@functools.cache
def lanes(dtype: str):
    """Device functions on the tuples of a vector: its sum, that of the squares before `valid`, and what a mean leaves
    of it."""
    LANES, TYPE = 16 // np.dtype(dtype).itemsize, getattr(types, dtype)
    ZERO, ONE = TYPE(0), TYPE(1)

    @device_function
    def sum_2(v):
        return v[0] + v[1]

    @device_function
    def sum_4(v):
        return (v[0] + v[1]) + (v[2] + v[3])

    @device_function
    def squares_2(v, valid):
        return v[0] * v[0] + (v[1] * v[1] if valid > 1 else ZERO)

    @device_function
    def squares_4(v, valid):
        low = v[0] * v[0] + (v[1] * v[1] if valid > 1 else ZERO)
        return low + ((v[2] * v[2] if valid > 2 else ZERO) + (v[3] * v[3] if valid > 3 else ZERO))

    @device_function
    def less(v, number):
        return add_scaled(v, zeros(LANES, ONE), -number)

    return SimpleNamespace(total={2: sum_2, 4: sum_4}[LANES], squares={2: squares_2, 4: squares_4}[LANES], less=less)
