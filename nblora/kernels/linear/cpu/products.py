"""Products of samples with a matrix, C = L M + U F, by jobs of some samples and some columns.

M(k, j) is S[k, j] + c·D[k, j], or S[j, k] + c·D[j, k] where it is read `across`: Dense reads W along its rows forward
and across them for the input gradient, FullyConnected the other way round, and nothing else differs. U F is the
low-rank term: its inner dimension is behind M's, as more steps of the same sums.

A job packs its columns of M and F once, in panels of B for the register tile; they stay in the level-2 cache. L and U
are read where they lie and C is written where it belongs, straight from the tile. The first block of samples packs each
panel just before it is used, while the tiles fetch what the next one is packed from; in other blocks they fetch the
samples of the block that follows.
"""

from typing import NamedTuple

from nblora.kernels.common.jit import part
from nblora.kernels.common.machine import DEPTH, TILE_ROWS
from nblora.kernels.common.microkernel import At, Tile, lanes, once
from nblora.kernels.common.rows import accumulate_row, copy_row

from .packing import pack_across, pack_columns, plain
from .work import C_STRIDE, PART, Fetch, pace_of, panel_width, tile_at

PANELS = 1 << 19
"""Bytes of packed columns that a job holds, half of a level-2 cache of 1 MB."""
WIDE = 4
"""Panels of a job: so many share what it reads of L."""
ROWS = 4 * TILE_ROWS
"""Samples of a block: with each panel it is multiplied before the next panel is."""
SAMPLES = 512
"""Samples of a job, or more, where there are many: packing is then a hundredth of it."""
ALIASING = 4096
"""Rows of so many bytes, or of multiples, fall into one set of the level-1 cache, and are copied."""


class Product(NamedTuple):
    """C = L M + U F; where `inner` or `rank` is 0 that term is absent."""

    L: object  # (N, inner)
    M: object  # Matrix
    across: bool
    inner: int
    U: object  # (N, rank)
    F: object  # (rank, columns), or (columns, rank) where read across
    F_across: bool
    rank: int
    out: object  # (N, columns)


class Job(NamedTuple):
    """Samples and columns of C."""

    n0: int
    n1: int
    j0: int
    j1: int


class Grid(NamedTuple):
    """C in jobs of equal size, samples first."""

    samples: int  # of a job
    columns: int  # of a job
    groups: int  # jobs of the same columns
    jobs: int


