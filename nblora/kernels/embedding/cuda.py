"""Rows of tables on a GPU.

Samples that took one row are added up by the threads that own it, in the order of the samples or, where there are many
of them, in a fixed number of shares, so results repeat bit for bit. `order` holds the samples sorted by their row, and
those of row i are order[starts[i]] to order[starts[i + 1] - 1].

A block has 2^bits columns of vectors, and as many rows as there are threads for: no division tells them apart.
Of a vector beyond the last column nothing is read or written. `aligned` says that rows begin at multiples of 16 bytes.
"""

import functools

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import (
    add_scaled,
    load,
    load_shared,
    scale,
    store,
    store_shared,
    zeros,
)
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.target import cuda, int32, int64, kernel

SECOND, ADD = 1, 2  # what there is in `take`
SUM, DESCEND, FOLLOW, MEAN = range(4)


@functools.cache
def take(dtype: str, threads: int):
    """Kernel: target[n] = factor·first[i] + second_factor·second[i], i = indices[n], the second where SECOND is among
    the flags, onto what is there where ADD is.

    Tables (count, F), either of which may hold bfloat16; indices (N,); target (N, F). Grid (⌈N / (threads >> bits)⌉,
    ⌈vectors / 2^bits⌉).
    """
    LANES, THREADS, ONE = 16 // np.dtype(dtype).itemsize, threads, getattr(types, dtype)(1)

    @kernel(threads)
    def take(first, second, factor, second_factor, indices, flags, bits, aligned, target):
        N, F = int64(target.shape[0]), int32(target.shape[1])
        t = int32(cuda.threadIdx.x)
        n = int64(cuda.blockIdx.x) * (THREADS >> bits) + (t >> bits)
        column = ((int32(cuda.blockIdx.y) << bits) + (t & ((1 << bits) - 1))) * LANES
        if n < N:
            valid = F - column
            source, place = indices[n] * F + column, n * F + column
            values = scale(load(first, source, valid, aligned, LANES), factor)
            if flags & SECOND:
                values = add_scaled(values, load(second, source, valid, aligned, LANES), second_factor)
            if flags & ADD:
                values = add_scaled(values, load(target, place, valid, aligned, LANES), ONE)
            store(target, place, valid, aligned, values)

    return take


@functools.cache
def add_up(dtype: str, threads: int, what: int):
    """Kernel: with G[i] = Σ gradient[n] over the samples of row i, SUM target = factor G; DESCEND target -= lr G;
    FOLLOW V = m V + gain G, target -= lr V; MEAN target = G / samples, the samples of row i being starts[i] to
    starts[i + 1].

    gradient (N, F); order (N,); starts (count + 1,); target and velocity (count, F). Rows without samples have G = 0,
    and DESCEND leaves them alone. A row's samples are added up in 2^share_bits shares. Grid (⌈count / (threads >> bits
    + share_bits)⌉, ⌈vectors / 2^bits⌉).
    """
    LANES, TYPE, THREADS = 16 // np.dtype(dtype).itemsize, getattr(types, dtype), threads
    ZERO, ONE, SIZE = TYPE(0), TYPE(1), threads * (16 // np.dtype(dtype).itemsize)
    momentum_step, descend = rules(dtype).momentum_lanes[LANES], rules(dtype).descend_lanes[LANES]

    @kernel(threads)
    def add_up(gradient, order, starts, factor, momentum, gain, lr, bits, share_bits, aligned, velocity, target):
        shared = cuda.shared.array(SIZE, TYPE)
        count, F = int64(target.shape[0]), int32(target.shape[1])
        t, shares = int32(cuda.threadIdx.x), int32(1) << share_bits
        share = (t >> bits) & (shares - 1)
        i = int64(cuda.blockIdx.x) * (THREADS >> (bits + share_bits)) + (t >> (bits + share_bits))
        column = ((int32(cuda.blockIdx.y) << bits) + (t & ((1 << bits) - 1))) * LANES
        valid = F - column if i < count else int32(0)
        begin, end = int64(0), int64(0)
        if valid > 0:
            begin, end = starts[i], starts[i + 1]
        total = zeros(LANES, ZERO)
        place = begin + share
        while place < end:
            n = place if what == MEAN else order[place]
            total = add_scaled(total, load(gradient, n * F + column, valid, aligned, LANES), ONE)
            place += shares
        if shares > 1:
            store_shared(shared, t * LANES, total)
            cuda.syncthreads()  # the shares are there
            width = shares >> 1
            while width > 0:
                if share < width:
                    total = add_scaled(total, load_shared(shared, (t + (width << bits)) * LANES, LANES), ONE)
                    store_shared(shared, t * LANES, total)
                cuda.syncthreads()  # this level of the tree is there
                width >>= 1
        if share > 0 or (what == DESCEND and begin == end):
            return
        place = i * F + column
        if what == FOLLOW:
            v = momentum_step(load(velocity, place, valid, aligned, LANES), total, momentum, gain)
            store(velocity, place, valid, aligned, v)
            total = v
        if what == SUM:
            total = scale(total, factor)
        elif what == MEAN:
            total = scale(total, ONE / TYPE(max(end - begin, int64(1))))
        else:
            total = descend(load(target, place, valid, aligned, LANES), total, lr)
        store(target, place, valid, aligned, total)

    return add_up
