"""Forward: z = x (W + c D) + s (mask∘x) A B + b, y = act(z), in one parallel region.

Workers draw jobs. First x is packed and u = s (mask∘x) A computed, by blocks of samples; then blocks of
z, each by one worker from its first product to its activation.
"""

from typing import NamedTuple

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.functions import activate_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.machine import BLOCK, DEPTH, ROW_STRIDE, TILE_ROWS
from nblora.kernels.common.rows import add_row, copy_row
from nblora.kernels.common.threads import entry, launch

from .packing import Block, Matrix, pack_columns_transposed, pack_rows, plain
from .products import (
    C_STRIDE,
    Packed,
    Samples,
    across_rows,
    along_rows,
    block_at,
    block_size,
    factor_across_rows,
    job_pieces,
    nothing_next,
    operand_block,
    packed_at,
    panel_width,
    sample_blocks,
    scratch_work,
    store_block,
    transpose_block,
)


class ForwardTask(NamedTuple):
    """Everything that a forward reads and writes; parts that are absent hold stand-ins of the same type."""

    x: object  # (N, in)
    x_low: object  # (N, in), mask∘x
    S: object  # stored weight
    D: object  # stored delta
    A: object  # (in, rank)
    B: object  # (rank, out)
    bias: object  # (out,)
    u: object  # (N, rank), written
    z: object  # (N, out), written; may be y
    y: object  # (N, out), written
    scratch: object  # (workers, PARTS·PART)
    packed: object  # (`packed_forward`,)
    tile_rows: int  # addresses of `tile_functions`
    tile_steps: int
    row_tiles: object  # addresses of `row_tiles`
    counters: object  # (3 + 4·workers,) int64 zeros: jobs done, by kind; jobs drawn, by kind and share
    s: float
    c: float
    activation: int
    transposed: bool
    has_base: bool
    has_delta: bool
    has_low_rank: bool
    has_bias: bool
    masked: bool


@part
def packed_forward(samples, inputs, transposed, array):
    """Elements that packing x takes; `array` is any of its dtype."""
    size = _blocks(samples, transposed, array)[0]
    return (samples + size - 1) // size * ((inputs + DEPTH - 1) // DEPTH) * operand_block(size, array)


@part
def _blocks(samples, transposed, array):
    """Samples of a block, samples of a job of z."""
    return sample_blocks(samples, panel_width(array) if transposed else TILE_ROWS, array)


