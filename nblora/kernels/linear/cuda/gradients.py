"""Products of the backward sweep: input gradient, dense gradients with their update, skinny products, merge.

The input gradient reads W + c D before the delta's kernel changes D: the backend launches them in this order on one
stream. No kernel here writes a gradient of the size of W unless it is asked for.
"""

import functools

from nblora.kernels.common.cuda.intrinsics import (
    add_scaled,
    load,
    memory,
    multiply,
    part,
    scale,
    store,
    with_part,
    zeros,
)
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.target import COMPILED, cuda, int32, int64, kernel

from .forward import FACTOR, HAS_BASE, HAS_LOW, LOW, OUT, WEIGHT, X
from .tiles import Tile, accumulator, gathering, geometry


@functools.cache
def input_gradient(tile: Tile, transposed: bool, delta: bool, masked: bool):
    """Kernel: gx = gz (W + c D)ᵀ + mask ∘ (t Aᵀ), with t = s gz Bᵀ.

    gz (N, out); weight, delta (in, out), or (out, in) where `transposed`; t (N, rank); A (in, rank); mask, gx (N, in).
    Grid (⌈N / rows⌉, ⌈in / columns⌉, splits); with splits as in `forward.forward`, each sums `chunk` of `out`.
    """
    LANES, PARTS, SUMS, SHARED = tile.lanes, tile.sums // tile.lanes, tile.sums, tile.shared_elements
    ROWS, COLUMNS, TYPE = tile.rows, tile.columns, tile.type
    ZERO = TYPE(0)
    dense = accumulator(tile, True, not transposed, None, "delta" if delta else None)
    low_rank = accumulator(tile, True, True)
    _, where = geometry(tile)

    @kernel(tile.threads, tile.blocks)
    def input_gradient(gz, weight, delta, factor, low, A, mask, flags, chunk, gx):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        n0, i0 = int32(cuda.blockIdx.x) * ROWS, int32(cuda.blockIdx.y) * COLUMNS
        split, t = int32(cuda.blockIdx.z), int32(cuda.threadIdx.x)
        N, inner, inputs = int32(gz.shape[0]), int32(gz.shape[1]), int32(gx.shape[1])
        sums = zeros(SUMS, ZERO)
        rank = int32(low.shape[1]) if flags & HAS_LOW and split == 0 else int32(0)
        sums = low_rank(
            sums, shared, low, low, flags & LOW, A, A, flags & FACTOR, factor, N, inputs, rank, 0, rank, n0, i0
        )
        if masked:
            for index in range(PARTS):
                row, column = where(int32(index), t)
                n, i = n0 + row, i0 + column
                valid = inputs - i if n < N else int32(0)
                kept = load(mask, int64(n) * inputs + i, valid, flags & OUT, LANES)
                sums = with_part(sums, int32(index), multiply(part(sums, int32(index), LANES), kept))
        begin = split * chunk
        end = min(begin + chunk, inner) if flags & HAS_BASE else begin
        sums = dense(
            sums, shared, gz, gz, flags & X, weight, delta, flags & WEIGHT, factor, N, inputs, inner, begin, end, n0, i0
        )
        for index in range(PARTS):
            row, column = where(int32(index), t)
            n, i = n0 + row, i0 + column
            valid = inputs - i if n < N else int32(0)
            offset = (int64(split) * N + n) * inputs + i
            store(gx, offset, valid, flags & OUT, part(sums, int32(index), LANES))

    return input_gradient


@functools.cache
def product(tile: Tile, p_inner: bool, q_inner: bool, masked: bool):
    """Kernel: out = s P Q, for s (mask∘x) A, s gz Bᵀ, (mask∘x)ᵀ t, lowᵀ gz, and dense gradients where they are kept.

    p (rows, inner), or (inner, rows) unless `p_inner`; mask like p; q (inner, columns), or (columns, inner) where
    `q_inner`; out (splits·rows, columns). Grid (⌈rows / tile⌉, ⌈columns / tile⌉, splits).
    """
    LANES, PARTS, SUMS, SHARED = tile.lanes, tile.parts, tile.sums, tile.shared_elements
    ROWS, COLUMNS, TYPE = tile.rows, tile.columns, tile.type
    ZERO = TYPE(0)
    accumulate = accumulator(tile, p_inner, q_inner, "mask" if masked else None)
    gather, place = gathering(tile)

    @kernel(tile.threads, tile.blocks)
    def product(p, mask, q, factor, flags, chunk, out):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        row0, column0 = int32(cuda.blockIdx.x) * ROWS, int32(cuda.blockIdx.y) * COLUMNS
        split, t = int32(cuda.blockIdx.z), int32(cuda.threadIdx.x)
        rows, inner = int32(p.shape[0 if p_inner else 1]), int32(p.shape[1 if p_inner else 0])
        columns = int32(out.shape[1])
        begin = split * chunk
        end = min(begin + chunk, inner)
        sums = zeros(SUMS, ZERO)
        sums = accumulate(
            sums, shared, p, mask, flags & X, q, q, flags & WEIGHT, factor, rows, columns, inner, begin, end, row0,
            column0,
        )  # fmt: skip
        sums = gather(sums, shared)
        for index in range(PARTS):
            along, across = place(int32(index), t)
            row, column = row0 + along, column0 + across
            valid = columns - column if row < rows else int32(0)
            offset = (int64(split) * rows + row) * columns + column
            store(out, offset, valid, flags & OUT, scale(part(sums, int32(index), LANES), factor))

    return product