@part
def depth_of(product):
    """Steps of the inner dimension, M's and F's, that are packed at a time: equal pieces that leave room for `WIDE`
    panels."""
    total = product.inner + product.rank
    most = PANELS // product.out.itemsize // (WIDE * panel_width(product.out))
    pieces = max(1, (total + most - 1) // most)
    return max(1, (total + pieces - 1) // pieces)


@part
def grid_of(product, depth, workers):
    """How C is cut into jobs: about `WIDE` panels of columns each, and so few samples that each worker has four jobs.

    Many samples share what a job packs. In all a multiple of the number of workers,
    so that none waits for the last.
    """
    (N, columns), width = product.out.shape, panel_width(product.out)
    panels = (columns + width - 1) // width
    most = max(1, PANELS // product.out.itemsize // (depth * width))
    pieces = max((panels + most - 1) // most, panels // WIDE, 1)
    groups = max(1, min((4 * workers + pieces - 1) // pieces, N // SAMPLES))
    if groups * pieces < workers:
        groups = max(1, min((workers + pieces - 1) // pieces, (N + ROWS - 1) // ROWS))
    while groups * pieces % workers and pieces < panels:
        pieces += 1
    samples = max(1, ((N + groups - 1) // groups + ROWS - 1) // ROWS * ROWS)
    groups, across = (N + samples - 1) // samples, (panels + pieces - 1) // pieces * width
    return Grid(samples, across, groups, groups * ((columns + across - 1) // across))


@part
def job_at(product, grid, index):
    """One of a grid's jobs."""
    N, columns = product.out.shape
    n0, j0 = index % grid.groups * grid.samples, index // grid.groups * grid.columns
    return Job(n0, min(N, n0 + grid.samples), j0, min(columns, j0 + grid.columns))


@part
def _pack_panel(work, product, b, length, k0, k1, j0, j1):
    """The steps k0 <= k < k1 of one panel of columns."""
    K = product.inner
    if k0 < K:
        end = min(k1, K)
        if product.across:
            pack_across(b, length, 0, product.M, k0, end, j0, j1, work.g)
        else:
            pack_columns(b, length, 0, product.M, k0, end, j0, j1)
    if k1 > K:
        r0, before, F = max(k0 - K, 0), max(K - k0, 0), plain(product.F)
        if product.F_across:
            pack_across(b, length, before, F, r0, k1 - K, j0, j1, work.g)
        else:
            pack_columns(b, length, before, F, r0, k1 - K, j0, j1)


@part
def _next_columns(product, k0, k1, j0, j1, stream):
    """What a panel of these columns is packed from, to be fetched."""
    S, D, _, _ = product.M
    end = max(k0, min(k1, product.inner))
    if product.across:
        return Fetch(S, D, j0, j1, k0, end, stream, 0, 0)
    return Fetch(S, D, k0, end, j0, j1, stream, 0, 0)


@part
def _copied(product, n0, n1, k0, k1, a):
    """Where rows of L are read: flat array, first element, pitch; copied to `a` if they fell into one cache set."""
    L, pitch = product.L, product.L.shape[1]
    if pitch * L.itemsize % ALIASING or k1 <= k0:
        return L.reshape(-1), n0 * pitch + k0, pitch
    apart = k1 - k0 + 2 * lanes(a)
    for n in range(n0, n1):
        at = (n - n0) * apart
        copy_row(a[at : at + k1 - k0], L[n, k0:k1])
    return a, 0, apart


@part
def block_rows(product, depth):
    """Samples of a block; fewer where copies of them would not fit."""
    apart = depth + 2 * lanes(product.out)
    return max(TILE_ROWS, min(ROWS, PART // apart // TILE_ROWS * TILE_ROWS))


@part
def _place_block(product, n0, n1, j0, j1, g, adds):
    """Copy a panel's last columns from scratch to C, or add them."""
    for n in range(n0, n1):
        row = g[(n - n0) * C_STRIDE : (n - n0) * C_STRIDE + j1 - j0]
        if adds:
            accumulate_row(product.out[n, j0:j1], row)
        else:
            copy_row(product.out[n, j0:j1], row)


@part
def multiply_block(work, product, job, n0, n1, k0, k1):
    """C (+)= the steps k0 <= k < k1 of the products, for the samples n0 <= n < n1 of a job; its first block packs."""
    once()
    out, columns, length, b = product.out, product.out.shape[1], k1 - k0, work.c
    flat, width, K = out.reshape(-1), panel_width(out), product.inner
    base, r0 = max(min(k1, K) - k0, 0), max(k0 - K, 0)
    rank = length - base
    parts = max(1, (base + DEPTH - 1) // DEPTH)
    a, a_at, a_pitch = _copied(product, n0, n1, k0, k0 + base, work.a)
    low, low_pitch = product.U.reshape(-1), product.U.shape[1]
    panels, tiles = (job.j1 - job.j0 + width - 1) // width, (n1 - n0 + TILE_ROWS - 1) // TILE_ROWS
    packs = n0 == job.n0
    ahead = Fetch(product.L, product.L, n1, min(n1 + n1 - n0, job.n1), k0, k0 + base, b, 0, 0)
    turns = tiles * parts
    pace = pace_of(ahead, base // parts, turns * panels)
    idle, call = turns * panels, 0
    for panel in range(panels):
        j0 = job.j0 + panel * width
        j1 = min(j0 + width, job.j1)
        b_at, vectors = panel * length * width, 1 if 2 * (j1 - j0) <= width else 2
        if packs:
            _pack_panel(work, product, b[b_at:], length, k0, k1, j0, j1)
            ahead = _next_columns(product, k0, k1, j1, min(j1 + width, job.j1), b)
            pace, idle, call = pace_of(ahead, base // parts, turns), turns, 0
        whole = 2 * (j1 - j0) == vectors * width
        c, c_at, stride, adds = (flat, n0 * columns + j0, columns, k0 > 0) if whole else (work.g, 0, C_STRIDE, False)
        for t in range(tiles):
            i = t * TILE_ROWS
            height, to = min(TILE_ROWS, n1 - n0 - i), At(c, c_at + i * stride)
            done = 0
            for p in range(parts):
                end = base * (p + 1) // parts
                size = Tile(end - done, stride, adds or p > 0, height, vectors, width, a_pitch)
                at, of = At(a, a_at + i * a_pitch + done), At(b, b_at + done * width)
                tile_at(work.tile_rows, size, at, of, to, ahead, pace, call)
                done, call = end, call + 1
            if rank:
                size = Tile(rank, stride, adds or base > 0, height, vectors, width, low_pitch)
                at, of = At(low, (n0 + i) * low_pitch + r0), At(b, b_at + base * width)
                tile_at(work.tile_rows, size, at, of, to, ahead, pace, idle)
        if not whole:
            _place_block(product, n0, n1, j0, j1, work.g, k0 > 0)


@part
def multiply_piece(work, product, job, depth, k0, k1):
    """C (+)= the steps k0 <= k < k1 for a whole job."""
    rows = block_rows(product, depth)
    for n0 in range(job.n0, job.n1, rows):
        multiply_block(work, product, job, n0, min(n0 + rows, job.n1), k0, k1)


@part
def multiply(work, product, job, depth):
    """C for a whole job; without any term it is zero."""
    total = product.inner + product.rank
    for k0 in range(0, total, depth):
        multiply_piece(work, product, job, depth, k0, min(k0 + depth, total))
    if total == 0:
        for n in range(job.n0, job.n1):
            product.out[n, job.j0 : job.j1] = 0