@part
def _geometry(task, workers):
    """Sizes: samples of a piece to prepare, samples of a block, samples of a job of z, outputs of a job of z."""
    N, out = task.y.shape
    width = panel_width(task.y)
    size, samples = _blocks(N, task.transposed, task.y)
    blocks = (N + size - 1) // size
    piece = block_size(size, width, (2 * workers + blocks - 1) // blocks, BLOCK)
    pieces = job_pieces(out, (N + samples - 1) // samples, workers, task.transposed)
    outputs = block_size(out, TILE_ROWS if task.transposed else width, pieces, BLOCK)
    return piece, size, samples, outputs


@part
def _packing(task, size):
    """Where x is packed."""
    blocks = (task.x.shape[0] + size - 1) // size
    return Packed(task.packed, 0, blocks, operand_block(size, task.packed) if task.has_base else 0)


@part
def _prepare(task, n0, n1, size, work):
    """Pack x[n0:n1], samples of one block, and compute u[n0:n1] = s·x_low[n0:n1]·A."""
    x, packed, s = task.x, _packing(task, size), task.y.dtype.type(task.s)
    block, start = n0 // size, n0 % size
    for k in range(0, x.shape[1] if task.has_base else 0, DEPTH):
        end, at = min(k + DEPTH, x.shape[1]), packed_at(packed, block, k // DEPTH)
        if task.transposed:
            pack_columns_transposed(packed.array[at + start * DEPTH :], x, k, end, n0, n1)
        else:
            pack_rows(packed.array[at + start * ROW_STRIDE :], plain(x), n0, n1, k, end)
    if not task.has_low_rank:
        return
    x, A = task.x_low, task.A
    (inner, rank), samples = A.shape, Samples(n0, n1, size)
    if task.masked:
        packed = Packed(task.packed, 0, 0, 0)
    for r in range(0, rank, BLOCK):
        end = min(r + BLOCK, rank)
        if task.transposed:
            factor_across_rows(work, True, A, r, end, x, packed, samples)
            transpose_block(work.g, work.c, end - r, n1 - n0)
            store_block(task.u, n0, n1, r, end, work.g, s)
        else:
            block, none = Block(0, inner, r, end), nothing_next(A, work.b)
            along_rows(work, True, x, packed, samples, plain(A), block, -1, none)
            store_block(task.u, n0, n1, r, end, work.c, s)


@part
def _activate_block(task, n0, n1, o0, o1, c):
    """z = C + b and y = act(z) for n0 <= n < n1, o0 <= o < o1."""
    for n in range(n1 - n0):
        z, y = task.z[n0 + n, o0:o1], task.y[n0 + n, o0:o1]
        block = c[n * C_STRIDE : n * C_STRIDE + o1 - o0]
        if task.has_bias:
            add_row(z, block, task.bias[o0:o1])
        else:
            copy_row(z, block)
        if task.activation != elementwise.IDENTITY:
            activate_row(y, z, task.activation)


@part
def _dense_job(task, samples, o0, o1, work):
    n0, n1, size = samples
    c, none = task.y.dtype.type(task.c), nothing_next(task.S, task.packed)
    if task.has_base:
        M, packed = Matrix(task.S, task.D, c, task.has_delta), _packing(task, size)
        along_rows(work, True, task.x, packed, samples, M, Block(0, task.S.shape[0], o0, o1), -1, none)
    if task.has_low_rank:
        B, packed = task.B, Packed(task.packed, 0, 0, 0)
        block = Block(0, B.shape[0], o0, o1)
        along_rows(work, not task.has_base, task.u, packed, samples, plain(B), block, -1, none)
    for n in range(n0, n1, size):
        _activate_block(task, n, min(n + size, n1), o0, o1, work.c[block_at(n0, n, size) :])


@part
def _fully_connected_job(task, samples, o0, o1, work):
    n0, n1, size = samples
    M, none = Matrix(task.S, task.D, task.y.dtype.type(task.c), task.has_delta), nothing_next(task.S, task.packed)
    block, packed = Block(o0, o1, 0, task.S.shape[1]), _packing(task, size)
    across_rows(work, True, M, block, task.x, packed, samples, -1, none)
    if task.has_low_rank:
        factor_across_rows(work, False, task.B, o0, o1, task.u, Packed(task.packed, 0, 0, 0), samples)
    for n in range(n0, n1, size):
        end = min(n + size, n1)
        transpose_block(work.g, work.c[block_at(n0, n, size) :], o1 - o0, end - n)
        _activate_block(task, n, end, o0, o1, work.g)


@part
def forward_worker(task, worker, workers):
    """Draw jobs until none is left."""
    work = scratch_work(task.scratch[worker], task.tile_rows, task.tile_steps)
    N, out = task.y.shape
    piece, size, samples, outputs = _geometry(task, workers)
    pieces = (size + piece - 1) // piece
    prepares = (N + size - 1) // size * pieces
    rows, columns = (N + samples - 1) // samples, (out + outputs - 1) // outputs
    while True:
        job = draw(task.counters, 1, prepares, worker, workers)
        if job < 0:
            break
        block = job // pieces * size
        n0 = block + job % pieces * piece
        n1 = min(n0 + piece, block + size, N)
        if n0 < n1:
            _prepare(task, n0, n1, size, work)
        fetch_add(task.counters, 0, 1)
    wait_for(task.counters, 0, prepares)
    while True:
        job = draw(task.counters, 1 + workers, rows * columns, worker, workers)
        if job < 0:
            break
        n0, o0 = job % rows * samples, job // rows * outputs
        of, o1 = Samples(n0, min(N, n0 + samples), size), min(out, o0 + outputs)
        if task.transposed:
            _fully_connected_job(task, of, o0, o1, work)
        else:
            _dense_job(task, of, o0, o1, work)


_entry = entry(forward_worker)


@kernel
def forward(task, workers, board, helpers):
    """Work off a `ForwardTask` in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)
