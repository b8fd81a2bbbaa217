"""Blocks of matrix products: pack a depth of both operands, run the register tile over them, go on along the depth.

A block of C has at most `BLOCK` rows and columns and lies in scratch with `C_STRIDE`; `first`: C holds nothing yet.
Every product of forward and backward is one of three, with S [P, Q] a stored matrix and M = S + c D:

    along rows      C[n, q] = Σ_p L[n, p] M[p, q]      forward of Dense, input gradient of FullyConnected
    across rows     C[p, n] = Σ_q M[p, q] R[n, q]      the transposed forward of FullyConnected, input gradient of Dense
    gradient        C[p, q] = Σ_n L[n, p] R[n, q]      of weights, delta and the factors

The low-rank term is a second call on the same C: `rank` more steps of the inner dimension.
"""

from typing import NamedTuple

from ..jit import part
from .machine import BLOCK, DEPTH, ROW_STRIDE, TILE_ROWS, VECTOR_BITS
from .microkernel import lanes, tile
from .packing import pack_columns, pack_columns_transposed, pack_rows, pack_rows_transposed, pack_steps
from .vectors import prefetch, transpose_square

C_STRIDE = BLOCK + VECTOR_BITS // 16
PART = C_STRIDE * (BLOCK + VECTOR_BITS // 16)
PARTS = 6


class Work(NamedTuple):
    """What one worker computes with: scratch of `PART` elements each, and the addresses of the register tiles."""

    a: object  # A in rows
    b: object  # B
    c: object  # a block of C
    g: object  # a block of a gradient, or of a transposed C
    l: object  # A in steps
    r: object  # B of a gradient
    tile_rows: int
    tile_steps: int


@part
def scratch_work(scratch, tile_rows, tile_steps):
    """The `Work` on a worker's row of scratch, (PARTS·PART,)."""
    return Work(
        scratch[:PART],
        scratch[PART : 2 * PART],
        scratch[2 * PART : 3 * PART],
        scratch[3 * PART : 4 * PART],
        scratch[4 * PART : 5 * PART],
        scratch[5 * PART : 6 * PART],
        tile_rows,
        tile_steps,
    )


@part
def block_size(total, quantum, pieces, largest):
    """Size of equal blocks of `total`, at least `pieces` of them if possible, rounded up to a multiple of `quantum`."""
    pieces = max(pieces, (total + largest - 1) // largest, 1)
    size = (total + pieces - 1) // pieces
    return max(1, (size + quantum - 1) // quantum) * quantum


class Ahead(NamedTuple):
    """What will be needed next, fetched while tiles are computed: rows i0 <= i < i1, columns j0 <= j < j1 of S and D.

    Packing from the level-3 cache takes 0.32 ns an element of W + c D, from the level-2 cache 0.13 ns.
    """

    S: object
    D: object
    i0: int
    i1: int
    j0: int
    j1: int


@part
def nothing_ahead(matrix):
    """An empty `Ahead`."""
    return Ahead(matrix, matrix, 0, 0, 0, 0)


@part
def _fetch(ahead, share, shares):
    """Prefetch one of so many shares of what is ahead."""
    line = 64 // ahead.S.itemsize
    first, second = ahead.S.reshape(-1), ahead.D.reshape(-1)
    rows = ahead.i1 - ahead.i0
    for i in range(ahead.i0 + rows * share // shares, ahead.i0 + rows * (share + 1) // shares):
        start = i * ahead.S.shape[1]
        for at in range(start + ahead.j0, start + ahead.j1, line):
            prefetch(first, at)
            prefetch(second, at)


@part
def _multiply_rows(work, rows, columns, depth, first, ahead):
    """C (+)= A·B, A in rows."""
    width = 2 * lanes(work.b)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    shares = tiles * ((columns + width - 1) // width)
    share = 0
    for j in range(0, columns, width):
        vectors = 1 if 2 * (columns - j) <= width else 2
        i = 0
        for t in range(tiles):
            height = (rows - i + tiles - t - 1) // (tiles - t)
            at = i * C_STRIDE + j
            a_at, b_at = i * ROW_STRIDE, j * DEPTH
            _fetch(ahead, share, shares)
            tile(work.tile_rows, depth, height, vectors, work.a, a_at, work.b, b_at, work.c, at, C_STRIDE, not first)
            i += height
            share += 1


@part
def multiply_steps(work, i0, i1, columns, depth, first, ahead):
    """G[i - i0] (+)= A·B for the rows i0 <= i < i1 of A in steps, i0 a multiple of `TILE_ROWS`."""
    width = 2 * lanes(work.r)
    panels = (columns + width - 1) // width
    shares = (i1 - i0 + TILE_ROWS - 1) // TILE_ROWS * panels
    share = 0
    for i in range(i0, i1, TILE_ROWS):
        height = min(TILE_ROWS, i1 - i)
        for j in range(0, columns, width):
            vectors = 1 if 2 * (columns - j) <= width else 2
            at = (i - i0) * C_STRIDE + j
            a_at, b_at = i * DEPTH, j * DEPTH
            _fetch(ahead, share, shares)
            tile(work.tile_steps, depth, height, vectors, work.l, a_at, work.r, b_at, work.g, at, C_STRIDE, not first)
            share += 1


@part
def along_rows(work, first, L, n0, n1, S, D, scaling, combined, q0, q1, k0, k1, ahead):
    """C[n, q] (+)= Σ_p L[n, p] M[p, q] for n0 <= n < n1, q0 <= q < q1, k0 <= p < k1, k1 - k0 <= `DEPTH`."""
    pack_rows(work.a, L, L, scaling, False, n0, n1, k0, k1)
    pack_columns(work.b, S, D, scaling, combined, k0, k1, q0, q1)
    _multiply_rows(work, n1 - n0, q1 - q0, k1 - k0, first, ahead)


@part
def across_rows(work, first, S, D, scaling, combined, p0, p1, R, n0, n1, k0, k1, ahead):
    """C[p, n] (+)= Σ_q M[p, q] R[n, q] for p0 <= p < p1, n0 <= n < n1, k0 <= q < k1, k1 - k0 <= `DEPTH`."""
    pack_rows(work.a, S, D, scaling, combined, p0, p1, k0, k1)
    pack_columns_transposed(work.b, R, k0, k1, n0, n1)
    _multiply_rows(work, p1 - p0, n1 - n0, k1 - k0, first, ahead)


@part
def matrix_along_rows(work, first, L, n0, n1, S, D, scaling, combined, q0, q1):
    """C[n, q] (+)= Σ_p L[n, p] M[p, q] over every p, M fetched ahead."""
    inner = S.shape[0]
    for k in range(0, inner, DEPTH):
        end = min(k + DEPTH, inner)
        ahead = Ahead(S, D, end, min(end + DEPTH, inner), q0, q1)
        along_rows(work, first and k == 0, L, n0, n1, S, D, scaling, combined, q0, q1, k, end, ahead)


@part
def matrix_across_rows(work, first, S, D, scaling, combined, p0, p1, R, n0, n1):
    """C[p, n] (+)= Σ_q M[p, q] R[n, q] over every q, M fetched ahead."""
    inner = S.shape[1]
    for k in range(0, inner, DEPTH):
        end = min(k + DEPTH, inner)
        ahead = Ahead(S, D, p0, p1, end, min(end + DEPTH, inner))
        across_rows(work, first and k == 0, S, D, scaling, combined, p0, p1, R, n0, n1, k, end, ahead)


@part
def factor_along_rows(work, first, L, n0, n1, F, q0, q1):
    """C[n, q] (+)= Σ_r L[n, r] F[q, r]: the low-rank term of the input gradient, F = A."""
    for k in range(0, F.shape[1], DEPTH):
        end = min(k + DEPTH, F.shape[1])
        pack_rows(work.a, L, L, work.a.dtype.type(0), False, n0, n1, k, end)
        pack_columns_transposed(work.b, F, k, end, q0, q1)
        _multiply_rows(work, n1 - n0, q1 - q0, end - k, first and k == 0, nothing_ahead(F))


@part
def factor_across_rows(work, first, F, p0, p1, R, n0, n1):
    """C[p, n] (+)= Σ_r F[r, p] R[n, r]: the low-rank term of the transposed forward, F = B."""
    for k in range(0, F.shape[0], DEPTH):
        end = min(k + DEPTH, F.shape[0])
        pack_rows_transposed(work.a, F, p0, p1, k, end)
        pack_columns_transposed(work.b, R, k, end, n0, n1)
        _multiply_rows(work, p1 - p0, n1 - n0, end - k, first and k == 0, nothing_ahead(F))


@part
def gradient(work, L, p0, p1, R, q0, q1):
    """G[p, q] = Σ_n L[n, p] R[n, q] for p0 <= p < p1, q0 <= q < q1, over every sample."""
    n = 0
    while n == 0 or n < L.shape[0]:
        end = min(n + DEPTH, L.shape[0])
        pack_steps(work.l, L, p0, p1, n, end)
        pack_columns(work.r, R, R, work.r.dtype.type(0), False, n, end, q0, q1)
        multiply_steps(work, 0, p1 - p0, q1 - q0, end - n, n == 0, nothing_ahead(L))
        n += DEPTH


@part
def transpose_block(target, source, rows, columns):
    """target[j, i] = source[i, j], both blocks with `C_STRIDE`."""
    length = lanes(target)
    for i in range(0, rows, length):
        for j in range(0, columns, length):
            transpose_square(target, j * C_STRIDE + i, C_STRIDE, source, i * C_STRIDE + j, C_STRIDE)


@part
def store_block(out, n0, n1, j0, j1, c, scaling):
    """out[n, j] = scaling·C[n - n0, j - j0]."""
    for n in range(n1 - n0):
        row = out[n0 + n, j0:j1]
        block = c[n * C_STRIDE : n * C_STRIDE + j1 - j0]
        for j in range(row.shape[0]):
            row[j] = scaling * block[j]
