"""Rows on a GPU: put where integers say, cut into columns and joined again, spread over ranges, and searched.

A block has 2^bits columns of vectors, and as many rows as there are threads for: no division tells them apart.
Of a vector beyond the last column nothing is read or written. `aligned` says that rows begin at multiples of 16 bytes.
"""

import functools
import math

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import add_scaled, load, memory, scale, store
from nblora.kernels.common.cuda.target import cuda, device_function, float64, int32, int64, kernel


@functools.cache
def scatter(dtype: str, threads: int):
    """Kernel: target[rows[n]] (+)= source[n]; no row twice.

    source (N, F), rows (N,), target (any, F). Grid (⌈N / (threads >> bits)⌉, ⌈vectors / 2^bits⌉).
    """
    LANES, THREADS, ONE = 16 // np.dtype(dtype).itemsize, threads, getattr(types, dtype)(1)

    @kernel(threads)
    def scatter(source, rows, add, bits, aligned, target):
        N, F = int64(source.shape[0]), int32(source.shape[1])
        t = int32(cuda.threadIdx.x)
        n = int64(cuda.blockIdx.x) * (THREADS >> bits) + (t >> bits)
        column = ((int32(cuda.blockIdx.y) << bits) + (t & ((1 << bits) - 1))) * LANES
        if n < N:
            valid, place = F - column, rows[n] * F + column
            values = load(source, n * F + column, valid, aligned, LANES)
            if add:
                values = add_scaled(values, load(target, place, valid, aligned, LANES), ONE)
            store(target, place, valid, aligned, values)

    return scatter


@functools.cache
def columns(dtype: str, threads: int, join: bool):
    """Kernel: parts[p][n] = whole[n, p·width to (p + 1)·width], or the other way where `join`.

    whole (N, parts·width); a row of `table` is the address of a part, (N, width). Grid (⌈N / (threads >> bits)⌉,
    ⌈vectors of a part / 2^bits⌉, parts).
    """
    LANES, THREADS, ZERO = 16 // np.dtype(dtype).itemsize, threads, getattr(types, dtype)(0)

    @kernel(threads)
    def columns(table, width, bits, aligned, whole):
        N, F = int64(whole.shape[0]), int64(whole.shape[1])
        t, part = int32(cuda.threadIdx.x), int32(cuda.blockIdx.z)
        one = memory(table[part, 0], N * width, ZERO)
        n = int64(cuda.blockIdx.x) * (THREADS >> bits) + (t >> bits)
        column = ((int32(cuda.blockIdx.y) << bits) + (t & ((1 << bits) - 1))) * LANES
        if n < N:
            valid, place, within = width - column, n * F + part * width + column, n * width + column
            if join:
                store(whole, place, valid, aligned, load(one, within, valid, aligned, LANES))
            else:
                store(one, within, valid, aligned, load(whole, place, valid, aligned, LANES))

    return columns


@functools.cache
def spread(dtype: str, threads: int):
    """Kernel: rows[n] = grad[s] / (begins[s + 1] - begins[s]) for n from begins[s] to begins[s + 1].

    grad (S, F), begins (S + 1,), rows (N, F). Grid (S, ⌈vectors / 2^bits⌉, any): what lies along z shares the rows.
    """
    LANES, TYPE, THREADS = 16 // np.dtype(dtype).itemsize, getattr(types, dtype), threads
    ONE = TYPE(1)

    @kernel(threads)
    def spread(grad, begins, bits, aligned, rows):
        F, s = int32(grad.shape[1]), int64(cuda.blockIdx.x)
        t = int32(cuda.threadIdx.x)
        column = ((int32(cuda.blockIdx.y) << bits) + (t & ((1 << bits) - 1))) * LANES
        valid, begin = F - column, begins[s]
        row, count = int32(cuda.blockIdx.z) * (THREADS >> bits) + (t >> bits), int32(begins[s + 1] - begin)
        values = scale(load(grad, s * F + column, valid, aligned, LANES), ONE / TYPE(count))
        while row < count:
            store(rows, (begin + row) * F + column, valid, aligned, values)
            row += int32(cuda.gridDim.z) * (THREADS >> bits)

    return spread


@functools.cache
def largest(dtype: str, threads: int, judged: bool):
    """Kernel: of each row of x, (N, F), the place of its largest number, the first of equals and NaN above all, and
    that number: found[n] = place, number; where `judged` found[n] = 1 where labels[n] is the place, else 0.

    found float64, (N, 2) or (N,). A group of 2^bits threads has a row. `aligned` says that x begins at a multiple of 16
    bytes: a row may begin anywhere, and its first vector is what lies before the next multiple.
    Grid (⌈N / (threads >> bits)⌉,).
    """
    LANES, TYPE, THREADS = 16 // np.dtype(dtype).itemsize, getattr(types, dtype), threads
    LOWEST = TYPE(-math.inf)

    @device_function
    def before(other, where, value, place):
        """Whether one number at its place goes before another; there is none at -1."""
        if place < 0:
            return True
        if other != other:
            return value == value or where < place
        return other > value or (other == value and where < place)

    @kernel(threads)
    def largest(x, labels, bits, aligned, found):
        numbers = cuda.shared.array(THREADS, TYPE)
        places = cuda.shared.array(THREADS, int32)
        N, F = int64(x.shape[0]), int32(x.shape[1])
        t, size = int32(cuda.threadIdx.x), int32(1) << bits
        member = t & (size - 1)
        n = int64(cuda.blockIdx.x) * (THREADS >> bits) + (t >> bits)
        start, end = n * F, F if n < N else int32(0)
        value, place = LOWEST, int32(-1)
        column = member * LANES - int32(start & (LANES - 1))
        while column < end:
            first = max(column, int32(0))
            valid = min(column + LANES, end) - first
            values = load(x, start + first, valid, aligned, LANES)
            for lane in range(LANES):
                if lane < valid and before(values[lane], int32(first + lane), value, place):
                    value, place = values[lane], int32(first + lane)
            column += size * LANES
        numbers[t] = value
        places[t] = place
        cuda.syncthreads()  # every thread's are there
        width = size >> 1
        while width > 0:
            if member < width and before(numbers[t + width], places[t + width], numbers[t], places[t]):
                numbers[t] = numbers[t + width]
                places[t] = places[t + width]
            cuda.syncthreads()  # this level of the tree is there
            width >>= 1
        if member == 0 and n < N:
            if judged:
                store(found, n, int32(1), int32(0), (float64(1) if places[t] == labels[n] else float64(0),))
            else:
                store(found, n * 2, int32(2), int32(0), (float64(places[t]), float64(numbers[t])))

    return largest
