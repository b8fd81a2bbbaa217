"""Packing: tiles of a matrix copied into the formats of the register tile, combined with the delta on the way.

M = S + c·D where `combined`, else S. "Rows" and "steps" are the A formats and "columns" the B format of `microkernel`;
a panel of B or of steps has `length` rows. Lanes beyond the matrix hold whatever was there or
follows in memory: they meet no real element.
"""

from typing import NamedTuple

from nblora.kernels.common.jit import part
from nblora.kernels.common.machine import ROW_STRIDE, TILE_ROWS
from nblora.kernels.common.microkernel import lanes, once
from nblora.kernels.common.rows import combine_row, copy_row
from nblora.kernels.common.vectors import combine_pair, copy_pair, copy_vector, transpose_square


class Matrix(NamedTuple):
    """M = S + c·D where `combined`, else S; both stored, 2-D."""

    S: object
    D: object
    c: object
    combined: bool


class Block(NamedTuple):
    """Rows and columns of a matrix."""

    p0: int
    p1: int
    q0: int
    q1: int


@part
def plain(S):
    """The matrix S alone."""
    return Matrix(S, S, S.dtype.type(0), False)


@part
def pack_rows(a, S, i0, i1, k0, k1):
    """a[i·ROW_STRIDE + k] = S[i0 + i, k0 + k]."""
    once()
    for i in range(i1 - i0):
        copy_row(a[i * ROW_STRIDE : i * ROW_STRIDE + k1 - k0], S[i0 + i, k0:k1])


@part
def pack_steps(a, length, before, S, i0, i1, k0, k1):
    """a[panel][before + k][i] = S[k0 + k, i0 + panel·TILE_ROWS + i].

    Whole vectors are copied: what they write beyond a step is overwritten by the next, what they read beyond a row is
    the start of the next row. Not so the last step, whose neighbour may be another worker's, and the very end of S.
    """
    once()
    vector = lanes(a)
    source = S.reshape(-1)
    last = source.shape[0] - TILE_ROWS - vector
    for first in range(i0, i1, TILE_ROWS):
        to = (first - i0) * length + before * TILE_ROWS
        for k in range(k0, k1):
            at = k * S.shape[1] + first
            if at <= last and k + 1 < k1:
                for i in range(0, TILE_ROWS, vector):
                    copy_vector(a, to + i, source, at + i)
            else:
                for i in range(min(TILE_ROWS, i1 - first)):
                    a[to + i] = source[at + i]
            to += TILE_ROWS


@part
def pack_columns(b, length, before, M, k0, k1, j0, j1):
    """b[panel][before + k][j] = M[k0 + k, j0 + panel·width + j], width two vectors."""
    once()
    S, D, scaling, combined = M
    width = 2 * lanes(b)
    weight, delta = S.reshape(-1), D.reshape(-1)
    whole = (j1 - j0) // width
    tail = j1 - j0 - whole * width
    for k in range(k1 - k0):
        at = (k0 + k) * S.shape[1] + j0
        to = (before + k) * width
        # Whole panels also at the end of a row, where what follows is the next row; not at the end of the last.
        copied = whole + 1 if tail and at + (whole + 1) * width <= weight.shape[0] else whole
        for _ in range(copied):
            if combined:
                combine_pair(b, to, weight, delta, at, scaling)
            else:
                copy_pair(b, to, weight, at)
            at += width
            to += length * width
        if tail and copied == whole:
            for j in range(tail):
                b[to + j] = weight[at + j] + scaling * delta[at + j] if combined else weight[at + j]


@part
def pack_across(b, length, before, M, k0, k1, j0, j1, spare):
    """b[panel][before + k][j] = M[j0 + panel·width + j, k0 + k], by squares; M is combined in `spare` before."""
    once()
    S, D, scaling, combined = M
    vector = lanes(b)
    width, source = 2 * vector, S.reshape(-1)
    whole, pitch = (k1 - k0) // vector * vector, k1 - k0 + 2 * vector
    for j in range(0, j1 - j0, vector):
        rows, start = min(vector, j1 - j0 - j), (j // width * length + before) * width + j % width
        if combined:
            for row in range(rows):
                target = spare[row * pitch : row * pitch + k1 - k0]
                combine_row(target, S[j0 + j + row, k0:k1], D[j0 + j + row, k0:k1], scaling)
        if rows == vector:
            for k in range(0, whole, vector):
                if combined:
                    transpose_square(b, start + k * width, width, spare, k, pitch)
                else:
                    transpose_square(b, start + k * width, width, source, (j0 + j) * S.shape[1] + k0 + k, S.shape[1])
        done = whole if rows == vector else 0
        for row in range(rows):
            for k in range(done, k1 - k0):
                at = (j0 + j + row) * S.shape[1] + k0 + k
                b[start + k * width + row] = spare[row * pitch + k] if combined else source[at]
