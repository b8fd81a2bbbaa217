"""Backward: every gradient, and where asked the update of V, D and W, in one parallel region.

    gz = gy·act'(z)      t = s gz Bᵀ      dB = uᵀ gz      dA = (mask∘x)ᵀ t      db = Σ gz
    gx = gz (W + c D)ᵀ + t Aᵀ             G = xᵀ gz: dW = G, dD = c G

With S [P, Q] stored, L [N, P] and R [N, Q]: Dense has L = x, R = gz; FullyConnected has L = gz, R = x; G = Lᵀ R in
either. A block of G lives in scratch until it has been used, so the gradient never exists as a matrix.

Workers draw jobs, kind after kind: samples (gz, packed for both of its products, and t), input gradient,
factors and bias, weight gradient. A kind that needs another waits until that one's blocks are counted as done. Up to
`BLOCK` samples the input and weight gradients are one kind: a job owns whole rows (Dense) or columns (FullyConnected)
of S, those whose input gradient it computes, and updates each tile right after it took its part of the product. Where
nobody reads the input gradient its jobs are left out, and its packed operand with them.
"""

from typing import NamedTuple

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.functions import slope_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.machine import BLOCK, DEPTH, ROW_STRIDE, TILE_ROWS
from nblora.kernels.common.microkernel import At
from nblora.kernels.common.rows import descend_row, momentum_row, scale_row
from nblora.kernels.common.threads import entry, launch

from .packing import Block, Matrix, pack_columns, pack_columns_transposed, pack_rows, pack_steps, plain
from .products import (
    C_STRIDE,
    COLUMNS,
    PART,
    ROWS,
    Next,
    Packed,
    Samples,
    Strip,
    across_rows,
    along_rows,
    block_at,
    block_size,
    factor_along_rows,
    factor_gradient,
    fetch_next,
    job_pieces,
    long_blocks,
    multiply_steps,
    multiply_strip,
    nothing_next,
    operand_block,
    pace_of,
    packed_at,
    panel_width,
    panels_block,
    sample_blocks,
    scratch_work,
    store_block,
    stream_flow,
    stream_next,
    transpose_block,
    with_stream,
)

PREPARED, CROSSED, DRAWN = range(3)


class SweepTask(NamedTuple):
    """Everything that a backward reads and writes; parts that are absent hold stand-ins of the same type."""

    gy: object  # (N, out)
    z: object  # (N, out)
    x: object  # (N, in)
    x_low: object  # (N, in), mask∘x
    u: object  # (N, rank)
    S: object  # stored weight, updated where `update` and `train`
    D: object  # stored delta, updated where `update`
    V: object  # stored velocity, updated where `update`
    A: object  # (in, rank)
    B: object  # (rank, out)
    gz: object  # (N, out), written; is gy for the identity
    t: object  # (N, rank), written
    gx: object  # (N, in), written where `input_gradient`
    dA: object  # (in, rank), written
    dB: object  # (rank, out), written
    db: object  # (out,), written where `train` and `has_bias`
    dW: object  # stored, written where `train` and not `update`
    dD: object  # stored, written where `has_delta` and not `update`
    scratch: object  # (workers, PARTS·PART)
    packed: object  # (`packed_sweep`,)
    tile_rows: int  # addresses of `tile_functions`
    tile_steps: int
    row_tiles: object  # addresses of `row_tiles`
    counters: object  # (3 + 5·workers,) int64 zeros: jobs done, by kind; jobs drawn, by kind and share
    s: float
    c: float
    momentum: float
    lr: float
    delta_lr: float
    activation: int
    transposed: bool
    has_base: bool
    has_delta: bool
    has_low_rank: bool
    has_bias: bool
    train: bool
    masked: bool
    update: bool
    input_gradient: bool


@part
def _count(total, size):
    return (total + size - 1) // size


