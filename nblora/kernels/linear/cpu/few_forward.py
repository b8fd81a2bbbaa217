"""Forward of few samples: z = x (W + c D) + s (mask∘x) A B + b, y = act(z); see `few`.

Workers draw jobs, kind after kind: packing x; u = s (mask∘x) A; for Dense, sums down rows; blocks of z, each by one
worker from its bias to its activation.
"""

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.functions import activate_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.machine import GROUP
from nblora.kernels.common.microkernel import At
from nblora.kernels.common.threads import entry, launch

from .few import (
    DRAWN,
    LOW,
    PACK,
    PACKED,
    SUMMED,
    add_dots,
    add_partial_sums,
    add_sums,
    begin_panels,
    block_of,
    low_job,
    pack,
    pack_transposed,
    padded,
    place,
    span_of,
    sum_block,
    sum_jobs,
    unpack_panels,
)
from .packing import Block, Matrix, plain
from .rowtiles import DOT_ROWS
from .work import panel_width, scratch_work


@part
def packed_few_forward(samples, inputs, outputs, rank, workers, array):
    """Elements that packing and sums take, in the order of `_places`; `array` is any of its dtype."""
    sums = sum_jobs(inputs, workers) * padded(outputs, array)
    return samples * (3 * padded(inputs, array) + padded(rank, array) + sums) + inputs * rank


@part
def _places(task):
    """Where x in panels, mask∘x in panels, u in groups, the sums and Aᵀ begin; x in groups begins at 0."""
    (N, inputs), (_, outputs), array = task.x.shape, task.y.shape, task.packed
    size = padded(inputs, array) * N
    sums = 3 * size + padded(task.u.shape[1], array) * N
    jobs = sum_jobs(inputs, task.scratch.shape[0])
    return size, 2 * size if task.masked else size, 3 * size, sums, sums + jobs * padded(outputs, array) * N


@part
def _pack(task, f0, f1):
    panels, low, _, _, A_at = _places(task)
    if task.transposed or (task.has_low_rank and not task.masked):
        pack(task.packed, panels, panel_width(task.packed), task.x, f0, f1)
    if not task.transposed:
        pack(task.packed, 0, GROUP, task.x, f0, f1)
    if task.has_low_rank:
        pack_transposed(task.packed, A_at, task.A, f0, min(f1, task.A.shape[0]))
        if task.masked:
            pack(task.packed, low, panel_width(task.packed), task.x_low, f0, f1)


@part
def _sum_job(task, job, block, edge):
    """Dense: the part of x M that belongs to a block of rows of M."""
    (N, inputs), outputs = task.x.shape, task.y.shape[1]
    packed, p0, p1 = task.packed, min(job * block, inputs), min(job * block + block, inputs)
    M = Matrix(task.S, task.D, task.y.dtype.type(task.c), task.has_delta)
    at = _places(task)[3] + job * padded(outputs, packed) * N
    begin_panels(packed[at:], N, 0, padded(outputs, packed), task.bias, task.has_bias and job == 0)
    span = span_of(N, packed)
    for q0 in range(0, outputs, span):
        q1 = min(q0 + span, outputs)
        Z = packed[at + q0 * N :]
        add_sums(task.row_tiles, M, Block(p0, p1, q0, q1), At(packed, 0), Z, N, edge, At(task.S, -1))


@part
def _dots(task, o0, o1, Z, edge):
    """FullyConnected: Z = b + x M for a block of rows of M."""
    (N, inputs), at, ahead = task.x.shape, _places(task)[0], task.S.reshape(-1)
    M = Matrix(task.S, task.D, task.y.dtype.type(task.c), task.has_delta)
    span, width = span_of(N, Z), panel_width(Z)
    begin_panels(Z, N, o0, o1, task.bias, task.has_bias)
    for q0 in range(0, inputs, span):
        for p in range(o0, o1, DOT_ROWS):
            block = Block(p, min(p + DOT_ROWS, o1), q0, min(q0 + span, inputs))
            to, following = At(Z, place(p - o0, N, width)), At(ahead, (p + DOT_ROWS) * inputs + q0)
            add_dots(task.row_tiles, M, block, At(task.packed, at), to, N, edge, following)


@part
def _output_job(task, o0, o1, jobs, Z, edge):
    """z and y for a block of outputs."""
    (N, outputs), B, packed = task.y.shape, task.B, task.packed
    _, _, u_at, at, _ = _places(task)
    if task.transposed:
        _dots(task, o0, o1, Z, edge)
    else:
        add_partial_sums(packed, at, padded(outputs, packed) * N, jobs, o0, o1, N)
        Z = packed[at + o0 * N :]
    if task.has_low_rank:
        block = Block(0, B.shape[0], o0, o1)
        add_sums(task.row_tiles, plain(B), block, At(packed, u_at), Z, N, edge, At(B, -1))
    unpack_panels(task.z, Z, o0, o1)
    if task.activation != elementwise.IDENTITY:
        for n in range(N):
            activate_row(task.y[n, o0:o1], task.z[n, o0:o1], task.activation)


@part
def few_forward_worker(task, worker, workers):
    """Draw jobs until none is left."""
    work = scratch_work(task.scratch[worker], task.tile_rows, task.tile_steps)
    Z, edge = work.c, work.a
    (N, inputs), outputs = task.x.shape, task.y.shape[1]
    packs = (inputs + PACK - 1) // PACK
    while True:
        job = draw(task.counters, DRAWN, packs, worker, workers)
        if job < 0:
            break
        _pack(task, job * PACK, min(job * PACK + PACK, padded(inputs, Z)))
        fetch_add(task.counters, PACKED, 1)
    wait_for(task.counters, PACKED, packs)
    rank = task.u.shape[1]
    lows = (rank + DOT_ROWS - 1) // DOT_ROWS if task.has_low_rank else 0
    _, low_at, u_at, _, A_at = _places(task)
    A, x, u = At(task.packed, A_at), At(task.packed, low_at), At(task.packed, u_at)
    while True:
        job = draw(task.counters, DRAWN + workers, lows, worker, workers)
        if job < 0:
            break
        low_job(task.row_tiles, A, inputs, Z.dtype.type(task.s), x, task.u, u, job * DOT_ROWS, edge)
        fetch_add(task.counters, LOW, 1)
    jobs = 0 if task.transposed else sum_jobs(inputs, workers)
    rows = sum_block(inputs, max(jobs, 1))
    while True:
        job = draw(task.counters, DRAWN + 2 * workers, jobs, worker, workers)
        if job < 0:
            break
        _sum_job(task, job, rows, edge)
        fetch_add(task.counters, SUMMED, 1)
    wait_for(task.counters, LOW, lows)
    wait_for(task.counters, SUMMED, jobs)
    block = block_of(outputs, N, workers, Z)
    while True:
        job = draw(task.counters, DRAWN + 3 * workers, (outputs + block - 1) // block, worker, workers)
        if job < 0:
            break
        _output_job(task, job * block, min(job * block + block, outputs), jobs, Z, edge)


_entry = entry(few_forward_worker)


@kernel
def few_forward(task, workers, board, helpers):
    """Work off a `ForwardTask` of few samples in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)
