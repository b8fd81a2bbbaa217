"""What forward and backward do with few samples, on the tiles that read weights where they lie (`rowtiles`).

Forward and backward, Dense and FullyConnected: every job owns some rows of the stored matrices, and the worker that got
them once is the first to be offered them again, so W, D and V stay in the caches of its own core. Dots along rows are
parts of the result Z at once (outputs of FullyConnected, inputs of Dense); sums down the rows (the other two) are kept
apart for each job and added up in the order of jobs, so that results repeat bit for bit. Z is packed in panels.
"""

from typing import NamedTuple

from nblora.kernels.common.jit import part
from nblora.kernels.common.machine import GROUP
from nblora.kernels.common.microkernel import At, once
from nblora.kernels.common.rows import accumulate_row, combine_row
from nblora.kernels.common.vectors import copy_group, copy_pair

from .packing import Block, plain
from .rowtiles import (
    DESCEND,
    DOT_ROWS,
    DOT_SAMPLES,
    MOMENTUM,
    STORE,
    Counts,
    PairAhead,
    Rows,
    RowsAhead,
    Rule,
    dot_rows,
    sum_rows,
    update_rows,
)
from .work import panel_width

FEW = 64
"""Samples up to which weights are read where they lie."""
FEW_SMALL, SMALL = 32, 1 << 18
"""The same for weights of at most so many elements, 1 MB in float32. Whether there is a delta does not matter, so that
a new adapter is its base bit for bit."""
SPAN = 1 << 16
"""Packed samples, in elements, that a job goes through again and again: 256 KB of float32 stay in a level-2 cache."""
COMBINED = 4096
"""Elements of scratch that stay free before the rows that `add_dots` combines."""
LONGEST = 2048
"""Columns that a job goes through at once, so that combined rows stay in the level-1 cache."""
PACK = 512
"""Features of a job that packs, a multiple of every quantum."""
PIECE = 32
"""Features of a piece of sums that are added up at once, which stays in the level-1 cache."""
SHORT = 32
"""Features below which a block is not cut further."""
PACKED, LOW, SUMMED, DRAWN = range(4)
"""Counters of forward and sweep: jobs done of the first three kinds, then jobs drawn, by kind and share."""


class Pair(NamedTuple):
    """Two stored arrays, V and D, or one of them twice; or scratch for what is left of whole panels of each."""

    V: object
    D: object


class Outer(NamedTuple):
    """Samples whose products G[p, q] = Σ_n L[n, p] R[n, q] are; L in groups, R in panels, both of every feature."""

    L: object
    R: object
    samples: int


@part
def quantum(array):
    """Features at multiples of which blocks begin: a panel, or a group where that is longer."""
    return max(panel_width(array), GROUP)


@part
def padded(features, array):
    """The features rounded up to whole blocks."""
    unit = quantum(array)
    return (features + unit - 1) // unit * unit


@part
def place(feature, samples, width):
    """Where this feature of the first sample lies among features packed by `width`; a sample is `width` further."""
    return feature // width * samples * width + feature % width


@part
def pack(target, at, width, X, f0, f1):
    """Pack the features f0 <= f < f1 of X [N, F] by `width`, a panel or a group; f0 begins one; zeros beyond F."""
    once()
    (N, F), source = X.shape, X.reshape(-1)
    for f in range(f0, f1, width):
        to = at + f * N
        if f + width > F:
            _pack_edge(target, to, source, f, F, N, width)
        elif width == GROUP:
            for n in range(N):
                copy_group(target, to + n * width, source, n * F + f)
        else:
            for n in range(N):
                copy_pair(target, to + n * width, source, n * F + f)


@part
def _pack_edge(target, to, source, f, F, N, width):
    for n in range(N):
        for k in range(width):
            target[to + n * width + k] = source[n * F + f + k] if f + k < F else target.dtype.type(0)


@part
def pack_transposed(target, at, A, f0, f1):
    """target[at + r·in + f] = A[f, r] for f0 <= f < f1: A [in, rank] as rows, which sums and dots go along."""
    once()
    inputs, rank = A.shape
    for f in range(f0, f1):
        row = A[f]
        for r in range(rank):
            target[at + r * inputs + f] = row[r]


