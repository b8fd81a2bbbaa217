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
from .vectors import transpose_square

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


@part
def _multiply_rows(work, rows, columns, depth, first):
    """C (+)= A·B, A in rows."""
    width = 2 * lanes(work.b)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for j in range(0, columns, width):
        vectors = 1 if 2 * (columns - j) <= width else 2
        i = 0
        for t in range(tiles):
            height = (rows - i + tiles - t - 1) // (tiles - t)
            at = i * C_STRIDE + j
            a_at, b_at = i * ROW_STRIDE, j * DEPTH
            tile(work.tile_rows, depth, height, vectors, work.a, a_at, work.b, b_at, work.c, at, C_STRIDE, not first)
            i += height


@part
def multiply_steps(work, i0, i1, columns, depth, first):
    """G[i - i0] (+)= A·B for the rows i0 <= i < i1 of A in steps, i0 a multiple of `TILE_ROWS`."""
    width = 2 * lanes(work.r)
    for i in range(i0, i1, TILE_ROWS):
        height = min(TILE_ROWS, i1 - i)
        for j in range(0, columns, width):
            vectors = 1 if 2 * (columns - j) <= width else 2
            at = (i - i0) * C_STRIDE + j
            a_at, b_at = i * DEPTH, j * DEPTH
            tile(work.tile_steps, depth, height, vectors, work.l, a_at, work.r, b_at, work.g, at, C_STRIDE, not first)


@part
def along_rows(work, first, L, n0, n1, S, D, scaling, combined, q0, q1, k0, k1):
    """C[n, q] (+)= Σ_p L[n, p] M[p, q] for n0 <= n < n1, q0 <= q < q1, k0 <= p < k1."""
    for k in range(k0, k1, DEPTH):
        end = min(k + DEPTH, k1)
        pack_rows(work.a, L, L, scaling, False, n0, n1, k, end)
        pack_columns(work.b, S, D, scaling, combined, k, end, q0, q1)
        _multiply_rows(work, n1 - n0, q1 - q0, end - k, first and k == k0)


@part
def across_rows(work, first, S, D, scaling, combined, p0, p1, R, n0, n1, k0, k1):
    """C[p, n] (+)= Σ_q M[p, q] R[n, q] for p0 <= p < p1, n0 <= n < n1, k0 <= q < k1."""
    for k in range(k0, k1, DEPTH):
        end = min(k + DEPTH, k1)
        pack_rows(work.a, S, D, scaling, combined, p0, p1, k, end)
        pack_columns_transposed(work.b, R, k, end, n0, n1)
        _multiply_rows(work, p1 - p0, n1 - n0, end - k, first and k == k0)


@part
def factor_along_rows(work, first, L, n0, n1, F, q0, q1):
    """C[n, q] (+)= Σ_r L[n, r] F[q, r]: the low-rank term of the input gradient, F = A."""
    for k in range(0, F.shape[1], DEPTH):
        end = min(k + DEPTH, F.shape[1])
        pack_rows(work.a, L, L, work.a.dtype.type(0), False, n0, n1, k, end)
        pack_columns_transposed(work.b, F, k, end, q0, q1)
        _multiply_rows(work, n1 - n0, q1 - q0, end - k, first and k == 0)


@part
def factor_across_rows(work, first, F, p0, p1, R, n0, n1):
    """C[p, n] (+)= Σ_r F[r, p] R[n, r]: the low-rank term of the transposed forward, F = B."""
    for k in range(0, F.shape[0], DEPTH):
        end = min(k + DEPTH, F.shape[0])
        pack_rows_transposed(work.a, F, p0, p1, k, end)
        pack_columns_transposed(work.b, R, k, end, n0, n1)
        _multiply_rows(work, p1 - p0, n1 - n0, end - k, first and k == 0)


@part
def gradient(work, L, p0, p1, R, q0, q1):
    """G[p, q] = Σ_n L[n, p] R[n, q] for p0 <= p < p1, q0 <= q < q1, over every sample."""
    n = 0
    while n == 0 or n < L.shape[0]:
        end = min(n + DEPTH, L.shape[0])
        pack_steps(work.l, L, p0, p1, n, end)
        pack_columns(work.r, R, R, work.r.dtype.type(0), False, n, end, q0, q1)
        multiply_steps(work, 0, p1 - p0, q1 - q0, end - n, n == 0)
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
