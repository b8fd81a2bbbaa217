"""What a worker computes with: scratch, the register tile, and what its tiles fetch meanwhile."""

from typing import NamedTuple

from nblora.kernels.common.jit import part
from nblora.kernels.common.machine import BLOCK, VECTOR_BITS
from nblora.kernels.common.microkernel import LINE, Ahead, At, lanes, once, tile
from nblora.kernels.common.rows import scale_row
from nblora.kernels.common.vectors import transpose_square

C_STRIDE = BLOCK + VECTOR_BITS // 16
PART = C_STRIDE * (BLOCK + VECTOR_BITS // 16)
LONG = 4 if VECTOR_BITS == 512 else 2
"""Blocks of C that a job of a gradient may hold, in float32, so that an operand is packed once for all of them. The
packed columns of a product lie in their place."""
PARTS = 5 + LONG


class Work(NamedTuple):
    """What one worker computes with: scratch of `PART` elements each, and the addresses of the register tiles."""

    a: object  # copies of samples; of few samples an edge
    b: object  # of few samples the other edge
    g: object  # a strip of a gradient, or a panel of C that is no whole number of vectors
    l: object  # A of a gradient, in steps
    r: object  # B of a gradient
    c: object  # blocks of C, or packed columns, (LONG·PART,)
    tile_rows: int
    tile_steps: int


class Fetch(NamedTuple):
    """What tiles fetch: a block of two arrays, and a stream."""

    S: object  # 2-D
    D: object  # 2-D
    p0: int
    p1: int
    q0: int
    q1: int
    stream: object  # 1-D
    begin: int  # the stream's first element
    count: int  # its elements


@part
def scratch_work(scratch, tile_rows, tile_steps):
    """The `Work` on a worker's row of scratch, (PARTS·PART,)."""
    return Work(
        scratch[:PART],
        scratch[PART : 2 * PART],
        scratch[2 * PART : 3 * PART],
        scratch[3 * PART : 4 * PART],
        scratch[4 * PART : 5 * PART],
        scratch[5 * PART :],
        tile_rows,
        tile_steps,
    )


@part
def panel_width(array):
    """Columns of a panel in the dtype of the array: two vectors."""
    return VECTOR_BITS // (4 * array.itemsize)


@part
def fetch_nothing(S, stream):
    """Nothing to fetch; the arrays are of the types that others have."""
    return Fetch(S, S, 0, 0, 0, 0, stream, 0, 0)


@part
def with_stream(fetch, begin, count):
    """The same with another part of the stream."""
    S, D, p0, p1, q0, q1, stream, _, _ = fetch
    return Fetch(S, D, p0, p1, q0, q1, stream, begin, count)


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


class Pace(NamedTuple):
    """How what is fetched is dealt to the tiles."""

    lines: int  # of a row
    share: int  # lines of each array that one tile fetches
    flow: int  # lines of the stream that one tile fetches
    chunk: int  # steps of a tile between two lines


@part
def pace_of(fetch, depth, calls):
    """The pace at which `calls` tiles of this depth fetch it."""
    lines = ((fetch.q1 - fetch.q0) * fetch.S.itemsize + LINE - 1) // LINE
    share = ((fetch.p1 - fetch.p0) * lines + calls - 1) // calls
    flow = (fetch.count * fetch.S.itemsize // LINE + calls - 1) // calls
    return Pace(max(lines, 1), share, flow, max(depth // max(share, flow, 1), 1))


@part
def tile_at(function, size, a, b, c, fetch, pace, call):
    """One register tile, which fetches the part of call number `call`."""
    item, pitch = c.array.itemsize, fetch.S.shape[1]
    row = pace.share * call // pace.lines
    byte, row_bytes, row_pitch = (pace.share * call - row * pace.lines) * LINE, pace.lines * LINE, pitch * item
    if fetch.p0 + row >= fetch.p1:
        row, byte, row_bytes, row_pitch = 0, 0, 0, 0
    place, flowing = (fetch.p0 + row) * pitch + fetch.q0, fetch.begin + pace.flow * call * (LINE // item)
    rows, other, stream = At(fetch.S, place), At(fetch.D, place), At(fetch.stream, flowing)
    tile(function, a, b, c, size, Ahead(rows, other, stream, byte, row_bytes, row_pitch, pace.chunk))


@part
def transpose_block(target, source, rows, columns):
    """target[j, i] = source[i, j], both blocks with `C_STRIDE`."""
    once()
    length = lanes(target)
    for i in range(0, rows, length):
        for j in range(0, columns, length):
            transpose_square(target, j * C_STRIDE + i, C_STRIDE, source, i * C_STRIDE + j, C_STRIDE)


@part
def store_block(out, n0, n1, j0, j1, c, scaling):
    """out[n, j] = scaling·C[n - n0, j - j0]."""
    once()
    for n in range(n1 - n0):
        scale_row(out[n0 + n, j0:j1], c[n * C_STRIDE : n * C_STRIDE + j1 - j0], scaling)
