"""Attention of few queries, as those of one token of each sequence: as fast as memory gives keys and values.

A block has one query, of up to `rows` heads that share a key head. Its threads lie along the keys and their features,
which go straight to registers: each is used once.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import (
    add_scaled,
    exp2,
    lane_sums,
    load,
    load_shared,
    maximum,
    multiply,
    outer_accumulate,
    part,
    repeated,
    scale,
    store,
    store_shared,
    turned,
    with_part,
    zeros,
)
from nblora.kernels.common.cuda.target import COMPILED, cuda, int32, int64, kernel

from .tiles import LN_2, find


@dataclass(frozen=True)
class Few:
    """Sizes of a block's work, for heads of up to `size` features: `keys` at a time, of one head or `several`."""

    keys: int
    size: int
    threads: int
    dtype: str = "float32"
    several: bool = True

    @property
    def lanes(self) -> int:
        """Elements of a 128-bit vector."""
        return 16 // np.dtype(self.dtype).itemsize

    @property
    def rows(self) -> int:
        """Heads of a block."""
        return self.lanes if self.several else 1

    @property
    def vectors(self) -> int:
        """Vectors of a head's features."""
        return self.size // self.lanes

    @property
    def members(self) -> int:
        """Threads that share a key's score."""
        return min(8, self.vectors)

    @property
    def slices(self) -> int:
        """Threads that have the same features of values, of different keys."""
        return self.threads // self.vectors

    @property
    def type(self) -> Any:
        """Numba's type of an element."""
        return getattr(types, self.dtype)


