"""Sums and maxima over the threads of a block."""

import functools

from .target import cuda, device_function


@functools.cache
def block_sum(threads: int):
    """A device function: the sum of one float64 a thread, in a tree, the same for every thread of the block.

    Once a kernel: nothing holds back a thread that would write to the same shared memory again.
    """
    HALF = threads // 2

    @device_function
    def block_sum(shared, t, value):
        shared[t] = value
        cuda.syncthreads()  # every value is there
        width = HALF
        while width > 0:
            if t < width:
                shared[t] += shared[t + width]
            cuda.syncthreads()  # this level of the tree is there
            width //= 2
        return shared[0]

    return block_sum


@functools.cache
def block_max(threads: int):
    """A device function like `block_sum`: the largest value, NaN where one is NaN."""
    HALF = threads // 2

    @device_function
    def block_max(shared, t, value):
        shared[t] = value
        cuda.syncthreads()  # every value is there
        width = HALF
        while width > 0:
            if t < width:
                other = shared[t + width]
                if other > shared[t] or other != other:
                    shared[t] = other
            cuda.syncthreads()  # this level of the tree is there
            width //= 2
        return shared[0]

    return block_max
