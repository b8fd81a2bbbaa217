"""Backward of few samples: the gradients and updates of `sweep`, on the tiles of `few`.

Workers draw jobs, kind after kind: gz = gy·act'(z), packed, and x packed; t = s gz Bᵀ; rows of W, D and V, which give
parts of the input gradient and are updated; for FullyConnected, the sum of these parts; factors and bias.
"""

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.functions import slope_row
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
    Outer,
    Pair,
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
    use_gradients,
)
from .packing import Block, Matrix, plain
from .rowtiles import DOT_ROWS
from .sweep import factor_job, factor_jobs
from .work import panel_width, scratch_work


@part
def packed_few_sweep(samples, inputs, outputs, rank, workers, array):
    """Elements that packing and sums take, in the order of `_places`; `array` is any of its dtype."""
    sums = sum_jobs(outputs, workers) * padded(inputs, array)
    features = 2 * padded(outputs, array) + padded(inputs, array) + padded(rank, array)
    return samples * (features + sums) + inputs * rank


@part
def _places(task):
    """Where gz in groups, x, t in groups, the sums and Aᵀ begin; gz in panels begins at 0."""
    (N, inputs), (_, outputs), array = task.x.shape, task.gz.shape, task.packed
    jobs = sum_jobs(outputs, task.scratch.shape[0])
    gz, x = padded(outputs, array) * N, padded(inputs, array) * N
    sums = 2 * gz + x + padded(task.t.shape[1], array) * N
    return gz, 2 * gz, 2 * gz + x, sums, sums + jobs * x


@part
def _pack_gz(task, f0, f1):
    (N, outputs), groups = task.gz.shape, _places(task)[0]
    if task.activation != elementwise.IDENTITY:
        end = min(f1, outputs)
        for n in range(N):
            slope_row(task.gz[n, f0:end], task.gy[n, f0:end], task.z[n, f0:end], task.activation)
    pack(task.packed, 0, panel_width(task.packed), task.gz, f0, f1)
    if task.transposed:
        pack(task.packed, groups, GROUP, task.gz, f0, f1)


@part
def _pack_x(task, f0, f1):
    _, x_at, _, _, A_at = _places(task)
    if task.has_delta or task.train:
        if task.transposed:
            pack(task.packed, x_at, panel_width(task.packed), task.x, f0, f1)
        else:
            pack(task.packed, x_at, GROUP, task.x, f0, f1)
    if task.has_low_rank and task.input_gradient and not task.masked:
        pack_transposed(task.packed, A_at, task.A, f0, min(f1, task.A.shape[0]))


@part
def _matrix(task):
    return Matrix(task.S, task.D, task.gx.dtype.type(task.c), task.has_delta)


@part
def _rows_job(task, i0, i1, Z, edges):
    """Dense: gz Mᵀ for some rows of M, and their gradient."""
    (N, outputs), width, packed, edge = task.gz.shape, panel_width(Z), task.packed, edges.V
    span, pitch = span_of(N, Z), task.S.shape[1]
    velocity = task.V.reshape(-1) if task.has_delta and task.update else task.S.reshape(-1)
    step = 0 if task.has_delta and task.update else DOT_ROWS
    gz = At(packed, 0)
    outer = Outer(At(packed, _places(task)[1]), gz, N)
    for q0 in range(0, outputs, span):
        q1 = min(q0 + span, outputs)
        for i in range(i0, i1, GROUP):
            end = min(i + GROUP, i1)
            for p in range(i, end if task.input_gradient else i, DOT_ROWS):
                to, ahead = At(Z, place(p - i0, N, width)), At(velocity, (p + step) * pitch + q0)
                block = Block(p, min(p + DOT_ROWS, end), q0, q1)
                add_dots(task.row_tiles, _matrix(task), block, gz, to, N, edge, ahead)
            use_gradients(task, Block(i, end, q0, q1), outer, edges)


@part
def _sum_job(task, job, block, edges):
    """FullyConnected: the part of gz M that belongs to a block of rows of M, and their gradient."""
    (N, outputs), inputs, packed = task.gz.shape, task.x.shape[1], task.packed
    gz_at, x_at, _, at, _ = _places(task)
    at += job * padded(inputs, packed) * N
    begin_panels(packed[at:], N, 0, padded(inputs, packed), task.db, False)
    span, pitch, has_gradient = span_of(N, packed), task.S.shape[1], task.has_delta or task.train
    following = task.V if task.has_delta and task.update else task.S
    end, gz = min(job * block + block, outputs), At(packed, gz_at)
    outer = Outer(gz, At(packed, x_at), N)
    for q0 in range(0, inputs, span):
        q1, Z = min(q0 + span, inputs), packed[at + q0 * N :]
        for o in range(job * block, end, GROUP if has_gradient else block):
            rows = Block(o, min(o + GROUP, end) if has_gradient else end, q0, q1)
            if task.input_gradient:
                ahead = At(following, o * pitch + q0 if has_gradient else -1)
                add_sums(task.row_tiles, _matrix(task), rows, gz, Z, N, edges.V, ahead)
            if has_gradient:
                use_gradients(task, rows, outer, edges)


