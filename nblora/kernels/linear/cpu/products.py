"""Blocks of matrix products: pack a depth of both operands, run the register tile over them, go on along the depth.

A block of C has at most `BLOCK` rows and columns and lies in scratch with `C_STRIDE`; `first`: C holds nothing yet.
Every product of forward and backward is one of three, with S [P, Q] a stored matrix and M = S + c D:

    along rows      C[n, q] = Σ_p L[n, p] M[p, q]      forward of Dense, input gradient of FullyConnected
    across rows     C[p, n] = Σ_q M[p, q] R[n, q]      the transposed forward of FullyConnected, input gradient of Dense
    gradient        C[p, q] = Σ_n L[n, p] R[n, q]      of weights, delta and the factors

The low-rank term is a second call on the same C: `rank` more steps of the inner dimension. Activations, which every
job reads, are packed once for all of them (`Packed`); weights are packed by the one job that reads them. While a block
is multiplied, the next one's weights are fetched from memory and packed, some rows after every panel (`Next`).
"""

from typing import NamedTuple

from nblora.kernels.common.jit import part
from nblora.kernels.common.machine import BLOCK, DEPTH, ROW_STRIDE, TILE_ROWS, VECTOR_BITS
from nblora.kernels.common.microkernel import LINE, Ahead, At, Tile, lanes, once, tile
from nblora.kernels.common.rows import scale_row
from nblora.kernels.common.vectors import transpose_square

from .packing import (
    Matrix,
    pack_columns,
    pack_columns_transposed,
    pack_rows,
    pack_rows_transposed,
    pack_steps,
    plain,
)

