"""o = softmax(scale q kᵀ) v, and the logarithms of the sums.

Scores are taken to base 2, which exponentials of a GPU have. A row keeps its maximum and its sum so far; where the
maximum grows, the sum and what of o there is are scaled down (online softmax, Milakov and Gimelshein, 2018).
"""

import functools
import math

import numpy as np

from nblora.kernels.common.cuda.intrinsics import (
    above,
    add_scaled,
    exp2,
    kept,
    lane_maxima,
    lane_sums,
    load_shared,
    maximum,
    mixed,
    multiply,
    part,
    repeated,
    scale,
    shifted,
    store,
    store_shared,
    stretched,
    with_part,
    zeros,
)
from nblora.kernels.common.cuda.target import COMPILED, cuda, int32, int64, kernel

from .tiles import (
    HEAD,
    KEY,
    LN_2,
    ROW,
    Rows,
    Tile,
    along_features,
    along_rows,
    find,
    multiples,
    numbers,
    places,
    visible,
)


@functools.cache
def forward(tile: Tile, dropping: bool):
    """Kernel: a block has a tile of a sequence's queries, of one head. Grid (tiles, heads).

    q, o (N, heads·size); k, v (M, key_heads·size); sums (N, heads); tiles (tiles, 2), sequence and first row; begins,
    key_begins, key_ends as of `blocks.Heads`. `group` heads share a key head; `factor` is scale·log2 e. With `dropping`
    weights are kept by `seed` and `bar` as `blocks.weights_kept` tells, and multiplied with `gain`.
    """
    SHARED, FIGURES, TYPE = tile.shared_elements, tile.figures, tile.type
    ROWS, COLUMNS, LANES, ACROSS, DOWN = tile.rows, tile.columns, tile.lanes, tile.across, tile.rows // tile.lanes
    SCORES, OUTPUTS = tile.scores, tile.outputs
    WIDTH, DEEP = SCORES // LANES, OUTPUTS // LANES
    ZERO, ONE, NONE, TO_NATURAL = TYPE(0), TYPE(1), TYPE(-np.inf), TYPE(LN_2)
    ROW_STEPS, KEY_STEPS = multiples(ROW, tuple(range(LANES))), multiples(KEY, numbers(tile))
    scores, weigh = along_features(tile), along_rows(tile)
    seen, (hold, write, _) = visible(tile), places(tile)

    @kernel(tile.threads, tile.resident)
    def attention(
        q,
        k,
        v,
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
        aligned,
        o,
        sums,
    ):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        t, head = int32(cuda.threadIdx.x), int32(cuda.blockIdx.y)
        here = find(tiles, begins, key_begins, key_ends)
        stride, key_stride, key_column = int32(q.shape[1]), int32(k.shape[1]), head // group * size
        queries = Rows(q, here.row, here.q1, head * size, stride)
        own, first = t % DOWN * LANES, t // DOWN * LANES
        row = here.row + own
        after = here.k0 + here.ahead + 1 - here.q0  # the first key that causal row 0 would not see
        end = min(here.row + ROWS, here.q1) - 1 + after if causal else here.k1
        states = mixed(shifted(ROW_STEPS, int64(seed) + int64(row) * ROW + int64(head) * HEAD))
        largest, total, out = repeated((NONE,), LANES), zeros(LANES, ZERO), zeros(OUTPUTS, ZERO)
        start = here.k0
        while start < end:
            s = scores(zeros(SCORES, ZERO), shared, queries, Rows(k, start, end, key_column, key_stride), size, aligned)
            s = seen(scale(s, factor), causal, int32(row + after - start - first), int32(end - start - first))
            store_shared(shared, FIGURES + t // DOWN * ROWS + own, lane_maxima(s, LANES))
            cuda.syncthreads()  # every thread's maxima are there
            new = largest
            for i in range(ACROSS):
                new = maximum(new, load_shared(shared, FIGURES + i * ROWS + own, LANES))
            shift = above(new, NONE)
            fade = exp2(add_scaled(largest, shift, -ONE))
            weights = exp2(add_scaled(s, repeated(shift, WIDTH), -ONE))
            total = add_scaled(lane_sums(weights, LANES), multiply(total, fade), ONE)
            if dropping:
                steps = shifted(KEY_STEPS, int64(start - here.k0 + first) * KEY)
                weights = kept(weights, repeated(states, WIDTH), stretched(steps, LANES), bar, gain)
            hold(shared, weights, t)
            stop = min(start + COLUMNS, end)
            out = multiply(out, repeated(fade, DEEP))
            out = weigh(out, shared, Rows(v, start, stop, key_column, key_stride), size, aligned)
            largest, start = new, int32(start + COLUMNS)
        store_shared(shared, FIGURES + t // DOWN * ROWS + own, total)
        cuda.syncthreads()  # every thread's sums are there
        total = zeros(LANES, ZERO)
        for i in range(ACROSS):
            total = add_scaled(total, load_shared(shared, FIGURES + i * ROWS + own, LANES), ONE)
        inverse = zeros(LANES, ZERO)
        for i in range(LANES):
            summed = part(total, int32(i), 1)[0]
            if summed != ZERO:  # else it saw no key
                inverse = with_part(inverse, int32(i), (ONE / summed,))
            if t // DOWN == 0:
                logarithm = TO_NATURAL * part(largest, int32(i), 1)[0] + math.log(summed) if summed != ZERO else ZERO
                valid = int32(1) if row + i < here.q1 else int32(0)
                store(sums, int64(row + i) * cuda.gridDim.y + head, valid, int32(0), (logarithm,))
        out = multiply(out, repeated(inverse, DEEP))
        write(out, Rows(o, here.row, here.q1, head * size, stride), here.q1, size, aligned, t)

    return attention