@functools.cache
def few(shape: Few):
    """Kernel: o and the logarithms of the sums, as `forward`, nothing dropped. Grid (queries, blocks): each key head
    has ⌈group / rows⌉ blocks."""
    TYPE, LANES, ROWS, KEYS, SIZE = shape.type, shape.lanes, shape.rows, shape.keys, shape.size
    VECTORS, MEMBERS, SLICES, THREADS = shape.vectors, shape.members, shape.slices, shape.threads
    SLOTS = THREADS // MEMBERS
    TURNS, STRIDES, STEPS = KEYS // SLOTS, VECTORS // MEMBERS, KEYS // SLICES
    QUERIES = max(KEYS * MEMBERS * ROWS, THREADS * LANES * ROWS)  # behind partial sums
    SCORES = QUERIES + ROWS * SIZE
    WEIGHTS = SCORES + KEYS * ROWS
    TOTALS = WEIGHTS + KEYS * ROWS
    SHARED = TOTALS + SLICES * ROWS
    SUMS, DOTS = LANES * ROWS, ROWS * LANES
    ZERO, ONE, NONE, TO_NATURAL = TYPE(0), TYPE(1), TYPE(-np.inf), TYPE(LN_2)

    @kernel(THREADS)
    def attention_few(q, k, v, tiles, begins, key_begins, key_ends, group, size, causal, factor, aligned, o, sums):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        t = int32(cuda.threadIdx.x)
        here = find(tiles, begins, key_begins, key_ends)
        blocks = (group + ROWS - 1) // ROWS
        key_head = int32(cuda.blockIdx.y) // blocks
        before = (int32(cuda.blockIdx.y) - key_head * blocks) * ROWS  # heads of the group that other blocks have
        head, count = key_head * group + before, min(ROWS, group - before)
        begin, stride, key_column = int64(here.row) * q.shape[1] + head * size, int64(k.shape[1]), key_head * size
        end = here.row - here.q0 + here.k0 + here.ahead + 1 if causal else here.k1
        i = t
        while i < ROWS * VECTORS:
            row, column = i // VECTORS, i % VECTORS * LANES
            valid = size - column if row < count else int32(0)
            store_shared(shared, QUERIES + i * LANES, load(q, begin + row * size + column, valid, aligned, LANES))
            i = int32(i + THREADS)
        cuda.syncthreads()  # the queries are there
        slot, member = t // MEMBERS, t % MEMBERS
        piece, feature = t // VECTORS, t % VECTORS * LANES
        largest, total, out = repeated((NONE,), ROWS), zeros(ROWS, ZERO), zeros(SUMS, ZERO)
        start = here.k0
        while start < end:
            for turn in range(TURNS):
                key = start + turn * SLOTS + slot
                dots = zeros(DOTS, ZERO)
                for i in range(STRIDES):
                    column = (i * MEMBERS + member) * LANES
                    valid = size - column if key < end else int32(0)
                    held = load(k, key * stride + key_column + column, valid, aligned, LANES)
                    for row in range(ROWS):
                        query = load_shared(shared, QUERIES + row * SIZE + column, LANES)
                        dot = add_scaled(part(dots, int32(row), LANES), multiply(held, query), ONE)
                        dots = with_part(dots, int32(row), dot)
                partial = zeros(ROWS, ZERO)
                for row in range(ROWS):
                    partial = with_part(partial, int32(row), lane_sums(part(dots, int32(row), LANES), 1))
                store_shared(shared, ((turn * SLOTS + slot) * MEMBERS + member) * ROWS, partial)
            cuda.syncthreads()  # every member's sums are there
            i = t
            while i < KEYS:
                score = zeros(ROWS, ZERO)
                for other in range(MEMBERS):
                    score = add_scaled(score, load_shared(shared, (i * MEMBERS + other) * ROWS, ROWS), ONE)
                score = scale(score, factor) if start + i < end else repeated((NONE,), ROWS)
                store_shared(shared, SCORES + i * ROWS, score)
                i = int32(i + THREADS)
            cuda.syncthreads()  # every key's scores are there
            new = largest
            for i in range(KEYS):
                new = maximum(new, load_shared(shared, SCORES + i * ROWS, ROWS))
            fade = exp2(add_scaled(largest, new, -ONE))
            i = t
            while i < KEYS:
                score = load_shared(shared, SCORES + i * ROWS, ROWS)
                store_shared(shared, WEIGHTS + i * ROWS, exp2(add_scaled(score, new, -ONE)))
                i = int32(i + THREADS)
            cuda.syncthreads()  # every key's weights are there
            total, out = multiply(total, fade), multiply(out, repeated(fade, LANES))
            for i in range(STEPS):
                place = i * SLICES + piece
                valid = size - feature if start + place < end else int32(0)
                held = load(v, (start + place) * stride + key_column + feature, valid, aligned, LANES)
                weights = load_shared(shared, WEIGHTS + place * ROWS, ROWS)
                total = add_scaled(total, weights, ONE)
                out = outer_accumulate(out, held, weights)
            largest, start = new, int32(start + KEYS)
        if feature == 0:
            store_shared(shared, TOTALS + piece * ROWS, total)
        if ROWS > 1:
            out = turned(out, LANES)
        for row in range(ROWS):
            store_shared(shared, (piece * ROWS + row) * SIZE + feature, part(out, int32(row), LANES))
        cuda.syncthreads()  # every slice's sums are there
        i = t
        while i < count * VECTORS:
            row, column = i // VECTORS, i % VECTORS * LANES
            summed, found = ZERO, zeros(LANES, ZERO)
            for other in range(SLICES):
                summed += shared[TOTALS + other * ROWS + row]
                found = add_scaled(found, load_shared(shared, (other * ROWS + row) * SIZE + column, LANES), ONE)
            inverse, logarithm = ZERO, ZERO
            if summed != ZERO:  # else the query saw no key
                inverse, logarithm = ONE / summed, TO_NATURAL * part(largest, row, 1)[0] + math.log(summed)
            store(o, begin + row * size + column, size - column, aligned, scale(found, inverse))
            if column == 0:
                store(sums, int64(here.row) * (q.shape[1] // size) + head + row, 1, 0, (logarithm,))
            i = int32(i + THREADS)

    return attention_few
