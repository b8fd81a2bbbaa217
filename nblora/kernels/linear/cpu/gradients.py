"""Gradients of weights, delta and the factors, as register tiles: C[p, q] = Σ_n L[n, p] R[n, q].

A block of C has at most `BLOCK` rows and columns and lies in scratch with `C_STRIDE`. What every job reads is packed
once for all of them (`Packed`), samples and features in blocks; the rest by the one job that reads it. While tiles
compute they fetch what is needed next.
"""

from typing import NamedTuple

from nblora.kernels.common.jit import part
from nblora.kernels.common.machine import DEPTH, TILE_ROWS, VECTOR_BITS
from nblora.kernels.common.microkernel import At, Tile, lanes, once

from .packing import pack_columns, pack_steps, plain
from .work import C_STRIDE, Fetch, fetch_nothing, pace_of, panel_width, tile_at


class Packed(NamedTuple):
    """A gradient's operand, packed block by block of samples and of features."""

    array: object  # 1-D
    start: int  # where the first block begins
    blocks: int  # blocks of samples
    block: int  # elements of a block


@part
def panels_block(size):
    """Elements of a packed block of `size` samples and `DEPTH` features for a gradient, in columns or in steps."""
    return (DEPTH + VECTOR_BITS // 16) * size


@part
def packed_at(packed, samples, features):
    """Where the packed block of this number begins, counted in blocks of samples and of features."""
    return packed.start + (features * packed.blocks + samples) * packed.block


class Strip(NamedTuple):
    """`height` rows from `row` on of A in steps, times the columns of B; both in panels of `length`."""

    row: int
    height: int
    columns: int
    depth: int
    length: int


@part
def multiply_strip(work, l, r, strip, g, first, fetch, pace, call):
    """G (+)= A·B for a strip, to the place `g`."""
    once()
    i, height, columns, depth, length = strip
    width = panel_width(r)
    for j in range(0, columns, width):
        vectors = 1 if 2 * (columns - j) <= width else 2
        a_at, b_at = i * length, j * length
        size, to = Tile(depth, C_STRIDE, not first, height, vectors, width, 0), At(g.array, g.at + j)
        tile_at(work.tile_steps, size, At(l, a_at), At(r, b_at), to, fetch, pace, call)
        call += 1


@part
def multiply_steps(work, l, r, length, rows, columns, depth, g, first, fetch):
    """G (+)= A·B, A in steps; panels of `length`."""
    width = panel_width(r)
    panels = (columns + width - 1) // width
    pace = pace_of(fetch, depth, (rows + TILE_ROWS - 1) // TILE_ROWS * panels)
    for i in range(0, rows, TILE_ROWS):
        height, call = min(TILE_ROWS, rows - i), i // TILE_ROWS * panels
        strip = Strip(i, height, columns, depth, length)
        multiply_strip(work, l, r, strip, At(g, i * C_STRIDE), first, fetch, pace, call)


@part
def factor_gradient(work, T, r0, r1, X, q0, q1):
    """C[r, q] = Σ_n T[n, r] X[n, q] for r0 <= r < r1, q0 <= q < q1, over every sample; T is skinny.

    X is read where it lies: each of its elements is needed once. Only what is left of whole vectors is packed, since
    behind the last row nothing may be read.
    """
    once()
    N, pitch, source = X.shape[0], X.shape[1], X.reshape(-1)
    vector, width = lanes(work.c), panel_width(work.c)
    whole = (q1 - q0) // vector * vector
    panels = (q1 - q0 + width - 1) // width
    n = 0
    while n == 0 or n < N:
        end = min(n + DEPTH, N)
        none = fetch_nothing(X, work.r)
        ahead = Fetch(X, X, end, min(end + DEPTH, N), q0, q1, work.r, 0, 0)
        pack_steps(work.l, DEPTH, 0, T, r0, r1, n, end)
        if whole < q1 - q0:
            pack_columns(work.r, DEPTH, 0, plain(X), n, end, q0 + whole, q1)
        calls = (r1 - r0 + TILE_ROWS - 1) // TILE_ROWS * panels
        pace, idle = pace_of(ahead, end - n, calls), pace_of(none, end - n, 1)
        for i in range(0, r1 - r0, TILE_ROWS):
            height, call, at = min(TILE_ROWS, r1 - r0 - i), i // TILE_ROWS * panels, i * C_STRIDE
            a = At(work.l, i * DEPTH)
            for j in range(0, whole, width):
                vectors = 2 if j + width <= whole else 1
                size, b = Tile(end - n, C_STRIDE, n != 0, height, vectors, pitch, 0), At(source, n * pitch + q0 + j)
                tile_at(work.tile_steps, size, a, b, At(work.c, at + j), ahead, pace, call + j // width)
            if whole < q1 - q0:
                size, b = Tile(end - n, C_STRIDE, n != 0, height, 1, width, 0), At(work.r, 0)
                tile_at(work.tile_steps, size, a, b, At(work.c, at + whole), none, idle, 0)
        n += DEPTH