@part
def begin_panels(Z, samples, f0, f1, bias, has_bias):
    """Z = bias, or zeros, for a block of features."""
    once()
    width = panel_width(Z)
    if not has_bias:
        Z[: (f1 - f0 + width - 1) // width * width * samples] = 0
        return
    for f in range(f0, f1, width):
        start = (f - f0) * samples
        if f + width <= bias.shape[0]:
            for n in range(samples):
                copy_pair(Z, start + n * width, bias, f)
        else:
            _pack_edge(Z, start, bias, f, bias.shape[0], 1, width)
            for n in range(1, samples):
                copy_pair(Z, start + n * width, Z, start)


@part
def unpack_panels(out, Z, f0, f1):
    """out[n, f] = Z for a block of features."""
    once()
    width = panel_width(Z)
    N, F = out.shape
    target = out.reshape(-1)
    for f in range(f0, f1, width):
        start = (f - f0) * N
        for n in range(N):
            if f + width <= f1:
                copy_pair(target, n * F + f, Z, start + n * width)
            else:
                for k in range(f1 - f):
                    target[n * F + f + k] = Z[start + n * width + k]


@part
def _copy_edge(edge, M, block, height):
    """The last columns of some rows of M, with zeros up to `height` rows of a panel."""
    once()
    (S, D, c, combined), (p, _, q0, q1), rows = M, block, block.p1 - block.p0
    width = panel_width(edge)
    for r in range(height):
        for k in range(width):
            value = edge.dtype.type(0)
            if r < rows and k < q1 - q0:
                value = S[p + r, q0 + k] + c * D[p + r, q0 + k] if combined else S[p + r, q0 + k]
            edge[r * width + k] = value


@part
def add_sums(tiles, M, block, L, Z, samples, edge, ahead):
    """Z[n, q] += Σ_p L[n, p] M[p, q] for a block of M whose rows begin a group, and columns a block; Z begins with it.

    Meanwhile the rows of M's shape from the place `ahead` on are fetched, or where that is negative the next rows of M.
    """
    (S, D, c, combined), (p0, p1, q0, q1) = M, block
    weight, delta, following = S.reshape(-1), D.reshape(-1), ahead.array.reshape(-1)
    other, place = following, ahead.at
    pitch, width = S.shape[1], panel_width(Z)
    panels, at = (q1 - q0) // width, p0 * S.shape[1] + q0
    if place < 0:
        following, other, place = weight, delta, at + GROUP * pitch
    groups, variant, rest = (p1 - p0) // GROUP, 2 + combined, (p1 - p0) % GROUP
    begin, target = L.at + p0 * samples, At(Z, 0)
    rows, counts, fetched = (
        Rows(weight, delta, at, pitch),
        Counts(samples, panels, groups),
        PairAhead(following, other, place),
    )
    sum_rows(tiles[0], variant, rows, c, At(L.array, begin), target, counts, fetched)
    for r in range(rest):
        row, of = at + (groups * GROUP + r) * pitch, At(L.array, begin + groups * GROUP * samples + r)
        rows, counts, fetched = (
            Rows(weight, delta, row, pitch),
            Counts(samples, panels, 1),
            PairAhead(weight, delta, row),
        )
        sum_rows(tiles[0], combined, rows, c, of, target, counts, fetched)
    if panels * width < q1 - q0:
        rows, counts, fetched = Rows(edge, edge, 0, width), Counts(samples, 1, 1), PairAhead(edge, edge, 0)
        for p in range(p0, p1, GROUP):
            _copy_edge(edge, M, Block(p, min(p + GROUP, p1), q0 + panels * width, q1), GROUP)
            to, of = At(Z, panels * width * samples), At(L.array, L.at + p * samples)
            sum_rows(tiles[0], 2, rows, c, of, to, counts, fetched)


@part
def _dot_tiles(tile, rows, c, combined, height, R, Z, counts, ahead):
    """Z[n, p] += Σ_q M[p, q] R[n, q] for all samples and `height` rows, 1 or `DOT_ROWS`."""
    width, samples = panel_width(Z.array), counts.samples
    count = (samples + DOT_SAMPLES - 1) // DOT_SAMPLES
    n = 0
    for t in range(count):
        size = (samples - n + count - t - 1) // (count - t)
        variant = 2 * ((DOT_SAMPLES if height == DOT_ROWS else 0) + size - 1) + combined
        of, to = At(R.array, R.at + n * width), At(Z.array, Z.at + n * width)
        dot_rows(tile, variant, rows, c, of, to, counts, ahead)
        n += size


@part
def add_dots(tiles, M, block, R, Z, samples, scratch, ahead):
    """Z[n, p + r] += Σ_q M[p + r, q] R[n, q] for a block of at most `DOT_ROWS` rows of M, all in one panel of Z.

    Meanwhile the elements of `ahead` are fetched, row by row of M's length. Where several tiles of samples need the
    rows W + c D, these are combined in scratch once.
    """
    (S, D, c, combined), (p, p1, q0, q1) = M, block
    weight, delta = S.reshape(-1), D.reshape(-1)
    pitch, width, rows = S.shape[1], panel_width(Z.array), p1 - p
    panels, at = (q1 - q0) // width, p * S.shape[1] + q0
    counts, R = Counts(samples, panels, 0), At(R.array, R.at + q0 * samples)
    fetched = RowsAhead(ahead.array, ahead.at, pitch)
    if panels and combined and samples > DOT_SAMPLES:
        row_pitch = panels * width
        rows_held = scratch[COMBINED:]
        for r in range(rows):
            begin = at + r * pitch
            combine_row(
                rows_held[r * row_pitch : (r + 1) * row_pitch],
                weight[begin : begin + row_pitch], delta[begin : begin + row_pitch], c,
            )  # fmt: skip
        _add_dots(tiles, Rows(rows_held, rows_held, 0, row_pitch), c, False, rows, R, Z, counts, fetched)
    elif panels:
        _add_dots(tiles, Rows(weight, delta, at, pitch), c, combined, rows, R, Z, counts, fetched)
    if panels * width < q1 - q0:
        _copy_edge(scratch, M, Block(p, p1, q0 + panels * width, q1), DOT_ROWS)
        edge, of = Rows(scratch, scratch, 0, width), At(R.array, R.at + panels * width * samples)
        _dot_tiles(tiles[1], edge, c, False, DOT_ROWS, of, Z, Counts(samples, 1, 0), RowsAhead(scratch, 0, 0))


@part
def _add_dots(tiles, matrix, c, combined, rows, R, Z, counts, ahead):
    if rows == DOT_ROWS:
        _dot_tiles(tiles[1], matrix, c, combined, rows, R, Z, counts, ahead)
        return
    array, other, at, pitch = matrix
    for r in range(rows):
        row, to = Rows(array, other, at + r * pitch, pitch), At(Z.array, Z.at + r)
        _dot_tiles(tiles[1], row, c, combined, 1, R, to, counts, RowsAhead(ahead.array, 0, 0))


@part
def _move_edge(edge, S, block, back):
    """Copy the last columns of some rows to the edge, or back."""
    once()
    (p, p1, q0, q1), width = block, panel_width(edge)
    for r in range(p1 - p):
        for k in range(q1 - q0):
            if back:
                S[p + r, q0 + k] = edge[r * width + k]
            else:
                edge[r * width + k] = S[p + r, q0 + k]


@part
def use_gradient(tiles, kind, target, block, outer, rule, edges, ahead):
    """Use G of a group of rows, a block of both arrays of the target, as `update_rows` says.

    Meanwhile the following rows of both arrays `ahead` are fetched, of the same shape.
    """
    (V, D), (p, p1, q0, q1), samples = target, block, outer.samples
    velocity, delta = V.reshape(-1), D.reshape(-1)
    pitch, width, rows = V.shape[1], panel_width(outer.L.array), p1 - p
    panels, at = (q1 - q0) // width, p * V.shape[1] + q0
    L, R = At(outer.L.array, outer.L.at + p * samples), At(outer.R.array, outer.R.at + q0 * samples)
    counts = Counts(samples, panels, 0)
    if rows == GROUP:
        following = PairAhead(ahead.V.reshape(-1), ahead.D.reshape(-1), at + GROUP * pitch)
        update_rows(tiles[2], 3 + kind, Rows(velocity, delta, at, pitch), L, R, counts, rule, following)
    else:
        for r in range(rows):
            row, of = at + r * pitch, At(L.array, L.at + r)
            here, none = Rows(velocity, delta, row, pitch), PairAhead(velocity, delta, row)
            update_rows(tiles[2], kind, here, of, R, counts, rule, none)
    if panels * width < q1 - q0:
        rest = Block(p, p1, q0 + panels * width, q1)
        _move_edge(edges.V, V, rest, False)
        if kind == MOMENTUM:
            _move_edge(edges.D, D, rest, False)
        of, here = At(R.array, R.at + panels * width * samples), Rows(edges.V, edges.D, 0, width)
        none = PairAhead(edges.V, edges.D, 0)
        update_rows(tiles[2], 3 + kind, here, L, of, Counts(samples, 1, 0), rule, none)
        _move_edge(edges.V, V, rest, True)
        if kind == MOMENTUM:
            _move_edge(edges.D, D, rest, True)


@part
def use_gradients(task, block, outer, edges):
    """Use G of a group of rows wherever a sweep asks for it."""
    kind = task.gx.dtype.type
    zero, tiles = kind(0), task.row_tiles
    # The input gradient reads the rows of S and D before the update does.
    ahead, weights = Pair(task.S if task.input_gradient else task.V, task.D), Pair(task.S, task.S)
    if task.has_delta and task.update:
        rule = Rule(kind(task.momentum), kind((1 - task.momentum) * task.c), kind(task.delta_lr))
        use_gradient(tiles, MOMENTUM, Pair(task.V, task.D), block, outer, rule, edges, ahead)
    elif task.has_delta:
        rule = Rule(zero, kind(task.c), zero)
        use_gradient(tiles, STORE, Pair(task.dD, task.dD), block, outer, rule, edges, Pair(task.S, task.D))
    if task.train and task.update:
        use_gradient(tiles, DESCEND, weights, block, outer, Rule(zero, kind(-task.lr), zero), edges, weights)
    elif task.train:
        use_gradient(tiles, STORE, Pair(task.dW, task.dW), block, outer, Rule(zero, kind(1), zero), edges, weights)


@part
def span_of(samples, array):
    """Features of packed samples that stay in the level-2 cache, a multiple of the quantum."""
    unit = quantum(array)
    return min(max(SPAN * 4 // array.itemsize // samples // unit, 512 // unit, 1), LONGEST // unit) * unit


@part
def block_of(features, samples, workers, Z):
    """Features of a job: four jobs for each worker unless blocks become shorter than `SHORT`; as many as Z can hold."""
    unit = quantum(Z)
    pieces = max(min(4 * workers, features // SHORT), min(workers, features // unit), 1)
    if pieces > workers:
        pieces = pieces // workers * workers
    return max(min(padded((features + pieces - 1) // pieces, Z), Z.shape[0] // samples // unit * unit), unit)


@part
def sum_jobs(rows, workers):
    """Jobs that sums down so many rows are cut into: two for each worker, so that one that is held up can be helped."""
    return max(min(2 * workers, rows // GROUP), 1) if workers > 1 else 1


@part
def sum_block(rows, jobs):
    """Rows of a job of sums: whole groups."""
    return max((rows + jobs * GROUP - 1) // (jobs * GROUP), 1) * GROUP


@part
def add_partial_sums(packed, at, size, jobs, f0, f1, samples):
    """Add to the sums of the first job those of the others, `size` elements apart, for a block of features."""
    begin, length = at + f0 * samples, padded(f1 - f0, packed) * samples
    for start in range(begin, begin + length, samples * PIECE):
        end = min(start + samples * PIECE, begin + length)
        total = packed[start:end]
        for job in range(1, jobs):
            accumulate_row(total, packed[start + job * size : end + job * size])


@part
def low_job(tiles, F, features, scaling, R, low, groups, r0, edge):
    """low[n, r] = s Σ_f R[n, f] F[r, f] for up to `DOT_ROWS` r from r0 on, as rows and in groups.

    F in rows of `features`; R in panels; low [N, rank]; what fills up the last group is set to zero.
    """
    N, rank = low.shape
    rows, width = min(DOT_ROWS, rank - r0), panel_width(R.array)
    totals = edge[DOT_ROWS * width :]
    for n in range(N):
        for r in range(DOT_ROWS):
            totals[n * width + r] = 0
    matrix, zero = F.array[F.at : F.at + rank * features].reshape(rank, features), low.dtype.type(0)
    ahead, block = At(F.array, F.at + (r0 + rows) * features), Block(r0, r0 + rows, 0, features)
    add_dots(tiles, plain(matrix), block, R, At(totals, 0), N, edge, ahead)
    for r in range(r0, r0 + rows):
        at = groups.at + place(r, N, GROUP)
        for n in range(N):
            low[n, r] = groups.array[at + n * GROUP] = scaling * totals[n * width + r - r0]
    for r in range(rank, padded(rank, R.array) if r0 + rows == rank else rank):
        at = groups.at + place(r, N, GROUP)
        for n in range(N):
            groups.array[at + n * GROUP] = zero
