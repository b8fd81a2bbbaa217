"""Blocks of matrix products: pack a depth of both operands, run the register tile over them, go on along the depth.

A block of C has at most `BLOCK` rows and columns and lies in scratch with `C_STRIDE`; `first`: C holds nothing yet.
Every product of forward and backward is one of three, with S [P, Q] a stored matrix and M = S + c D:

    along rows      C[n, q] = Σ_p L[n, p] M[p, q]      forward of Dense, input gradient of FullyConnected
    across rows     C[p, n] = Σ_q M[p, q] R[n, q]      the transposed forward of FullyConnected, input gradient of Dense
    gradient        C[p, q] = Σ_n L[n, p] R[n, q]      of weights, delta and the factors

The low-rank term is a second call on the same C: `rank` more steps of the inner dimension.
"""

from ..jit import kernel
from .machine import BLOCK, DEPTH, ROW_STRIDE, TILE_ROWS, VECTOR_BITS
from .microkernel import lanes, tile_rows, tile_steps
from .packing import pack_columns, pack_columns_transposed, pack_rows, pack_rows_transposed, pack_steps
from .vectors import transpose_square

C_STRIDE = BLOCK + VECTOR_BITS // 16
PART = C_STRIDE * (BLOCK + VECTOR_BITS // 16)
PARTS = 5
"""A worker's scratch is `PARTS` arrays of `PART` elements: A, B, C, a second C, and A in steps."""


@kernel
def block_size(total, quantum, pieces, largest):
    """Size of equal blocks of `total`, at least `pieces` of them if possible, rounded up to a multiple of `quantum`."""
    pieces = max(pieces, (total + largest - 1) // largest, 1)
    size = (total + pieces - 1) // pieces
    return max(1, (size + quantum - 1) // quantum) * quantum


@kernel
def _multiply_rows(a, rows, b, columns, depth, c, first):
    """C (+)= A·B, A in rows."""
    width = 2 * lanes(b)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for j in range(0, columns, width):
        vectors = 1 if 2 * (columns - j) <= width else 2
        i = 0
        for tile in range(tiles):
            height = (rows - i + tiles - tile - 1) // (tiles - tile)
            at = i * C_STRIDE + j
            tile_rows(depth, height, vectors, a, i * ROW_STRIDE, b, j * DEPTH, c, at, C_STRIDE, not first)
            i += height


@kernel
def _multiply_steps(a, rows, b, columns, depth, c, first):
    """C (+)= A·B, A in steps."""
    width = 2 * lanes(b)
    for j in range(0, columns, width):
        vectors = 1 if 2 * (columns - j) <= width else 2
        for i in range(0, rows, TILE_ROWS):
            height = min(TILE_ROWS, rows - i)
            at = i * C_STRIDE + j
            tile_steps(depth, height, vectors, a, i * DEPTH, b, j * DEPTH, c, at, C_STRIDE, not first)


@kernel
def along_rows(c, first, L, n0, n1, S, D, scaling, combined, q0, q1, k0, k1, a, b):
    """C[n, q] (+)= Σ_p L[n, p] M[p, q] for n0 <= n < n1, q0 <= q < q1, k0 <= p < k1."""
    for k in range(k0, k1, DEPTH):
        end = min(k + DEPTH, k1)
        pack_rows(a, L, L, scaling, False, n0, n1, k, end)
        pack_columns(b, S, D, scaling, combined, k, end, q0, q1)
        _multiply_rows(a, n1 - n0, b, q1 - q0, end - k, c, first and k == k0)


@kernel
def across_rows(c, first, S, D, scaling, combined, p0, p1, R, n0, n1, k0, k1, a, b):
    """C[p, n] (+)= Σ_q M[p, q] R[n, q] for p0 <= p < p1, n0 <= n < n1, k0 <= q < k1."""
    for k in range(k0, k1, DEPTH):
        end = min(k + DEPTH, k1)
        pack_rows(a, S, D, scaling, combined, p0, p1, k, end)
        pack_columns_transposed(b, R, k, end, n0, n1)
        _multiply_rows(a, p1 - p0, b, n1 - n0, end - k, c, first and k == k0)


@kernel
def factor_along_rows(c, first, L, n0, n1, F, q0, q1, a, b):
    """C[n, q] (+)= Σ_r L[n, r] F[q, r]: the low-rank term of the input gradient, F = A."""
    for k in range(0, F.shape[1], DEPTH):
        end = min(k + DEPTH, F.shape[1])
        pack_rows(a, L, L, a.dtype.type(0), False, n0, n1, k, end)
        pack_columns_transposed(b, F, k, end, q0, q1)
        _multiply_rows(a, n1 - n0, b, q1 - q0, end - k, c, first and k == 0)


@kernel
def factor_across_rows(c, first, F, p0, p1, R, n0, n1, a, b):
    """C[p, n] (+)= Σ_r F[r, p] R[n, r]: the low-rank term of the transposed forward, F = B."""
    for k in range(0, F.shape[0], DEPTH):
        end = min(k + DEPTH, F.shape[0])
        pack_rows_transposed(a, F, p0, p1, k, end)
        pack_columns_transposed(b, R, k, end, n0, n1)
        _multiply_rows(a, p1 - p0, b, n1 - n0, end - k, c, first and k == 0)


@kernel
def gradient(c, L, p0, p1, R, q0, q1, a, b):
    """C[p, q] = Σ_n L[n, p] R[n, q] for p0 <= p < p1, q0 <= q < q1, over every sample."""
    n = 0
    while n == 0 or n < L.shape[0]:
        end = min(n + DEPTH, L.shape[0])
        pack_steps(a, L, p0, p1, n, end)
        pack_columns(b, R, R, b.dtype.type(0), False, n, end, q0, q1)
        _multiply_steps(a, p1 - p0, b, q1 - q0, end - n, c, n == 0)
        n += DEPTH


@kernel
def transpose_block(target, source, rows, columns):
    """target[j, i] = source[i, j], both blocks with `C_STRIDE`."""
    length = lanes(target)
    for i in range(0, rows, length):
        for j in range(0, columns, length):
            transpose_square(target, j * C_STRIDE + i, C_STRIDE, source, i * C_STRIDE + j, C_STRIDE)


@kernel
def store_block(out, n0, n1, j0, j1, c, scaling):
    """out[n, j] = scaling·C[n - n0, j - j0]."""
    for n in range(n1 - n0):
        row = out[n0 + n, j0:j1]
        block = c[n * C_STRIDE : n * C_STRIDE + j1 - j0]
        for j in range(row.shape[0]):
            row[j] = scaling * block[j]
