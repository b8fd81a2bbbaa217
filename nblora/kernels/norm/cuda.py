"""LayerNorm and RMSNorm over rows (N, F), a group of 2^bits threads a row.

y = (x - m) r w + b with m the row's mean and r = 1 / √(variance + eps); RMSNorm has no mean: m = 0. The variance is
taken from the differences, so a large mean costs no digits. A row comes from memory once: what is read of it again is
in the nearest cache.
"""

import functools
import math

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.groups import group_sum, group_sums, lanes
from nblora.kernels.common.cuda.intrinsics import add_scaled, load, multiply, scale, store, zeros
from nblora.kernels.common.cuda.target import cuda, int32, int64, kernel


@functools.cache
def norm(dtype: str, threads: int, bits: int, centred: bool):
    """Kernel: y and stats, (N, 2), m and r of each row; bias, where `has_bias`. Grid (⌈N / (threads >> bits)⌉,)."""
    LANES, TYPE, THREADS, BITS = 16 // np.dtype(dtype).itemsize, getattr(types, dtype), threads, bits
    ZERO, ONE, ROWS, SIZE = TYPE(0), TYPE(1), threads >> bits, 1 << bits
    STEP = SIZE * LANES
    total, squares, less = lanes(dtype).total, lanes(dtype).squares, lanes(dtype).less

    @kernel(threads)
    def norm(x, weight, bias, eps, has_bias, aligned, y, stats):
        shared = cuda.shared.array(THREADS, TYPE)
        N, F, t = int64(x.shape[0]), int32(x.shape[1]), int32(cuda.threadIdx.x)
        member = t & (SIZE - 1)
        n = int64(cuda.blockIdx.x) * ROWS + (t >> BITS)
        start, end = n * F, F if n < N else int32(0)
        first = member * LANES
        mean, value = ZERO, ZERO
        if centred:
            column = first
            while column < end:
                value += total(load(x, start + column, end - column, aligned, LANES))
                column += STEP
            mean = group_sum(shared, t, member, SIZE, value) / TYPE(F)
            value = ZERO
        column = first
        while column < end:
            valid = end - column
            value += squares(less(load(x, start + column, valid, aligned, LANES), mean), valid)
            column += STEP
        gain = ONE / TYPE(math.sqrt(group_sum(shared, t, member, SIZE, value) / TYPE(F) + eps))
        column = first
        while column < end:
            place, valid = int64(column), end - column
            values = scale(less(load(x, start + place, valid, aligned, LANES), mean), gain)
            values = multiply(values, load(weight, place, valid, aligned, LANES))
            if has_bias:
                values = add_scaled(values, load(bias, place, valid, aligned, LANES), ONE)
            store(y, start + place, valid, aligned, values)
            column += STEP
        if member == 0 and n < N:
            store(stats, n * 2, int32(2), int32(0), (mean, gain))

    return norm


@functools.cache
def norm_gradient(dtype: str, threads: int, bits: int, centred: bool, wants_input: bool, wants_own: bool):
    """Kernel: with v = w grad and x̂ = (x - m) r, gx = r (v - mean v - x̂ mean(v x̂)), the first mean where `centred`;
    parts[b] = Σ grad x̂ and parts[B + b] = Σ grad over the `chunk` of rows of each of the B blocks.

    stats (N, 2); gx (N, F); parts (2·B, F). Grid (⌈N / chunk⌉,).
    """
    LANES, TYPE, THREADS, BITS = 16 // np.dtype(dtype).itemsize, getattr(types, dtype), threads, bits
    ZERO, ONE, ROWS, SIZE = TYPE(0), TYPE(1), threads >> bits, 1 << bits
    STEP, TWICE = SIZE * LANES, 2 * threads
    total, less = lanes(dtype).total, lanes(dtype).less

    @kernel(threads)
    def norm_gradient(grad, x, stats, weight, chunk, aligned, gx, parts):
        shared = cuda.shared.array(TWICE, TYPE)
        N, F, t = int64(x.shape[0]), int32(x.shape[1]), int32(cuda.threadIdx.x)
        member = t & (SIZE - 1)
        begin = int64(cuda.blockIdx.x) * chunk
        stop = min(begin + chunk, N)
        if wants_input:
            row = begin
            while row < stop:
                n = row + (t >> BITS)
                start, end = n * F, F if n < stop else int32(0)
                mean, gain = load(stats, n * 2, int32(2) if n < stop else int32(0), int32(0), 2)
                plain, along = ZERO, ZERO
                column = member * LANES
                while column < end:
                    place, valid = int64(column), end - column
                    v = load(grad, start + place, valid, aligned, LANES)
                    v = multiply(v, load(weight, place, valid, aligned, LANES))
                    hat = scale(less(load(x, start + place, valid, aligned, LANES), mean), gain)
                    plain += total(v)
                    along += total(multiply(v, hat))
                    column += STEP
                plain, along = group_sums(shared, t, THREADS, member, SIZE, plain, along)
                plain, along = plain / TYPE(F) if centred else ZERO, along / TYPE(F)
                column = member * LANES
                while column < end:
                    place, valid = int64(column), end - column
                    v = load(grad, start + place, valid, aligned, LANES)
                    v = multiply(v, load(weight, place, valid, aligned, LANES))
                    hat = scale(less(load(x, start + place, valid, aligned, LANES), mean), gain)
                    store(gx, start + place, valid, aligned, scale(add_scaled(less(v, plain), hat, -along), gain))
                    column += STEP
                row += ROWS
        if wants_own:
            column = t * LANES
            while column < F:
                valid = F - column
                own, plainly = zeros(LANES, ZERO), zeros(LANES, ZERO)
                row = begin
                while row < stop:
                    mean, gain = load(stats, row * 2, int32(2), int32(0), 2)
                    g = load(grad, row * F + column, valid, aligned, LANES)
                    hat = scale(less(load(x, row * F + column, valid, aligned, LANES), mean), gain)
                    own = add_scaled(own, multiply(g, hat), ONE)
                    plainly = add_scaled(plainly, g, ONE)
                    row += 1
                store(parts, int64(cuda.blockIdx.x) * F + column, valid, aligned, own)
                store(parts, int64(cuda.blockIdx.x + cuda.gridDim.x) * F + column, valid, aligned, plainly)
                column += THREADS * LANES

    return norm_gradient


@functools.cache
def add_parts(dtype: str, threads: int):
    """Kernel: first = Σ_b parts[b] and second = Σ_b parts[B + b], in order; parts (2·B, F).

    A block has 32 columns, and adds up the parts of each in threads / 32 shares. Grid (⌈F / 32⌉, 2).
    """
    TYPE, SIZE, LANES = getattr(types, dtype), threads, 32
    ZERO, GROUPS = TYPE(0), threads // 32

    @kernel(threads)
    def add_parts(parts, first, second):
        shared = cuda.shared.array(SIZE, TYPE)
        B, F = int32(parts.shape[0]) // 2, int64(parts.shape[1])
        t, which = int32(cuda.threadIdx.x), int32(cuda.blockIdx.y)
        share = t // LANES
        column = int64(cuda.blockIdx.x) * LANES + (t - share * LANES)
        value = ZERO
        if column < F:
            part = share
            while part < B:
                value += load(parts, (which * B + part) * F + column, 1, 0, 1)[0]
                part += GROUPS
        shared[t] = value
        cuda.syncthreads()  # the shares are there
        if share == 0 and column < F:
            for group in range(1, GROUPS):
                value += shared[t + group * LANES]
            if which == 0:
                store(first, column, 1, 0, (value,))
            else:
                store(second, column, 1, 0, (value,))

    return add_parts