@part
def _blocks(samples, transposed, array):
    """Samples of a block, samples of a job."""
    return sample_blocks(samples, TILE_ROWS if transposed else panel_width(array), array)


@part
def packed_sweep(samples, outputs, transposed, array):
    """Elements that packing gz for both of its products takes; `array` is any of its dtype."""
    size = _blocks(samples, transposed, array)[0]
    return _count(samples, size) * _count(outputs, DEPTH) * (operand_block(size, array) + panels_block(size))


@part
def _packing(task, size):
    """Where gz is packed: for the input gradient, and for the weight gradient."""
    N, outputs = task.gz.shape
    blocks, block = _count(N, size), operand_block(size, task.packed)
    operand = Packed(task.packed, 0, blocks, block if task.has_base and task.input_gradient else 0)
    return operand, Packed(task.packed, blocks * _count(outputs, DEPTH) * block, blocks, panels_block(size))


@part
def _prepare(task, n0, n1, size, has_gradient, work):
    """gz = gy·act'(z), packed, and t = s gz Bᵀ for n0 <= n < n1, samples of one block."""
    if task.activation != elementwise.IDENTITY:
        for n in range(n0, n1):
            slope_row(task.gz[n], task.gy[n], task.z[n], task.activation)
    gz, s = task.gz, task.gz.dtype.type(task.s)
    operand, panels = _packing(task, size)
    block, start = n0 // size, n0 % size
    for k in range(0, gz.shape[1] if task.has_base else 0, DEPTH):
        end = min(k + DEPTH, gz.shape[1])
        at, panels_at = packed_at(operand, block, k // DEPTH), packed_at(panels, block, k // DEPTH)
        if task.input_gradient and task.transposed:
            pack_rows(operand.array[at + start * ROW_STRIDE :], plain(gz), n0, n1, k, end)
        elif task.input_gradient:
            pack_columns_transposed(operand.array[at + start * DEPTH :], gz, k, end, n0, n1)
        if has_gradient and task.transposed:
            pack_steps(panels.array[panels_at:], size, start, gz, k, end, n0, n1)
        elif has_gradient:
            pack_columns(panels.array[panels_at:], size, start, plain(gz), n0, n1, k, end)
    if not task.has_low_rank:
        return
    (rank, inner), samples = task.B.shape, Samples(n0, n1, size)
    for r in range(0, rank, BLOCK):
        end = min(r + BLOCK, rank)
        if task.transposed:
            factor_along_rows(work, True, gz, operand, samples, task.B, r, end)
            store_block(task.t, n0, n1, r, end, work.c, s)
        else:
            rows, none = Block(r, end, 0, inner), nothing_next(task.B, work.b)
            across_rows(work, True, plain(task.B), rows, gz, operand, samples, -1, none)
            transpose_block(work.g, work.c, end - r, n1 - n0)
            store_block(task.t, n0, n1, r, end, work.g, s)


@part
def _finish_input(task, samples, i0, i1, work):
    """Add t Aᵀ to the blocks of the input gradient in C, and store them; C is transposed for a Dense layer."""
    n0, n1, size = samples
    low = task.has_low_rank and not task.masked
    one = task.gx.dtype.type(1)
    if low:
        A, rank, none = task.A, task.A.shape[1], Packed(task.packed, 0, 0, 0)
        if task.transposed:
            factor_along_rows(work, False, task.t, none, samples, A, i0, i1)
        else:
            block, after = Block(i0, i1, 0, rank), nothing_next(A, work.b)
            across_rows(work, not task.has_base, plain(A), block, task.t, none, samples, -1, after)
    elif not task.has_base:
        work.c[:] = 0
    for n in range(n0, n1, size):
        end = min(n + size, n1)
        block = work.c[block_at(n0, n, size) :]
        if not task.transposed:
            transpose_block(work.g, block, i1 - i0, end - n)
            block = work.g
        store_block(task.gx, n, end, i0, i1, block, one)


@part
def _matrix(task):
    return Matrix(task.S, task.D, task.gx.dtype.type(task.c), task.has_delta)


@part
def _input_product(task, samples, block, at, after, work):
    """C (+)= gz Mᵀ over a block of M; transposed, [in][n], for a Dense layer."""
    operand = _packing(task, samples.size)[0]
    if task.transposed:
        along_rows(work, block.p0 == 0, task.gz, operand, samples, _matrix(task), block, at, after)
    elif task.has_base:
        across_rows(work, block.q0 == 0, _matrix(task), block, task.gz, operand, samples, at, after)


@part
def _apply_gradient(task, p0, p1, q0, q1, g):
    """Use the block of G = Lᵀ R in scratch: store it, or V = mV + (1-m) c G, D -= delta_lr V, W -= lr G."""
    kind = task.gx.dtype.type
    momentum, gain = kind(task.momentum), kind((1 - task.momentum) * task.c)
    lr, delta_lr, c = kind(task.lr), kind(task.delta_lr), kind(task.c)
    for p in range(p1 - p0):
        block = g[p * C_STRIDE : p * C_STRIDE + q1 - q0]
        if task.update:
            if task.has_delta:
                momentum_row(task.V[p0 + p, q0:q1], task.D[p0 + p, q0:q1], block, momentum, gain, delta_lr)
            if task.train:
                descend_row(task.S[p0 + p, q0:q1], block, lr)
        else:
            if task.has_delta:
                scale_row(task.dD[p0 + p, q0:q1], block, c)
            if task.train:
                scale_row(task.dW[p0 + p, q0:q1], block, kind(1))


@part
def _fused_gradient(task, i0, i1, k0, k1, size, todo, work):
    """Compute and use G for the inputs i0 <= i < i1 and the outputs k0 <= k < k1 of a block, all samples at once.

    By strips of tiles that stay in the level-1 cache. The inputs' operand is packed by the first call of a job.
    """
    N = task.x.shape[0]
    packing = _packing(task, size)[1]
    panels = packing.array[packed_at(packing, 0, k0 // DEPTH) :]
    if k0 == 0:
        if task.transposed:
            pack_columns(work.r, size, 0, plain(task.x), 0, N, i0, i1)
        else:
            pack_steps(work.l, size, 0, task.x, i0, i1, 0, N)
    p0, p1, q0, q1, l, r = i0, i1, k0, k1, work.l, panels
    if task.transposed:
        p0, p1, q0, q1, l, r = k0, k1, i0, i1, panels, work.r
    panels_across = _count(q1 - q0, panel_width(r))
    calls = _count(p1 - p0, TILE_ROWS) * panels_across
    pace = pace_of(todo, todo.p0, todo.p1, stream_flow(todo, calls), N, calls)
    for p in range(p0, p1, TILE_ROWS):
        height, call = min(TILE_ROWS, p1 - p), (p - p0) // TILE_ROWS * panels_across
        strip = Strip(p - p0, height, q1 - q0, N, size)
        multiply_strip(work, l, r, strip, At(work.g, 0), True, todo, pace, call)
        _apply_gradient(task, p, p + height, q0, q1, work.g)


@part
def _gradient_job(task, i0, i1, k0, k1, size, work):
    """Compute and use G for the inputs i0 <= i < i1 of a block and the outputs k0 <= k < k1 of several."""
    N, packing = task.x.shape[0], _packing(task, size)[1]
    for n in range(0, max(N, 1), size):  # without samples G is zero, and used
        end = min(n + size, N)
        if task.transposed:
            pack_columns(work.r, size, 0, plain(task.x), n, end, i0, i1)
        else:
            pack_steps(work.l, size, 0, task.x, i0, i1, n, end)
        for k in range(k0, k1, DEPTH):
            last, panels = min(k + DEPTH, k1), packing.array[packed_at(packing, n // size, k // DEPTH) :]
            c = work.c[(k - k0) // DEPTH * PART :]
            p0, p1, q0, q1, l, r = i0, i1, k, last, work.l, panels
            if task.transposed:
                p0, p1, q0, q1, l, r = k, last, i0, i1, panels, work.r
            meanwhile = nothing_next(task.D, task.packed)
            if end == N and task.update and task.has_delta:
                meanwhile = fetch_next(task.V, task.D, p0, p1, q0, q1, task.packed, 0, 0)
            if k + DEPTH < k1:
                meanwhile = with_stream(meanwhile, packed_at(packing, n // size, k // DEPTH + 1), packing.block)
            elif end < N:
                meanwhile = with_stream(meanwhile, packed_at(packing, n // size + 1, k0 // DEPTH), packing.block)
            multiply_steps(work, l, r, size, p1 - p0, q1 - q0, end - n, c, n == 0, meanwhile)
            if end == N:
                _apply_gradient(task, p0, p1, q0, q1, c)


@part
def _cross_job(task, samples, i0, i1, fused, work):
    """A block of the input gradient; where `fused` also the rows or columns of V, D and W that belong to it."""
    outputs, size, M, none = task.gz.shape[1], samples.size, _matrix(task), nothing_next(task.S, task.packed)
    if not fused:
        whole = Block(0, outputs, i0, i1) if task.transposed else Block(i0, i1, 0, outputs)
        _input_product(task, samples, whole, -1, none, work)
    operand, panels = _packing(task, size)
    for k0 in range(0, outputs if fused else 0, DEPTH):
        k1 = min(k0 + DEPTH, outputs)
        end, block = min(k1 + DEPTH, outputs), k0 // DEPTH
        at, length = packed_at(panels, 0, block), panels.block
        here = block % 2 * PART
        target = work.w[PART - here :]
        part_of_M = Block(k0, k1, i0, i1) if task.transposed else Block(i0, i1, k0, k1)
        # With the input product the next block of M is packed, with the gradient this block's V and D are fetched.
        if k1 == outputs:
            after = stream_next(task.S, task.packed, at, length)
        elif task.transposed:
            after = Next(COLUMNS, M, k1, end, i0, i1, target, task.packed, at, length)
        else:
            after = Next(ROWS, M, i0, i1, k1, end, target, task.packed, at, length)
        _input_product(task, samples, part_of_M, here if k0 else -1, after, work)
        at, length = packed_at(operand, 0, block + 1), operand.block
        if task.update and task.has_delta:
            p0, p1, q0, q1 = part_of_M
            after = fetch_next(task.V, task.D, p0, p1, q0, q1, task.packed, at, length)
        else:
            after = stream_next(task.S, task.packed, at, length)
        _fused_gradient(task, i0, i1, k0, k1, size, after, work)
    _finish_input(task, samples, i0, i1, work)


@part
def _factor_block(out, transposed, T, X, r0, q0, work):
    """A block of dB = uᵀ gz, or of dA = (tᵀ x)ᵀ."""
    r1, q1 = min(r0 + BLOCK, T.shape[1]), min(q0 + BLOCK, X.shape[1])
    factor_gradient(work, T, r0, r1, X, q0, q1)
    one = out.dtype.type(1)
    if transposed:
        transpose_block(work.g, work.c, r1 - r0, q1 - q0)
        store_block(out, q0, q1, r0, r1, work.g, one)
    else:
        store_block(out, r0, r1, q0, q1, work.c, one)


@part
def _bias_block(task, o0, o1):
    """db = Σ_n gz."""
    db = task.db[o0:o1]
    db[:] = 0
    for n in range(task.gz.shape[0]):
        gz = task.gz[n, o0:o1]
        for o in range(db.shape[0]):
            db[o] += gz[o]


@part
def _factor_counts(task):
    """Jobs of dA, dB and db."""
    inputs, outputs, rank = _count(task.x.shape[1], BLOCK), _count(task.gz.shape[1], BLOCK), task.t.shape[1]
    blocks = _count(rank, BLOCK) if task.has_low_rank else 0
    return inputs * blocks, outputs * blocks, outputs if task.train and task.has_bias else 0


@part
def factor_jobs(task):
    """Jobs of the factors' gradients and the bias's."""
    dA, dB, biases = _factor_counts(task)
    return dA + dB + biases


@part
def factor_job(task, job, work):
    """One of these jobs."""
    dA, dB, _ = _factor_counts(task)
    blocks = _count(task.t.shape[1], BLOCK)
    if job < dA:
        _factor_block(task.dA, True, task.t, task.x_low, job % blocks * BLOCK, job // blocks * BLOCK, work)
    elif job < dA + dB:
        job -= dA
        _factor_block(task.dB, False, task.u, task.gz, job % blocks * BLOCK, job // blocks * BLOCK, work)
    else:
        job -= dA + dB
        _bias_block(task, job * BLOCK, min(task.gz.shape[1], job * BLOCK + BLOCK))


@part
def sweep_worker(task, worker, workers):
    """Draw jobs until none is left."""
    work = scratch_work(task.scratch[worker], task.tile_rows, task.tile_steps)
    N, inputs = task.x.shape
    outputs = task.gz.shape[1]
    width = panel_width(task.gz)

    has_gradient = task.has_delta or task.train
    fused = has_gradient and task.input_gradient and N <= BLOCK
    size, samples = _blocks(N, task.transposed, task.gz)
    piece = block_size(size, width, _count(2 * workers, max(1, _count(N, size))), BLOCK)
    pieces = _count(size, piece)
    prepares = _count(N, size) * pieces
    quantum = width if task.transposed else TILE_ROWS
    groups = max(1, _count(N, samples))
    features = block_size(inputs, quantum, job_pieces(inputs, groups, workers, not task.transposed), BLOCK)
    crosses = groups * _count(inputs, features) if task.input_gradient else 0
    factors = factor_jobs(task)
    i_size = block_size(inputs, quantum, 1, BLOCK)
    k_size = block_size(outputs, DEPTH, 4 * workers // _count(inputs, i_size), long_blocks(task.gz) * DEPTH)
    gradients = _count(inputs, i_size) * _count(outputs, k_size) if has_gradient and not fused else 0

    while True:
        job = draw(task.counters, DRAWN, prepares, worker, workers)
        if job < 0:
            break
        block = job // pieces * size
        n0 = block + job % pieces * piece
        n1 = min(n0 + piece, block + size, N)
        if n0 < n1:
            _prepare(task, n0, n1, size, has_gradient, work)
        fetch_add(task.counters, PREPARED, 1)
    wait_for(task.counters, PREPARED, prepares)
    while True:
        job = draw(task.counters, DRAWN + workers, crosses, worker, workers)
        if job < 0:
            break
        n0, i0 = job % groups * samples, job // groups * features
        of = Samples(n0, min(N, n0 + samples), size)
        _cross_job(task, of, i0, min(inputs, i0 + features), fused, work)
        fetch_add(task.counters, CROSSED, 1)
    while True:
        job = draw(task.counters, DRAWN + 2 * workers, factors, worker, workers)
        if job < 0:
            break
        factor_job(task, job, work)
    if gradients and task.update:
        wait_for(task.counters, CROSSED, crosses)
    while True:
        job = draw(task.counters, DRAWN + 3 * workers, gradients, worker, workers)
        if job < 0:
            break
        i0, k0 = job // _count(outputs, k_size) * i_size, job % _count(outputs, k_size) * k_size
        _gradient_job(task, i0, min(inputs, i0 + i_size), k0, min(outputs, k0 + k_size), size, work)


_entry = entry(sweep_worker)


@kernel
def sweep(task, workers, board, helpers):
    """Work off a `SweepTask` in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)
