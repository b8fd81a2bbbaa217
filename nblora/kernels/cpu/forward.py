"""Forward: z = x (W + c D) + s (mask∘x) A B + b, y = act(z), in one parallel region.

Workers draw jobs from a counter. First u = s (mask∘x) A by blocks of samples, then blocks of z, each by one worker from
its first product to its activation; the low-rank term comes last in a block, when u has long been ready.
"""

from typing import NamedTuple

from numba import int64, prange

from .. import elementwise
from ..jit import kernel
from .atomics import fetch_add, wait_for
from .machine import BLOCK, TILE_ROWS
from .microkernel import lanes
from .products import (
    C_STRIDE,
    PART,
    PARTS,
    across_rows,
    along_rows,
    block_size,
    factor_across_rows,
    store_block,
    transpose_block,
)

activate = kernel(elementwise.activate)


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
    counters: object  # (2,) int64 zeros: jobs drawn, blocks of u done
    s: float
    c: float
    activation: int
    transposed: bool
    has_base: bool
    has_delta: bool
    has_low_rank: bool
    has_bias: bool


@kernel
def _geometry(task, workers):
    """Sizes of the blocks: samples of u, samples of z, outputs of z."""
    N, out = task.y.shape
    width = 2 * lanes(task.y)
    low = block_size(N, TILE_ROWS, 2 * workers, BLOCK)
    samples = block_size(N, width if task.transposed else TILE_ROWS, 1, BLOCK)
    pieces = 4 * workers * samples // N
    outputs = block_size(out, TILE_ROWS if task.transposed else width, min(pieces, out // 96), BLOCK)
    return low, samples, outputs


@kernel
def _low_job(task, n0, n1, a, b, c):
    """u[n0:n1] = s·x_low[n0:n1]·A."""
    rank = task.A.shape[1]
    s = task.y.dtype.type(task.s)
    for r in range(0, rank, BLOCK):
        end = min(r + BLOCK, rank)
        along_rows(c, True, task.x_low, n0, n1, task.A, task.A, s, False, r, end, 0, task.A.shape[0], a, b)
        store_block(task.u, n0, n1, r, end, c, s)


@kernel
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
        if task.activation == elementwise.RELU:
            for o in range(z.shape[0]):
                y[o] = activate(z[o], elementwise.RELU)
        elif task.activation != elementwise.IDENTITY:
            for o in range(z.shape[0]):
                y[o] = activate(z[o], task.activation)


@kernel
def _dense_job(task, n0, n1, o0, o1, low_blocks, a, b, c):
    scaling = task.y.dtype.type(task.c)
    if task.has_base:
        inner = task.S.shape[0]
        along_rows(c, True, task.x, n0, n1, task.S, task.D, scaling, task.has_delta, o0, o1, 0, inner, a, b)
    if task.has_low_rank:
        wait_for(task.counters, 1, low_blocks)
        rank = task.B.shape[0]
        along_rows(c, not task.has_base, task.u, n0, n1, task.B, task.B, scaling, False, o0, o1, 0, rank, a, b)
    _activate_block(task, n0, n1, o0, o1, c)


@kernel
def _fully_connected_job(task, n0, n1, o0, o1, low_blocks, a, b, c):
    scaling = task.y.dtype.type(task.c)
    across_rows(c, True, task.S, task.D, scaling, task.has_delta, o0, o1, task.x, n0, n1, 0, task.S.shape[1], a, b)
    if task.has_low_rank:
        wait_for(task.counters, 1, low_blocks)
        factor_across_rows(c, False, task.B, o0, o1, task.u, n0, n1, a, b)
    transpose_block(b, c, o1 - o0, n1 - n0)
    _activate_block(task, n0, n1, o0, o1, b)


@kernel
def forward_worker(task, worker, workers):
    """Draw jobs until none is left."""
    scratch = task.scratch[worker]
    a, b, c = scratch[:PART], scratch[PART : 2 * PART], scratch[2 * PART : 3 * PART]
    N, out = task.y.shape
    low, samples, outputs = _geometry(task, workers)
    low_blocks = (N + low - 1) // low if task.has_low_rank else 0
    rows, columns = (N + samples - 1) // samples, (out + outputs - 1) // outputs
    while True:
        job = fetch_add(task.counters, 0, 1)
        if job < low_blocks:
            _low_job(task, job * low, min(N, job * low + low), a, b, c)
            fetch_add(task.counters, 1, 1)
            continue
        job -= low_blocks
        if job >= rows * columns:
            break
        n0, o0 = job // columns * samples, job % columns * outputs
        n1, o1 = min(N, n0 + samples), min(out, o0 + outputs)
        if task.transposed:
            _fully_connected_job(task, n0, n1, o0, o1, low_blocks, a, b, c)
        else:
            _dense_job(task, n0, n1, o0, o1, low_blocks, a, b, c)


@kernel(parallel=True)
def forward(task, workers):
    """Run a `ForwardTask` with so many workers, in the calling thread where it is one."""
    # The index of prange is unsigned and a literal has a type of its own: as int64, one worker is compiled, not three.
    if workers == 1:
        forward_worker(task, int64(0), workers)
    else:
        for worker in prange(workers):
            forward_worker(task, int64(worker), workers)


__all__ = ["PARTS", "ForwardTask", "forward"]
