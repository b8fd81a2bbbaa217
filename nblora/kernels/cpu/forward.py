"""Forward: z = x (W + c D) + s (mask∘x) A B + b, y = act(z), in one parallel region.

Workers draw jobs from a counter. First u = s (mask∘x) A by blocks of samples, then blocks of z, each by one worker from
its first product to its activation; the low-rank term comes last in a block, when u has long been ready.
"""

from typing import NamedTuple

from .. import elementwise
from ..jit import kernel, part
from .atomics import fetch_add, wait_for
from .functions import activate_row
from .machine import BLOCK, TILE_ROWS
from .microkernel import lanes
from .products import (
    C_STRIDE,
    across_rows,
    along_rows,
    block_at,
    block_size,
    factor_across_rows,
    sample_blocks,
    scratch_work,
    store_block,
    transpose_block,
)
from .threads import call, entry, launch


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
    tile_rows: int  # addresses of `tile_functions`
    tile_steps: int
    counters: object  # (2,) int64 zeros: jobs drawn, blocks of u done
    s: float
    c: float
    activation: int
    transposed: bool
    has_base: bool
    has_delta: bool
    has_low_rank: bool
    has_bias: bool


@part
def _geometry(task, workers):
    """Sizes: samples of a job of u, samples of a job of z, samples of a block, outputs of a job of z."""
    N, out = task.y.shape
    width = 2 * lanes(task.y)
    few, quantum = (width, TILE_ROWS) if task.transposed else (TILE_ROWS, width)
    low = block_size(N, TILE_ROWS, 2 * workers, BLOCK)
    size, samples = sample_blocks(N, few, task.y)
    pieces = 4 * workers * samples // N
    outputs = block_size(out, quantum, min(pieces, out // 96), BLOCK)
    return low, samples, size, outputs


@part
def _low_job(task, n0, n1, work):
    """u[n0:n1] = s·x_low[n0:n1]·A."""
    inner, rank = task.A.shape
    s = task.y.dtype.type(task.s)
    for r in range(0, rank, BLOCK):
        end = min(r + BLOCK, rank)
        along_rows(work, True, task.x_low, n0, n1, n1 - n0, task.A, task.A, s, False, r, end, 0, inner)
        store_block(task.u, n0, n1, r, end, work.c, s)


@part
def _activate_block(task, n0, n1, o0, o1, c):
    """z = C + b and y = act(z) for n0 <= n < n1, o0 <= o < o1."""
    for n in range(n1 - n0):
        z, y = task.z[n0 + n, o0:o1], task.y[n0 + n, o0:o1]
        block = c[n * C_STRIDE : n * C_STRIDE + o1 - o0]
        if task.has_bias:
            bias = task.bias[o0:o1]
            for o in range(z.shape[0]):
                z[o] = block[o] + bias[o]
        else:
            for o in range(z.shape[0]):
                z[o] = block[o]
        if task.activation != elementwise.IDENTITY:
            activate_row(y, z, task.activation)


@part
def _dense_job(task, n0, n1, size, o0, o1, low_blocks, work):
    c = task.y.dtype.type(task.c)
    if task.has_base:
        inner = task.S.shape[0]
        along_rows(work, True, task.x, n0, n1, size, task.S, task.D, c, task.has_delta, o0, o1, 0, inner)
    if task.has_low_rank:
        wait_for(task.counters, 1, low_blocks)
        rank = task.B.shape[0]
        along_rows(work, not task.has_base, task.u, n0, n1, size, task.B, task.B, c, False, o0, o1, 0, rank)
    for n in range(n0, n1, size):
        _activate_block(task, n, min(n + size, n1), o0, o1, work.c[block_at(n0, n, size) :])


@part
def _fully_connected_job(task, n0, n1, size, o0, o1, low_blocks, work):
    c = task.y.dtype.type(task.c)
    inner = task.S.shape[1]
    across_rows(work, True, task.S, task.D, c, task.has_delta, o0, o1, task.x, n0, n1, size, 0, inner)
    if task.has_low_rank:
        wait_for(task.counters, 1, low_blocks)
        factor_across_rows(work, False, task.B, o0, o1, task.u, n0, n1, size)
    for n in range(n0, n1, size):
        end = min(n + size, n1)
        transpose_block(work.g, work.c[block_at(n0, n, size) :], o1 - o0, end - n)
        _activate_block(task, n, end, o0, o1, work.g)


@part
def forward_worker(task, worker, workers):
    """Draw jobs until none is left."""
    work = scratch_work(task.scratch[worker], task.tile_rows, task.tile_steps)
    N, out = task.y.shape
    low, samples, size, outputs = _geometry(task, workers)
    low_blocks = (N + low - 1) // low if task.has_low_rank else 0
    rows, columns = (N + samples - 1) // samples, (out + outputs - 1) // outputs
    while True:
        job = fetch_add(task.counters, 0, 1)
        if job < low_blocks:
            _low_job(task, job * low, min(N, job * low + low), work)
            fetch_add(task.counters, 1, 1)
            continue
        job -= low_blocks
        if job >= rows * columns:
            break
        n0, o0 = job // columns * samples, job % columns * outputs
        n1, o1 = min(N, n0 + samples), min(out, o0 + outputs)
        if task.transposed:
            _fully_connected_job(task, n0, n1, size, o0, o1, low_blocks, work)
        else:
            _dense_job(task, n0, n1, size, o0, o1, low_blocks, work)


_entry = entry(forward_worker)


@kernel
def forward(task, workers):
    """Run a `ForwardTask` with so many workers, in the calling thread where it is one."""
    function, address = _entry(task)
    if workers == 1:
        call(function, address, 0, 1)
    else:
        launch(function, address, workers)
