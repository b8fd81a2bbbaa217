"""What forward and backward do with few samples, on the tiles that read weights where they lie (`rowtiles`).

Forward and backward, Dense and FullyConnected: every job owns some rows of the stored matrices, and the worker that got
them once is the first to be offered them again, so W, D and V stay in the caches of its own core. Dots along rows are
parts of the result Z at once (outputs of FullyConnected, inputs of Dense); sums down the rows (the other two) are kept
apart for each job and added up in the order of jobs, so that results repeat bit for bit. Z is packed in panels.
"""

from nblora.kernels.common.jit import part
from nblora.kernels.common.machine import GROUP
from nblora.kernels.common.microkernel import once
from nblora.kernels.common.rows import accumulate_row, combine_row
from nblora.kernels.common.vectors import copy_group, copy_pair

from .products import panel_width
from .rowtiles import (
    DESCEND,
    DOT_ROWS,
    DOT_SAMPLES,
    MOMENTUM,
    STORE,
    dot_rows,
    sum_rows,
    update_rows,
)

FEW = 64
"""Samples up to which weights are read where they lie."""
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
def _copy_edge(edge, S, D, c, combined, p, rows, height, q0, q1):
    """M[p + r, q] for `rows` rows and the last columns, with zeros up to `height` rows of a panel."""
    once()
    width = panel_width(edge)
    for r in range(height):
        for k in range(width):
            value = edge.dtype.type(0)
            if r < rows and k < q1 - q0:
                value = S[p + r, q0 + k] + c * D[p + r, q0 + k] if combined else S[p + r, q0 + k]
            edge[r * width + k] = value


@part
def add_sums(tiles, S, D, c, combined, p0, p1, q0, q1, L, l_at, Z, samples, edge, ahead, ahead_at):
    """Z[n, q] += Σ_p L[n, p] M[p, q] for p0 <= p < p1, q0 <= q < q1; p0 begins a group, q0 a block.

    Meanwhile the rows of `ahead` from `ahead_at` on are fetched, or where that is negative the next rows of M.
    """
    weight, delta, following = S.reshape(-1), D.reshape(-1), ahead.reshape(-1)
    other = following
    pitch, width = S.shape[1], panel_width(Z)
    panels, at = (q1 - q0) // width, p0 * S.shape[1] + q0
    if ahead_at < 0:
        following, other, ahead_at = weight, delta, at + GROUP * pitch
    groups, variant, rest = (p1 - p0) // GROUP, 2 + combined, (p1 - p0) % GROUP
    begin = l_at + p0 * samples
    sum_rows(
        tiles[0], variant, weight, delta, at, pitch, c, L, begin, Z, 0, samples, panels, groups,
        following, other, ahead_at,
    )  # fmt: skip
    for r in range(rest):
        row, of = at + (groups * GROUP + r) * pitch, begin + groups * GROUP * samples + r
        sum_rows(tiles[0], combined, weight, delta, row, pitch, c, L, of, Z, 0, samples, panels, 1, weight, delta, row)
    if panels * width < q1 - q0:
        for p in range(p0, p1, GROUP):
            _copy_edge(edge, S, D, c, combined, p, min(GROUP, p1 - p), GROUP, q0 + panels * width, q1)
            to, of = panels * width * samples, l_at + p * samples
            sum_rows(tiles[0], 2, edge, edge, 0, width, c, L, of, Z, to, samples, 1, 1, edge, edge, 0)


@part
def _dot_tiles(
    tile, W, D, at, pitch, c, combined, height, R, r_at, Z, z_at, samples, panels, ahead, ahead_at, ahead_pitch
):
    width = panel_width(Z)
    count = (samples + DOT_SAMPLES - 1) // DOT_SAMPLES
    n = 0
    for t in range(count):
        size = (samples - n + count - t - 1) // (count - t)
        variant = 2 * ((DOT_SAMPLES if height == DOT_ROWS else 0) + size - 1) + combined
        to = z_at + n * width
        dot_rows(
            tile, variant, W, D, at, pitch, c, R, r_at + n * width, Z, to, samples, panels,
            ahead, ahead_at, ahead_pitch,
        )  # fmt: skip
        n += size


