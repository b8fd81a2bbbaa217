"""Gradients of attention, whose weights are computed again: p = exp(scale q·k - sum).

With the gradient g of o, and d = p (g·v - g·o), those of v, k and q are pᵀg, scale dᵀq and scale d k. A block owns a
tile of keys and goes through the queries of all heads that share them, or a tile of queries and goes through the keys.
"""

import functools

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import (
    add_scaled,
    exp2,
    kept,
    lane_sums,
    load,
    mixed,
    multiply,
    repeated,
    scale,
    shifted,
    store,
    stretched,
    within,
    zeros,
)
from nblora.kernels.common.cuda.target import COMPILED, cuda, int32, int64, kernel

from .tiles import (
    HEAD,
    KEY,
    LOG2_E,
    ROW,
    Rows,
    Tile,
    along_features,
    along_rows,
    find,
    multiples,
    numbers,
    places,
    vectors,
    visible,
)

MEMBERS = 8
"""Threads that share a row of `output_products`."""


@functools.cache
def output_products(dtype: str, threads: int):
    """Kernel: products[n, head] = g·o, over the head's features. grad, o (N, heads·size); products (N, heads).

    Eight threads have a row of one head. Grid (⌈8 N·heads / threads⌉,).
    """
    SIZE, TYPE, LANES = threads, getattr(types, dtype), 16 // np.dtype(dtype).itemsize
    ZERO, ONE = TYPE(0), TYPE(1)

    @kernel(threads)
    def output_products(grad, o, size, aligned, products):
        shared = cuda.shared.array(SIZE, TYPE)
        t = int32(cuda.threadIdx.x)
        row, member = int64(cuda.grid(1)) // MEMBERS, t % MEMBERS
        total = zeros(LANES, ZERO)
        column = int32(member * LANES)
        while column < size:
            valid = size - column if row < products.size else int32(0)
            g = load(grad, row * size + column, valid, aligned, LANES)
            total = add_scaled(total, multiply(g, load(o, row * size + column, valid, aligned, LANES)), ONE)
            column = int32(column + MEMBERS * LANES)
        shared[t] = lane_sums(total, 1)[0]
        cuda.syncthreads()  # every thread's sum is there
        if member == 0 and row < products.size:
            found = ZERO
            for i in range(MEMBERS):
                found += shared[t + i]
            store(products, row, 1, 0, (found,))

    return output_products


@functools.cache
def query_gradient(tile: Tile, dropping: bool):
    """Kernel: the gradient of q. Grid (tiles, heads); a tile is of queries.

    Arguments as of `forward`; grad (N, heads·size), sums and products (N, heads).
    """
    SHARED, TYPE = tile.shared_elements, tile.type
    ROWS, COLUMNS, LANES, DOWN = tile.rows, tile.columns, tile.lanes, tile.rows // tile.lanes
    SCORES, OUTPUTS = tile.scores, tile.outputs
    WIDTH = SCORES // LANES
    ZERO, ONE, TO_BINARY = TYPE(0), TYPE(1), TYPE(LOG2_E)
    ROW_STEPS, KEY_STEPS = multiples(ROW, tuple(range(LANES))), multiples(KEY, numbers(tile))
    scores, weigh = along_features(tile), along_rows(tile)
    seen, (hold, write, figures) = visible(tile), places(tile)

    @kernel(tile.threads, tile.resident)
    def query_gradient(
        grad,
        q,
        k,
        v,
        sums,
        products,
        tiles,
        begins,
        key_begins,
        key_ends,
        group,
        size,
        causal,
        factor,
        seed,
        bar,
        gain,
        slope,
        aligned,
        gq,
    ):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        t, head, heads = int32(cuda.threadIdx.x), int32(cuda.blockIdx.y), int32(cuda.gridDim.y)
        here = find(tiles, begins, key_begins, key_ends)
        stride, key_stride, key_column = int32(q.shape[1]), int32(k.shape[1]), head // group * size
        queries = Rows(q, here.row, here.q1, head * size, stride)
        grads = Rows(grad, here.row, here.q1, head * size, stride)
        first, row = t // DOWN * LANES, here.row + t % DOWN * LANES
        after = here.k0 + here.ahead + 1 - here.q0
        end = min(here.row + ROWS, here.q1) - 1 + after if causal else here.k1
        states = mixed(shifted(ROW_STEPS, int64(seed) + int64(row) * ROW + int64(head) * HEAD))
        shift = scale(figures(sums, row, here.q1, head, heads), -TO_BINARY)
        behind = figures(products, row, here.q1, head, heads)
        out = zeros(OUTPUTS, ZERO)
        start = here.k0
        while start < end:
            keys = Rows(k, start, end, key_column, key_stride)
            s = scores(zeros(SCORES, ZERO), shared, queries, keys, size, aligned)
            values = Rows(v, start, end, key_column, key_stride)
            d = scores(zeros(SCORES, ZERO), shared, grads, values, size, aligned)
            s = seen(scale(s, factor), causal, int32(row + after - start - first), int32(end - start - first))
            p = exp2(add_scaled(s, repeated(shift, WIDTH), ONE))
            if dropping:
                steps = shifted(KEY_STEPS, int64(start - here.k0 + first) * KEY)
                d = kept(d, repeated(states, WIDTH), stretched(steps, LANES), bar, gain)
            hold(shared, multiply(p, add_scaled(d, repeated(behind, WIDTH), -ONE)), t)
            stop = min(start + COLUMNS, end)
            out = weigh(out, shared, Rows(k, start, stop, key_column, key_stride), size, aligned)
            start = int32(start + COLUMNS)
        write(scale(out, slope), Rows(gq, here.row, here.q1, head * size, stride), here.q1, size, aligned, t)

    return query_gradient