@functools.cache
def product_through(tile: Tile):
    """Kernel: gz = gy ∘ act'(z), written where it is read, and out = s gz Bᵀ.

    gy, z, gz (N, inner); q (columns, inner), whose columns lie in one tile, so that every element of gz has one owner;
    out (splits·N, columns). Grid (⌈N / tile⌉, 1, splits).
    """
    LANES, PARTS, SUMS, SHARED = tile.lanes, tile.parts, tile.sums, tile.shared_elements
    ROWS, TYPE = tile.rows, tile.type
    ZERO = TYPE(0)
    accumulate = accumulator(tile, True, True, "slope")
    gather, place = gathering(tile)

    @kernel(tile.threads, tile.blocks)
    def product_through(gy, z, gz, code, q, factor, flags, chunk, out):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        row0 = int32(cuda.blockIdx.x) * ROWS
        split, t = int32(cuda.blockIdx.z), int32(cuda.threadIdx.x)
        rows, inner, columns = int32(gy.shape[0]), int32(gy.shape[1]), int32(out.shape[1])
        begin = split * chunk
        end = min(begin + chunk, inner)
        sums = zeros(SUMS, ZERO)
        sums = accumulate(
            sums, shared, gy, (z, gz), flags & X, q, q, flags & WEIGHT, code, rows, columns, inner, begin, end, row0, 0
        )
        sums = gather(sums, shared)
        for index in range(PARTS):
            along, column = place(int32(index), t)
            row = row0 + along
            valid = columns - column if row < rows else int32(0)
            offset = (int64(split) * rows + row) * columns + column
            store(out, offset, valid, flags & OUT, scale(part(sums, int32(index), LANES), factor))

    return product_through


FIELDS = 10
"""What a row of the table of `grouped_products` tells of one product: its first block, the addresses of P, mask, Q and
the result, rows, columns, samples, flags, and tiles along the rows."""


@functools.cache
def grouped_products(tile: Tile, masked: bool):
    """Kernel: many products (mask∘P)ᵀ Q over the samples in one launch, for the gradients of a model's factors.

    table (products, FIELDS). Grid (tiles of all products,).
    """
    LANES, PARTS, SUMS, SHARED = tile.lanes, tile.parts, tile.sums, tile.shared_elements
    ROWS, COLUMNS, TYPE = tile.rows, tile.columns, tile.type
    ZERO, ONE = TYPE(0), TYPE(1)
    accumulate = accumulator(tile, False, False, "mask" if masked else None)
    gather, place = gathering(tile)

    @kernel(tile.threads, tile.blocks)
    def grouped_products(table):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        block, job = int32(cuda.blockIdx.x), int32(0)
        while job + 1 < table.shape[0] and table[job + 1, 0] <= block:
            job += int32(1)
        rows, columns, samples = int32(table[job, 5]), int32(table[job, 6]), int32(table[job, 7])
        flags, down = int32(table[job, 8]), int32(table[job, 9])
        p = memory(table[job, 1], int64(samples) * rows, ZERO)
        mask = memory(table[job, 2], int64(samples) * rows, ZERO)
        q = memory(table[job, 3], int64(samples) * columns, ZERO)
        out = memory(table[job, 4], int64(rows) * columns, ZERO)
        block -= int32(table[job, 0])
        row0, column0 = block % down * ROWS, block // down * COLUMNS
        sums = zeros(SUMS, ZERO)
        sums = accumulate(
            sums, shared, p, mask, flags & X, q, q, flags & WEIGHT, ONE, rows, columns, samples, 0, samples, row0,
            column0,
        )  # fmt: skip
        t = int32(cuda.threadIdx.x)
        sums = gather(sums, shared)
        for index in range(PARTS):
            along, across = place(int32(index), t)
            row, column = row0 + along, column0 + across
            valid = columns - column if row < rows else int32(0)
            store(out, int64(row) * columns + column, valid, flags & OUT, part(sums, int32(index), LANES))

    return grouped_products