@part
def add_dots(tiles, S, D, c, combined, p, rows, q0, q1, R, r_at, Z, z_at, samples, scratch, ahead, ahead_at):
    """Z[n, p + r] += Σ_q M[p + r, q] R[n, q] for r < rows <= `DOT_ROWS`, q0 <= q < q1, all in one panel of Z at `z_at`.

    Meanwhile the elements of `ahead` from `ahead_at` on are fetched, row by row of M's length. Where several tiles of
    samples need the rows W + c D, these are combined in scratch once.
    """
    weight, delta = S.reshape(-1), D.reshape(-1)
    pitch, width = S.shape[1], panel_width(Z)
    panels, at, row_pitch = (q1 - q0) // width, p * S.shape[1] + q0, S.shape[1]
    r_at += q0 * samples
    if panels and combined and samples > DOT_SAMPLES:
        row_pitch = panels * width
        rows_held = scratch[COMBINED:]
        for r in range(rows):
            begin = at + r * pitch
            combine_row(
                rows_held[r * row_pitch : (r + 1) * row_pitch],
                weight[begin : begin + row_pitch], delta[begin : begin + row_pitch], c,
            )  # fmt: skip
        _add_dots(
            tiles, rows_held, rows_held, 0, row_pitch, c, False, rows, R, r_at, Z, z_at, samples, panels,
            ahead, ahead_at, pitch,
        )  # fmt: skip
    elif panels:
        _add_dots(
            tiles, weight, delta, at, pitch, c, combined, rows, R, r_at, Z, z_at, samples, panels,
            ahead, ahead_at, pitch,
        )  # fmt: skip
    if panels * width < q1 - q0:
        _copy_edge(scratch, S, D, c, combined, p, rows, DOT_ROWS, q0 + panels * width, q1)
        r_at += panels * width * samples
        _dot_tiles(
            tiles[1], scratch, scratch, 0, width, c, False, DOT_ROWS, R, r_at, Z, z_at, samples, 1, scratch, 0, 0
        )  # fmt: skip


@part
def _add_dots(
    tiles, W, D, at, pitch, c, combined, rows, R, r_at, Z, z_at, samples, panels, ahead, ahead_at, ahead_pitch
):
    if rows == DOT_ROWS:
        _dot_tiles(
            tiles[1], W, D, at, pitch, c, combined, rows, R, r_at, Z, z_at, samples, panels,
            ahead, ahead_at, ahead_pitch,
        )  # fmt: skip
        return
    for r in range(rows):
        _dot_tiles(
            tiles[1], W, D, at + r * pitch, pitch, c, combined, 1, R, r_at, Z, z_at + r, samples, panels, ahead, 0, 0
        )  # fmt: skip


@part
def _move_edge(edge, S, p, rows, q0, q1, back):
    """Copy the last columns of some rows to the edge, or back."""
    once()
    width = panel_width(edge)
    for r in range(rows):
        for k in range(q1 - q0):
            if back:
                S[p + r, q0 + k] = edge[r * width + k]
            else:
                edge[r * width + k] = S[p + r, q0 + k]