@functools.cache
def key_gradients(tile: Tile, dropping: bool):
    """Kernel: the gradients of k and of v. Grid (tiles, key heads); a tile is of keys, up to where the next sequence's
    begin: those from key_ends on have zeros. Columns behind the last query weigh zeros: its gradients."""
    SHARED, FIGURES, THREADS, TYPE = tile.shared_elements, tile.figures, tile.threads, tile.type
    COLUMNS, LANES, DOWN = tile.columns, tile.lanes, tile.rows // tile.lanes
    SCORES, OUTPUTS = tile.scores, tile.outputs
    WIDTH = SCORES // LANES
    ZERO, ONE, NONE, TO_BINARY = TYPE(0), TYPE(1), TYPE(-np.inf), TYPE(LOG2_E)
    NUMBERS, LANE = numbers(tile), tuple(range(tile.lanes))
    ROW_STEPS, KEY_STEPS = multiples(ROW, NUMBERS), multiples(KEY, LANE)
    scores, weigh = along_features(tile), along_rows(tile)
    hold, write, _ = places(tile)
    figures = vectors(WIDTH // tile.lanes, tile.lanes, tile.spacing)

    @kernel(tile.threads, tile.resident)
    def key_gradients(
        grad,
        q,
        k,
        v,
        sums,
        products,
        tiles,
        begins,
        key_begins,
        key_ends,
        group,
        size,
        causal,
        factor,
        seed,
        bar,
        gain,
        slope,
        aligned,
        gk,
        gv,
    ):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        t, key_head = int32(cuda.threadIdx.x), int32(cuda.blockIdx.y)
        here = find(tiles, begins, key_begins, key_ends)
        stride, key_stride, key_column = int32(q.shape[1]), int32(k.shape[1]), key_head * size
        keys = Rows(k, here.row, here.k1, key_column, key_stride)
        values = Rows(v, here.row, here.k1, key_column, key_stride)
        first, row = t // DOWN * LANES, here.row + t % DOWN * LANES
        before = here.q0 - here.ahead - here.k0  # the first query that sees key 0, were it there
        begin = max(here.q0, here.row + before) if causal else here.q0
        end = here.q1 if here.row < here.k1 else begin
        steps = shifted(KEY_STEPS, int64(row - here.k0) * KEY)
        dk, dv = zeros(OUTPUTS, ZERO), zeros(OUTPUTS, ZERO)
        head = int32(key_head * group)
        while head < (key_head + 1) * group:
            start = begin
            while start < end:
                stop = min(start + COLUMNS, end)
                i = t
                while i < COLUMNS:
                    n, valid = int64(start + i) * group * cuda.gridDim.y + head, stop - start - i
                    shared[FIGURES + i] = -TO_BINARY * load(sums, n, valid, 0, 1)[0]
                    shared[FIGURES + COLUMNS + i] = load(products, n, valid, 0, 1)[0]
                    i = int32(i + THREADS)
                queries = Rows(q, start, stop, head * size, stride)
                s = scores(zeros(SCORES, ZERO), shared, keys, queries, size, aligned)
                grads = Rows(grad, start, stop, head * size, stride)
                d = scores(zeros(SCORES, ZERO), shared, values, grads, size, aligned)
                s = scale(s, factor)
                if causal:
                    lows = shifted(LANE, int32(row + before - start - first))
                    s = within(s, NUMBERS, lows, repeated((int32(COLUMNS),), LANES), NONE)
                p = exp2(add_scaled(s, stretched(figures(shared, FIGURES + first), LANES), ONE))
                behind = stretched(figures(shared, FIGURES + COLUMNS + first), LANES)
                weights = p
                if dropping:
                    state = int64(seed) + int64(start + first) * ROW + int64(head) * HEAD
                    states = stretched(mixed(shifted(ROW_STEPS, state)), LANES)
                    weights = kept(p, states, repeated(steps, WIDTH), bar, gain)
                    d = kept(d, states, repeated(steps, WIDTH), bar, gain)
                d = multiply(p, add_scaled(d, behind, -ONE))
                hold(shared, weights, t)
                dv = weigh(dv, shared, grads, size, aligned)
                cuda.syncthreads()  # the weights have been read
                hold(shared, d, t)
                dk = weigh(dk, shared, queries, size, aligned)
                start = int32(start + COLUMNS)
            head = int32(head + 1)
        sequence = tiles[cuda.blockIdx.x, 0]
        room = int32(key_begins[sequence + 1])
        write(dv, Rows(gv, here.row, room, key_column, key_stride), here.k1, size, aligned, t)
        write(scale(dk, slope), Rows(gk, here.row, room, key_column, key_stride), here.k1, size, aligned, t)

    return key_gradients
