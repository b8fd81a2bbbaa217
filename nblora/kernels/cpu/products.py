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
LONG = 4 if VECTOR_BITS == 512 else 1
"""Blocks of C that a job may hold, in float32, so that an operand is packed once for all of them: half of a level-2
cache of 2 MB. At 2048 samples packing the weight for each 256 took a tenth of the time."""
PARTS = 5 + LONG


class Work(NamedTuple):
    """What one worker computes with: scratch of `PART` elements each, and the addresses of the register tiles."""

    a: object  # A in rows
    b: object  # B
    c: object  # blocks of C, (LONG·PART,)
    g: object  # a strip of a gradient, or a transposed block of C
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
        scratch[5 * PART :],
        scratch[2 * PART : 3 * PART],
        scratch[3 * PART : 4 * PART],
        scratch[4 * PART : 5 * PART],
        tile_rows,
        tile_steps,
    )


@part
def block_at(start, here, size):
    """Where in C the block of the samples or columns from `here` on lies, `start` being the first block's."""
    return (here - start) // size * PART


@part
def block_size(total, quantum, pieces, largest):
    """Size of equal blocks of `total`, at least `pieces` of them if possible, rounded up to a multiple of `quantum`."""
    pieces = max(pieces, (total + largest - 1) // largest, 1)
    size = (total + pieces - 1) // pieces
    return max(1, (size + quantum - 1) // quantum) * quantum


@part
def long_blocks(array):
    """Blocks of C that a job may hold in the dtype of the array."""
    return max(1, LONG * 4 // array.itemsize)


@part
def sample_blocks(samples, quantum, array):
    """How many samples make a block of C, a multiple of `quantum`, and how many a job, a multiple of that."""
    size = block_size(samples, quantum, 1, BLOCK)
    blocks = (samples + size - 1) // size
    jobs = max(1, (blocks + long_blocks(array) - 1) // long_blocks(array))
    return size, max(1, (blocks + jobs - 1) // jobs) * size


@part
def _multiply_rows(work, rows, columns, depth, c, first):
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
            tile(work.tile_rows, depth, height, vectors, work.a, a_at, work.b, b_at, c, at, C_STRIDE, not first)
            i += height


@part
def multiply_steps(work, i0, i1, columns, depth, g, first):
    """G[i - i0] (+)= A·B for the rows i0 <= i < i1 of A in steps, i0 a multiple of `TILE_ROWS`."""
    width = 2 * lanes(work.r)
    for i in range(i0, i1, TILE_ROWS):
        height = min(TILE_ROWS, i1 - i)
        for j in range(0, columns, width):
            vectors = 1 if 2 * (columns - j) <= width else 2
            at = (i - i0) * C_STRIDE + j
            a_at, b_at = i * DEPTH, j * DEPTH
            tile(work.tile_steps, depth, height, vectors, work.l, a_at, work.r, b_at, g, at, C_STRIDE, not first)


@part
def along_rows(work, first, L, n0, n1, size, S, D, scaling, combined, q0, q1, k0, k1):
    """C[n, q] (+)= Σ_p L[n, p] M[p, q] for n0 <= n < n1 in blocks of `size`, q0 <= q < q1, k0 <= p < k1."""
    for k in range(k0, k1, DEPTH):
        end = min(k + DEPTH, k1)
        pack_columns(work.b, S, D, scaling, combined, k, end, q0, q1)
        for n in range(n0, n1, size):
            last = min(n + size, n1)
            pack_rows(work.a, L, L, scaling, False, n, last, k, end)
            _multiply_rows(work, last - n, q1 - q0, end - k, work.c[block_at(n0, n, size) :], first and k == k0)


@part
def across_rows(work, first, S, D, scaling, combined, p0, p1, R, n0, n1, size, k0, k1):
    """C[p, n] (+)= Σ_q M[p, q] R[n, q] for p0 <= p < p1, n0 <= n < n1 in blocks of `size`, k0 <= q < k1."""
    for k in range(k0, k1, DEPTH):
        end = min(k + DEPTH, k1)
        pack_rows(work.a, S, D, scaling, combined, p0, p1, k, end)
        for n in range(n0, n1, size):
            last = min(n + size, n1)
            pack_columns_transposed(work.b, R, k, end, n, last)
            _multiply_rows(work, p1 - p0, last - n, end - k, work.c[block_at(n0, n, size) :], first and k == k0)


@part
def factor_along_rows(work, first, L, n0, n1, size, F, q0, q1):
    """C[n, q] (+)= Σ_r L[n, r] F[q, r]: the low-rank term of the input gradient, F = A."""
    for k in range(0, F.shape[1], DEPTH):
        end = min(k + DEPTH, F.shape[1])
        pack_columns_transposed(work.b, F, k, end, q0, q1)
        for n in range(n0, n1, size):
            last = min(n + size, n1)
            pack_rows(work.a, L, L, work.a.dtype.type(0), False, n, last, k, end)
            _multiply_rows(work, last - n, q1 - q0, end - k, work.c[block_at(n0, n, size) :], first and k == 0)


@part
def factor_across_rows(work, first, F, p0, p1, R, n0, n1, size):
    """C[p, n] (+)= Σ_r F[r, p] R[n, r]: the low-rank term of the transposed forward, F = B."""
    for k in range(0, F.shape[0], DEPTH):
        end = min(k + DEPTH, F.shape[0])
        pack_rows_transposed(work.a, F, p0, p1, k, end)
        for n in range(n0, n1, size):
            last = min(n + size, n1)
            pack_columns_transposed(work.b, R, k, end, n, last)
            _multiply_rows(work, p1 - p0, last - n, end - k, work.c[block_at(n0, n, size) :], first and k == 0)


@part
def gradient(work, L, p0, p1, R, q0, q1, size):
    """C[p, q] = Σ_n L[n, p] R[n, q] for p0 <= p < p1, q0 <= q < q1 in blocks of `size`, over every sample."""
    n = 0
    while n == 0 or n < L.shape[0]:
        end = min(n + DEPTH, L.shape[0])
        pack_steps(work.l, L, p0, p1, n, end)
        for q in range(q0, q1, size):
            last = min(q + size, q1)
            pack_columns(work.r, R, R, work.r.dtype.type(0), False, n, end, q, last)
            multiply_steps(work, 0, p1 - p0, last - q, end - n, work.c[block_at(q0, q, size) :], n == 0)
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