@part
def _input_job(task, i0, i1, low_jobs, sums, Z, edges):
    """The input gradient of a block of inputs; for Dense also the gradient of these rows of M."""
    (N, inputs), rank, packed = task.x.shape, task.t.shape[1], task.packed
    _, _, t_at, at, A_at = _places(task)
    if task.transposed:
        add_partial_sums(packed, at, padded(inputs, packed) * N, sums, i0, i1, N)
        Z = packed[at + i0 * N :]
    else:
        begin_panels(Z, N, i0, i1, task.db, False)
        _rows_job(task, i0, i1, Z, edges)
    if task.has_low_rank and task.input_gradient and not task.masked:
        wait_for(task.counters, LOW, low_jobs)
        columns = packed[A_at : A_at + rank * inputs].reshape(rank, inputs)
        block = Block(0, rank, i0, i1)
        add_sums(task.row_tiles, plain(columns), block, At(packed, t_at), Z, N, edges.V, At(columns, -1))
    if task.input_gradient:
        unpack_panels(task.gx, Z, i0, i1)


@part
def _pack_job(task, job, gz_packs):
    if job < gz_packs:
        _pack_gz(task, job * PACK, min(job * PACK + PACK, padded(task.gz.shape[1], task.packed)))
    else:
        f0 = (job - gz_packs) * PACK
        _pack_x(task, f0, min(f0 + PACK, padded(task.x.shape[1], task.packed)))


@part
def few_sweep_worker(task, worker, workers):
    """Draw jobs until none is left."""
    work = scratch_work(task.scratch[worker], task.tile_rows, task.tile_steps)
    Z, edges = work.c, Pair(work.a, work.b)
    (N, inputs), outputs, rank = task.x.shape, task.gz.shape[1], task.t.shape[1]
    gz_packs = (outputs + PACK - 1) // PACK
    packs = gz_packs + (inputs + PACK - 1) // PACK
    while True:
        job = draw(task.counters, DRAWN, packs, worker, workers)
        if job < 0:
            break
        _pack_job(task, job, gz_packs)
        fetch_add(task.counters, PACKED, 1)
    wait_for(task.counters, PACKED, packs)
    B, gz, low = At(task.B.reshape(-1), 0), At(task.packed, 0), At(task.packed, _places(task)[2])
    lows = (rank + DOT_ROWS - 1) // DOT_ROWS if task.has_low_rank else 0
    while True:
        job = draw(task.counters, DRAWN + workers, lows, worker, workers)
        if job < 0:
            break
        low_job(task.row_tiles, B, outputs, Z.dtype.type(task.s), gz, task.t, low, job * DOT_ROWS, edges.V)
        fetch_add(task.counters, LOW, 1)
    wanted = task.input_gradient or task.has_delta or task.train
    sums = sum_jobs(outputs, workers) if task.transposed and wanted else 0
    rows = sum_block(outputs, max(sums, 1))
    while True:
        job = draw(task.counters, DRAWN + 2 * workers, sums, worker, workers)
        if job < 0:
            break
        _sum_job(task, job, rows, edges)
        fetch_add(task.counters, SUMMED, 1)
    wait_for(task.counters, SUMMED, sums)
    block = block_of(inputs, N, workers, Z)
    blocks = (inputs + block - 1) // block if task.input_gradient or (wanted and not task.transposed) else 0
    while True:
        job = draw(task.counters, DRAWN + 3 * workers, blocks, worker, workers)
        if job < 0:
            break
        _input_job(task, job * block, min(job * block + block, inputs), lows, sums, Z, edges)
    wait_for(task.counters, LOW, lows)
    factors = factor_jobs(task)
    while True:
        job = draw(task.counters, DRAWN + 4 * workers, factors, worker, workers)
        if job < 0:
            break
        factor_job(task, job, work)


_entry = entry(few_sweep_worker)


@kernel
def few_sweep(task, workers, board, helpers):
    """Work off a `SweepTask` of few samples in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)
