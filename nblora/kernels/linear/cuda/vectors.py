"""N = 1: products of one vector and a matrix, as fast as memory gives the matrix."""

import functools

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import add_scaled, load, store, zeros
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.target import cuda, int32, int64, kernel

FINISH_LOW, FINISH_MASK, FINISH_BIAS, FINISH_KEEP = (1 << bit for bit in range(4))
GROUP = 32
"""Threads that share a row in `along_rows`."""


@functools.cache
def down_columns(dtype: str, threads: int, delta: bool, ones: bool):
    """Kernel: sums[split, column] = Σ_row x[row] (M + c D)[row, column] over the split's `chunk` of rows.

    x (rows,), not read where `ones`: plain column sums. matrix, delta (rows, columns); sums (splits, columns). A thread
    owns the columns of one 128-bit vector. Grid (⌈columns / (threads·lanes)⌉, splits).
    """
    LANES, TYPE = 16 // np.dtype(dtype).itemsize, getattr(types, dtype)
    ZERO, ONE = TYPE(0), TYPE(1)

    @kernel(threads)
    def down_columns(x, matrix, delta_matrix, factor, aligned, chunk, sums):
        rows, columns = int32(matrix.shape[0]), int32(matrix.shape[1])
        column = int32(cuda.grid(1)) * LANES
        split = int32(cuda.blockIdx.y)
        valid = columns - column
        total = zeros(LANES, ZERO)
        begin = split * chunk
        for row in range(begin, min(begin + chunk, rows)):
            offset = int64(row) * columns + column
            values = load(matrix, offset, valid, aligned, LANES)
            if delta:
                values = add_scaled(values, load(delta_matrix, offset, valid, aligned, LANES), factor)
            weight = ONE if ones else load(x, int64(row), int32(1), int32(0), 1)[0]
            total = add_scaled(total, values, weight)
        store(sums, int64(split) * columns + column, valid, aligned, total)

    return down_columns


@functools.cache
def along_rows(dtype: str, threads: int, delta: bool):
    """Kernel: sums[row] = Σ_column (M + c D)[row, column] x[column].

    x (columns,); matrix, delta (rows, columns); sums (1, rows). A group of 32 threads owns a row; its partial sums are
    added in a tree, always in the same order. Grid (⌈rows / (threads / 32)⌉,).
    """
    LANES, TYPE = 16 // np.dtype(dtype).itemsize, getattr(types, dtype)
    ZERO, GROUPS = TYPE(0), threads // GROUP

    @kernel(threads)
    def along_rows(x, matrix, delta_matrix, factor, aligned, sums):
        shared = cuda.shared.array(threads, TYPE)
        rows, columns = int32(matrix.shape[0]), int32(matrix.shape[1])
        t = int32(cuda.threadIdx.x)
        member = t % GROUP
        row = int32(cuda.blockIdx.x) * GROUPS + t // GROUP
        end = columns if row < rows else int32(0)
        total = ZERO
        for column in range(member * LANES, end, GROUP * LANES):
            offset, valid = int64(row) * columns + column, int32(columns - column)
            values = load(matrix, offset, valid, aligned, LANES)
            if delta:
                values = add_scaled(values, load(delta_matrix, offset, valid, aligned, LANES), factor)
            others = load(x, int64(column), valid, aligned, LANES)
            for lane in range(LANES):
                total += values[lane] * others[lane]
        shared[t] = total
        cuda.syncthreads()  # the group's sums are there
        width = int32(GROUP // 2)
        while width > 0:
            if member < width:
                shared[t] += shared[t + width]
            cuda.syncthreads()  # this level of the tree is there
            width //= 2
        if member == 0 and row < rows:
            sums[0, row] = shared[t]

    return along_rows


@functools.cache
def finish(dtype: str, threads: int):
    """Kernel: adds up the splits of a product, and what a forward or an input gradient adds to it.

        v = s Σ_split sums[split·N + n, o] + mask[n, o] Σ_r low[n, r] factor[r, o] + bias[o];  z = v;  y = act(v)

    sums (splits·N, outputs); low (N, rank), factor (rank, outputs), or (outputs, rank) where `strided`; mask and bias
    where `flags` says so; z, y (N, outputs). One thread an element: a block has 2^bits columns of threads / 2^bits
    rows, so that no division tells elements apart. Grid (⌈N / rows⌉, ⌈outputs / columns⌉).
    """
    TYPE = getattr(types, dtype)
    activate = rules(dtype).activate
    ZERO, ONE, THREADS = TYPE(0), TYPE(1), threads

    @kernel(threads)
    def finish(bits, splits, sums, scaling, low, factor, strided, mask, bias, code, flags, z, y):
        N, outputs = int64(y.shape[0]), int64(y.shape[1])
        t = int32(cuda.threadIdx.x)
        row = t >> bits
        n = int64(cuda.blockIdx.x) * (THREADS >> bits) + row
        o = (int64(cuda.blockIdx.y) << bits) + (t - (row << bits))
        if n < N and o < outputs:
            place = n * outputs + o
            value = ZERO
            split = place
            for _ in range(splits):
                value += load(sums, split, 1, 0, 1)[0]
                split += y.size
            value *= scaling
            if flags & FINISH_LOW:
                added, rank = ZERO, int64(low.shape[1])
                # Along r: the factor's own row where it is strided, else one of its columns.
                at, step = (o * rank, int64(1)) if strided else (o, outputs)
                for r in range(rank):
                    added += load(low, n * rank + r, 1, 0, 1)[0] * load(factor, at, 1, 0, 1)[0]
                    at += step
                value += added * (load(mask, place, 1, 0, 1)[0] if flags & FINISH_MASK else ONE)
            if flags & FINISH_BIAS:
                value += load(bias, o, 1, 0, 1)[0]
            if flags & FINISH_KEEP:
                store(z, place, 1, 0, (value,))
            store(y, place, 1, 0, (activate(value, code),))

    return finish