C_STRIDE = BLOCK + VECTOR_BITS // 16
PART = C_STRIDE * (BLOCK + VECTOR_BITS // 16)
LONG = 4 if VECTOR_BITS == 512 else 2
"""Blocks of C that a job may hold, in float32, so that an operand is packed once for all of them: half of a level-2
cache of 2 MB. At 2048 samples packing the weight for each 256 took a tenth of the time."""
PARTS = 7 + LONG


class Work(NamedTuple):
    """What one worker computes with: scratch of `PART` elements each, and the addresses of the register tiles."""

    a: object  # an operand: A in rows, or B
    b: object  # an operand
    c: object  # blocks of C, (LONG·PART,)
    g: object  # a strip of a gradient, or a transposed block of C
    l: object  # A in steps
    r: object  # B of a gradient
    w: object  # two blocks of weights, (2·PART,): one is multiplied, the next is packed
    tile_rows: int
    tile_steps: int


class Packed(NamedTuple):
    """Activations, packed block by block of samples and of features; with `block` 0 nothing is."""

    array: object  # 1-D
    start: int  # where the first block begins
    blocks: int  # blocks of samples
    block: int  # elements of a block


class Samples(NamedTuple):
    """The samples n0 <= n < n1, in blocks of `size`."""

    n0: int
    n1: int
    size: int


NOTHING, ROWS, COLUMNS, FETCHED = range(4)


class Next(NamedTuple):
    """What to do between tiles: pack a block of M in rows or in columns, or only fetch it; and a stream to fetch."""

    how: int  # one of the four above
    M: object  # Matrix
    p0: int
    p1: int
    q0: int
    q1: int
    target: object  # 1-D
    stream: object  # 1-D
    begin: int  # the stream's first element
    count: int  # its elements


@part
def scratch_work(scratch, tile_rows, tile_steps):
    """The `Work` on a worker's row of scratch, (PARTS·PART,)."""
    return Work(
        scratch[:PART],
        scratch[PART : 2 * PART],
        scratch[7 * PART :],
        scratch[2 * PART : 3 * PART],
        scratch[3 * PART : 4 * PART],
        scratch[4 * PART : 5 * PART],
        scratch[5 * PART : 7 * PART],
        tile_rows,
        tile_steps,
    )


@part
def panels_block(size):
    """Elements of a packed block of `size` samples and `DEPTH` features for a gradient, in columns or in steps."""
    return (DEPTH + VECTOR_BITS // 16) * size


@part
def panel_width(array):
    """Columns of a panel in the dtype of the array: two vectors."""
    return VECTOR_BITS // (4 * array.itemsize)


@part
def packed_at(packed, samples, features):
    """Where the packed block of this number begins, counted in blocks of samples and of features."""
    return packed.start + (features * packed.blocks + samples) * packed.block


@part
def operand_block(size, array):
    """Elements of a packed block of `size` samples and `DEPTH` features, in rows or in transposed columns."""
    width = panel_width(array)
    return (size + width - 1) // width * width * ROW_STRIDE


@part
def nothing_next(S, target):
    """Nothing to do; the arrays are of the types that others have."""
    return stream_next(S, target, 0, 0)


@part
def fetch_next(S, D, p0, p1, q0, q1, stream, begin, count):
    """Fetch this block of both arrays, and a stream."""
    return Next(FETCHED, Matrix(S, D, stream.dtype.type(0), False), p0, p1, q0, q1, stream, stream, begin, count)


@part
def stream_next(S, stream, begin, count):
    """Fetch a stream."""
    return Next(NOTHING, plain(S), 0, 0, 0, 0, stream, stream, begin, count)


@part
def piece_of(todo, index, count):
    """The part of the rows that belongs to one of `count` products, and the whole stream."""
    rows = todo.p1 - todo.p0
    p0, p1 = todo.p0 + rows * index // count, todo.p0 + rows * (index + 1) // count
    how, M, _, _, q0, q1, target, stream, begin, length = todo
    offset = (p0 - todo.p0) * (ROW_STRIDE if how == ROWS else panel_width(target) if how == COLUMNS else 0)
    return Next(how, M, p0, p1, q0, q1, target[offset:], stream, begin, length)


@part
def with_stream(todo, begin, count):
    """The same with another part of the stream."""
    how, M, p0, p1, q0, q1, target, stream, _, _ = todo
    return Next(how, M, p0, p1, q0, q1, target, stream, begin, count)


@part
def pack_weights(todo, p0, p1):
    """Pack the rows p0 <= p < p1 of what is to be packed."""
    how, M, begin, _, q0, q1, target, _, _, _ = todo
    if how == ROWS:
        pack_rows(target[(p0 - begin) * ROW_STRIDE :], M, p0, p1, q0, q1)
    elif how == COLUMNS:
        pack_columns(target, DEPTH, p0 - begin, M, p0, p1, q0, q1)


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


NARROW_ROWS, NARROW_COLUMNS = 96, 192
"""Rows and columns of the weight below which a job is not cut further: narrow strips of rows that lie far apart are
fetched slowly, and few panels are soon used up."""


@part
def job_pieces(total, groups, workers, rows):
    """Into how many equal jobs `total` rows (else columns) are cut, for each of `groups` blocks of samples.

    Four for each worker, so that one that is held up can be helped, as far as they are not narrow; in all a multiple of
    the number of workers, so that none waits for the last.
    """
    wanted = min((4 * workers + groups - 1) // groups, total // (NARROW_ROWS if rows else NARROW_COLUMNS))
    return max(wanted * groups // workers * workers // groups, 1 if groups >= workers else workers // groups)


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


class Pace(NamedTuple):
    """How rows p0 to p1 of what is next, and its stream, are dealt to the tiles that fetch them."""

    p0: int
    p1: int
    lines: int  # of a row
    share: int  # lines of each array that one tile fetches
    flow: int  # lines of the stream that one tile fetches
    chunk: int  # steps of a tile between two lines


@part
def pace_of(todo, p0, p1, flow, depth, calls):
    """The pace at which `calls` tiles of this depth fetch the rows p0 to p1."""
    lines = ((todo.q1 - todo.q0) * todo.M.S.itemsize + LINE - 1) // LINE
    share = ((p1 - p0) * lines + calls - 1) // calls
    return Pace(p0, p1, max(lines, 1), share, flow, max(depth // max(share, flow, 1), 1))


@part
def stream_flow(todo, calls):
    """Lines of the stream that each of `calls` tiles fetches."""
    return (todo.count * todo.M.S.itemsize // LINE + calls - 1) // calls


@part
def tile_at(function, size, a, b, c, todo, begin, pace, call):
    """One register tile; of what is next it fetches the part of call number `call`, the stream from `begin` on."""
    S, D = todo.M.S, todo.M.D
    item, pitch = c.array.itemsize, S.shape[1]
    row = pace.share * call // pace.lines
    byte, row_bytes, row_pitch = (pace.share * call - row * pace.lines) * LINE, pace.lines * LINE, pitch * item
    if pace.p0 + row >= pace.p1:
        row, byte, row_bytes, row_pitch = 0, 0, 0, 0
    place, flowing = (pace.p0 + row) * pitch + todo.q0, begin + pace.flow * call * (LINE // item)
    rows, other, stream = At(S, place), At(D, place), At(todo.stream, flowing)
    tile(function, a, b, c, size, Ahead(rows, other, stream, byte, row_bytes, row_pitch, pace.chunk))


@part
def _multiply_rows(work, a, b, rows, columns, depth, c, first, todo):
    """C (+)= A·B, A in rows. After every panel of B a part of the rows to be packed, which its tiles have fetched."""
    once()
    width = panel_width(b)
    tiles, panels = (rows + TILE_ROWS - 1) // TILE_ROWS, (columns + width - 1) // width
    flow = stream_flow(todo, tiles * panels)
    for j in range(panels):
        p0, p1 = todo.p0 + (todo.p1 - todo.p0) * j // panels, todo.p0 + (todo.p1 - todo.p0) * (j + 1) // panels
        vectors = 1 if 2 * (columns - j * width) <= width else 2
        begin, pace = todo.begin + flow * tiles * j * (LINE // c.itemsize), pace_of(todo, p0, p1, flow, depth, tiles)
        i = 0
        for t in range(tiles):
            height = (rows - i + tiles - t - 1) // (tiles - t)
            at = i * C_STRIDE + j * width
            a_at, b_at = i * ROW_STRIDE, j * width * DEPTH
            size = Tile(depth, C_STRIDE, not first, height, vectors, width, ROW_STRIDE)
            tile_at(work.tile_rows, size, At(a, a_at), At(b, b_at), At(c, at), todo, begin, pace, t)
            i += height
        pack_weights(todo, p0, p1)


class Strip(NamedTuple):
    """`height` rows from `row` on of A in steps, times the columns of B; both in panels of `length`."""

    row: int
    height: int
    columns: int
    depth: int
    length: int


@part
def multiply_strip(work, l, r, strip, g, first, todo, pace, call):
    """G (+)= A·B for a strip, to the place `g`."""
    once()
    i, height, columns, depth, length = strip
    width = panel_width(r)
    for j in range(0, columns, width):
        vectors = 1 if 2 * (columns - j) <= width else 2
        a_at, b_at = i * length, j * length
        size, to = Tile(depth, C_STRIDE, not first, height, vectors, width, ROW_STRIDE), At(g.array, g.at + j)
        tile_at(work.tile_steps, size, At(l, a_at), At(r, b_at), to, todo, todo.begin, pace, call)
        call += 1


@part
def multiply_steps(work, l, r, length, rows, columns, depth, g, first, todo):
    """G (+)= A·B, A in steps; panels of `length`."""
    width = panel_width(r)
    panels = (columns + width - 1) // width
    calls = (rows + TILE_ROWS - 1) // TILE_ROWS * panels
    pace = pace_of(todo, todo.p0, todo.p1, stream_flow(todo, calls), depth, calls)
    for i in range(0, rows, TILE_ROWS):
        height, call = min(TILE_ROWS, rows - i), i // TILE_ROWS * panels
        strip = Strip(i, height, columns, depth, length)
        multiply_strip(work, l, r, strip, At(g, i * C_STRIDE), first, todo, pace, call)


@part
def _meanwhile(todo, packed, samples, features, index, count):
    """What product number `index` of `count` does meanwhile; it fetches the operand of the product after it."""
    piece = piece_of(todo, index, count)
    if index + 1 < count:
        piece = with_stream(piece, packed_at(packed, samples + 1, features), packed.block)
    return piece


@part
def along_rows(work, first, L, packed, samples, M, block, at, after):
    """C[n, q] (+)= Σ_p L[n, p] M[p, q] for these samples and this block of M.

    L is packed in rows, if at all; the first `DEPTH` rows of M at `at` of work.w, if that is not negative. `after` is
    to be done with the last steps.
    """
    once()
    (n0, n1, size), (k0, k1, q0, q1) = samples, block
    count = (n1 - n0 + size - 1) // size
    if at < 0:
        at = 0
        pack_columns(work.w, DEPTH, 0, M, k0, min(k0 + DEPTH, k1), q0, q1)
    for k in range(k0, k1, DEPTH):
        end, todo = min(k + DEPTH, k1), after
        if end < k1:
            last, target, begin = min(end + DEPTH, k1), work.w[PART - at :], packed_at(packed, n0 // size, end // DEPTH)
            todo = Next(COLUMNS, M, end, last, q0, q1, target, packed.array, begin, packed.block)
        for n in range(n0, n1, size):
            last, index, a = min(n + size, n1), (n - n0) // size, work.a
            if packed.block:
                a = packed.array[packed_at(packed, n // size, k // DEPTH) + n % size * ROW_STRIDE :]
            else:
                pack_rows(a, plain(L), n, last, k, end)
            c, begins = work.c[index * PART :], first and k == k0
            meanwhile = _meanwhile(todo, packed, n // size, k // DEPTH, index, count)
            _multiply_rows(work, a, work.w[at:], last - n, q1 - q0, end - k, c, begins, meanwhile)
        at = PART - at


@part
def across_rows(work, first, M, block, R, packed, samples, at, after):
    """C[p, n] (+)= Σ_q M[p, q] R[n, q] for this block of M and these samples.

    R is packed in transposed columns, if at all; the first `DEPTH` columns of M at `at` of work.w, if that is not
    negative. `after` is to be done with the last steps.
    """
    once()
    (n0, n1, size), (p0, p1, k0, k1) = samples, block
    count = (n1 - n0 + size - 1) // size
    if at < 0:
        at = 0
        pack_rows(work.w, M, p0, p1, k0, min(k0 + DEPTH, k1))
    for k in range(k0, k1, DEPTH):
        end, todo = min(k + DEPTH, k1), after
        if end < k1:
            last, target, begin = min(end + DEPTH, k1), work.w[PART - at :], packed_at(packed, n0 // size, end // DEPTH)
            todo = Next(ROWS, M, p0, p1, end, last, target, packed.array, begin, packed.block)
        for n in range(n0, n1, size):
            last, index, b = min(n + size, n1), (n - n0) // size, work.b
            if packed.block:
                b = packed.array[packed_at(packed, n // size, k // DEPTH) + n % size * DEPTH :]
            else:
                pack_columns_transposed(b, R, k, end, n, last)
            c, begins = work.c[index * PART :], first and k == k0
            meanwhile = _meanwhile(todo, packed, n // size, k // DEPTH, index, count)
            _multiply_rows(work, work.w[at:], b, p1 - p0, last - n, end - k, c, begins, meanwhile)
        at = PART - at


@part
def factor_along_rows(work, first, L, packed, samples, F, q0, q1):
    """C[n, q] (+)= Σ_r L[n, r] F[q, r]: the low-rank term of the input gradient, F = A, and t of gz, F = B."""
    once()
    n0, n1, size = samples
    for k in range(0, F.shape[1], DEPTH):
        end = min(k + DEPTH, F.shape[1])
        pack_columns_transposed(work.b, F, k, end, q0, q1)
        for n in range(n0, n1, size):
            last, a = min(n + size, n1), work.a
            if packed.block:
                a = packed.array[packed_at(packed, n // size, k // DEPTH) + n % size * ROW_STRIDE :]
            else:
                pack_rows(a, plain(L), n, last, k, end)
            c = work.c[block_at(n0, n, size) :]
            _multiply_rows(work, a, work.b, last - n, q1 - q0, end - k, c, first and k == 0, nothing_next(F, work.b))


@part
def factor_across_rows(work, first, F, p0, p1, R, packed, samples):
    """C[p, n] (+)= Σ_r F[r, p] R[n, r]: the low-rank term of the transposed forward, F = B, and u of x, F = A."""
    once()
    n0, n1, size = samples
    for k in range(0, F.shape[0], DEPTH):
        end = min(k + DEPTH, F.shape[0])
        pack_rows_transposed(work.a, F, p0, p1, k, end)
        for n in range(n0, n1, size):
            last, b = min(n + size, n1), work.b
            if packed.block:
                b = packed.array[packed_at(packed, n // size, k // DEPTH) + n % size * DEPTH :]
            else:
                pack_columns_transposed(b, R, k, end, n, last)
            c = work.c[block_at(n0, n, size) :]
            _multiply_rows(work, work.a, b, p1 - p0, last - n, end - k, c, first and k == 0, nothing_next(F, work.b))


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
        after, none = min(end + DEPTH, N), nothing_next(X, work.r)
        todo = fetch_next(X, X, end, after, q0, q1, work.r, 0, 0) if end < N else none
        pack_steps(work.l, DEPTH, 0, T, r0, r1, n, end)
        if whole < q1 - q0:
            pack_columns(work.r, DEPTH, 0, plain(X), n, end, q0 + whole, q1)
        calls = (r1 - r0 + TILE_ROWS - 1) // TILE_ROWS * panels
        pace, idle = pace_of(todo, todo.p0, todo.p1, 0, end - n, calls), pace_of(none, 0, 0, 0, end - n, 1)
        for i in range(0, r1 - r0, TILE_ROWS):
            height, call, at = min(TILE_ROWS, r1 - r0 - i), i // TILE_ROWS * panels, i * C_STRIDE
            a = At(work.l, i * DEPTH)
            for j in range(0, whole, width):
                vectors = 2 if j + width <= whole else 1
                size, b = Tile(end - n, C_STRIDE, n != 0, height, vectors, pitch, 0), At(source, n * pitch + q0 + j)
                tile_at(work.tile_steps, size, a, b, At(work.c, at + j), todo, 0, pace, call + j // width)
            if whole < q1 - q0:
                size, b = Tile(end - n, C_STRIDE, n != 0, height, 1, width, 0), At(work.r, 0)
                tile_at(work.tile_steps, size, a, b, At(work.c, at + whole), none, 0, idle, 0)
        n += DEPTH


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