@part
def use_gradient(
    tiles, kind, V, D, p, rows, q0, q1, L, l_at, R, r_at, samples, momentum, gain, lr, edge, other_edge, ahead, other
):
    """Use G[p + r, q] = Σ_n L[n, p + r] R[n, q] for a group of rows and q0 <= q < q1, as `update_rows` says.

    Meanwhile the following rows of `ahead` and `other` are fetched, of the shape of V.
    """
    velocity, delta = V.reshape(-1), D.reshape(-1)
    following, beside = ahead.reshape(-1), other.reshape(-1)
    pitch, width = V.shape[1], panel_width(L)
    panels, at = (q1 - q0) // width, p * V.shape[1] + q0
    l_at += p * samples
    r_at += q0 * samples
    if rows == GROUP:
        update_rows(
            tiles[2], 3 + kind, velocity, delta, at, pitch, L, l_at, R, r_at, samples, panels, momentum, gain, lr,
            following, beside, at + GROUP * pitch,
        )  # fmt: skip
    else:
        for r in range(rows):
            row = at + r * pitch
            update_rows(
                tiles[2], kind, velocity, delta, row, pitch, L, l_at + r, R, r_at, samples, panels, momentum, gain, lr,
                velocity, delta, row,
            )  # fmt: skip
    if panels * width < q1 - q0:
        q = q0 + panels * width
        _move_edge(edge, V, p, rows, q, q1, False)
        if kind == MOMENTUM:
            _move_edge(other_edge, D, p, rows, q, q1, False)
        update_rows(
            tiles[2], 3 + kind, edge, other_edge, 0, width, L, l_at, R, r_at + panels * width * samples, samples, 1,
            momentum, gain, lr, edge, other_edge, 0,
        )  # fmt: skip
        _move_edge(edge, V, p, rows, q, q1, True)
        if kind == MOMENTUM:
            _move_edge(other_edge, D, p, rows, q, q1, True)


@part
def use_gradients(task, p, rows, q0, q1, L, l_at, R, r_at, samples, edge, other_edge):
    """Use G of a group of rows wherever a sweep asks for it."""
    kind = task.gx.dtype.type
    zero, one, tiles = kind(0), kind(1), task.row_tiles
    following = task.S if task.input_gradient else task.V  # the input gradient reads S and D before the update does
    if task.has_delta and task.update:
        momentum, gain, lr = kind(task.momentum), kind((1 - task.momentum) * task.c), kind(task.delta_lr)
        use_gradient(
            tiles, MOMENTUM, task.V, task.D, p, rows, q0, q1, L, l_at, R, r_at, samples, momentum, gain, lr,
            edge, other_edge, following, task.D,
        )  # fmt: skip
    elif task.has_delta:
        gain = kind(task.c)
        use_gradient(
            tiles, STORE, task.dD, task.dD, p, rows, q0, q1, L, l_at, R, r_at, samples, zero, gain, zero,
            edge, other_edge, task.S, task.D,
        )  # fmt: skip
    if task.train and task.update:
        use_gradient(
            tiles, DESCEND, task.S, task.S, p, rows, q0, q1, L, l_at, R, r_at, samples, zero, kind(-task.lr), zero,
            edge, other_edge, task.S, task.S,
        )  # fmt: skip
    elif task.train:
        use_gradient(
            tiles, STORE, task.dW, task.dW, p, rows, q0, q1, L, l_at, R, r_at, samples, zero, one, zero,
            edge, other_edge, task.S, task.S,
        )  # fmt: skip


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
def low_job(tiles, F, f_at, features, scaling, R, r_at, low, groups, groups_at, r0, edge):
    """low[n, r] = s Σ_f R[n, f] F[r, f] for up to `DOT_ROWS` r from r0 on, as rows and in groups.

    F in rows of `features`; R in panels; low [N, rank]; what fills up the last group is set to zero.
    """
    N, rank = low.shape
    rows, width = min(DOT_ROWS, rank - r0), panel_width(R)
    totals = edge[DOT_ROWS * width :]
    for n in range(N):
        for r in range(DOT_ROWS):
            totals[n * width + r] = 0
    matrix, zero = F[f_at : f_at + rank * features].reshape(rank, features), low.dtype.type(0)
    add_dots(
        tiles, matrix, matrix, zero, False, r0, rows, 0, features, R, r_at, totals, 0, N, edge,
        F, f_at + (r0 + rows) * features,
    )  # fmt: skip
    for r in range(r0, r0 + rows):
        at = groups_at + place(r, N, GROUP)
        for n in range(N):
            low[n, r] = groups[at + n * GROUP] = scaling * totals[n * width + r - r0]
    for r in range(rank, padded(rank, R) if r0 + rows == rank else rank):
        at = groups_at + place(r, N, GROUP)
        for n in range(N):
            groups[at + n * GROUP] = zero