@functools.cache
def dense_update(tile: Tile, delta: bool, weight: bool):
    """Kernel: G = Pᵀ Q over the samples, used up where it is made: V = m V + (1-m) c G, D -= lr V; W -= lr G.

    p (N, rows) and q (N, columns) are x and gz, or gz and x where the weight is stored as (out, in). delta, velocity,
    weight (rows, columns) are updated in place, those that there are. G never reaches global memory. Grid
    (⌈rows / tile⌉, ⌈columns / tile⌉); every element of D, V and W is read and written once.
    """
    LANES, PARTS, SUMS, SHARED = tile.lanes, tile.parts, tile.sums, tile.shared_elements
    ROWS, COLUMNS, TYPE = tile.rows, tile.columns, tile.type
    ZERO = TYPE(0)
    accumulate = accumulator(tile, False, False)
    gather, place = gathering(tile)
    momentum_step = rules(tile.dtype).momentum_lanes[LANES]
    descend = rules(tile.dtype).descend_lanes[LANES]

    @kernel(tile.threads, tile.blocks)
    def dense_update(p, q, momentum, gain, delta_lr, lr, flags, D, V, W):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        row0, column0 = int32(cuda.blockIdx.x) * ROWS, int32(cuda.blockIdx.y) * COLUMNS
        samples, rows, columns = int32(p.shape[0]), int32(p.shape[1]), int32(q.shape[1])
        sums = zeros(SUMS, ZERO)
        sums = accumulate(
            sums, shared, p, p, flags & X, q, q, flags & WEIGHT, gain, rows, columns, samples, 0, samples, row0, column0
        )
        t = int32(cuda.threadIdx.x)
        sums = gather(sums, shared)
        for index in range(PARTS):
            along, across = place(int32(index), t)
            row, column = row0 + along, column0 + across
            valid = columns - column if row < rows else int32(0)
            offset = int64(row) * columns + column
            gradient = part(sums, int32(index), LANES)
            if delta:
                velocity = load(V, offset, valid, flags & OUT, LANES)
                velocity = momentum_step(velocity, gradient, momentum, gain)
                store(V, offset, valid, flags & OUT, velocity)
                held = load(D, offset, valid, flags & OUT, LANES)
                store(D, offset, valid, flags & OUT, descend(held, velocity, delta_lr))
            if weight:
                held = load(W, offset, valid, flags & OUT, LANES)
                store(W, offset, valid, flags & OUT, descend(held, gradient, lr))

    return dense_update


@functools.cache
def merge(tile: Tile, transposed: bool, delta: bool):
    """Kernel: out = W + s A B + c D, stored like W.

    p (rows, rank) and q (rank, columns) are A and B; where `transposed`, p is B (rank, rows) and q A (columns, rank).
    weight, delta, out (rows, columns).
    """
    LANES, PARTS, SUMS, SHARED = tile.lanes, tile.sums // tile.lanes, tile.sums, tile.shared_elements
    ROWS, COLUMNS, TYPE = tile.rows, tile.columns, tile.type
    ZERO = TYPE(0)
    accumulate = accumulator(tile, not transposed, transposed)
    _, where = geometry(tile)

    @kernel(tile.threads, tile.blocks)
    def merge(p, q, low_scaling, weight, D, delta_scaling, flags, out):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        row0, column0 = int32(cuda.blockIdx.x) * ROWS, int32(cuda.blockIdx.y) * COLUMNS
        rows, columns = int32(out.shape[0]), int32(out.shape[1])
        rank = int32(p.shape[0 if transposed else 1]) if flags & HAS_LOW else int32(0)
        sums = zeros(SUMS, ZERO)
        sums = accumulate(
            sums, shared, p, p, flags & LOW, q, q, flags & FACTOR, low_scaling, rows, columns, rank, 0, rank, row0,
            column0,
        )  # fmt: skip
        t = int32(cuda.threadIdx.x)
        for index in range(PARTS):
            along, across = where(int32(index), t)
            row, column = row0 + along, column0 + across
            valid = columns - column if row < rows else int32(0)
            offset = int64(row) * columns + column
            values = load(weight, offset, valid, flags & WEIGHT, LANES)
            values = add_scaled(values, part(sums, int32(index), LANES), low_scaling)
            if delta:
                values = add_scaled(values, load(D, offset, valid, flags & WEIGHT, LANES), delta_scaling)
            store(out, offset, valid, flags & WEIGHT, values)

    return merge
