"""Backward: every gradient, and where asked the update of V, D and W, in one parallel region.

    gz = gy·act'(z)      t = s gz Bᵀ      dB = uᵀ gz      dA = (mask∘x)ᵀ t      db = Σ gz
    gx = gz (W + c D)ᵀ + t Aᵀ             G = xᵀ gz: dW = G, dD = c G

With S [P, Q] stored, L [N, P] and R [N, Q]: Dense has L = x, R = gz; FullyConnected has L = gz, R = x; G = Lᵀ R in
either. A block of G lives in scratch until it has been used, so the gradient never exists as a matrix.

Workers draw jobs, kind after kind: samples (gz, packed for the weight gradient, and t), input gradient,
factors and bias, weight gradient. A kind that needs another waits until that one's blocks are counted as done. Up to
`BLOCK` samples the input and weight gradients are one kind: a job owns whole rows (Dense) or columns (FullyConnected)
of S, those whose input gradient it computes, and after every `FUSED` outputs updates what it took their part of the
product from. Where nobody reads the input gradient its jobs are left out.
"""

from typing import NamedTuple

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.functions import slope_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.machine import BLOCK, DEPTH, TILE_ROWS
from nblora.kernels.common.microkernel import At
from nblora.kernels.common.rows import descend_row, momentum_row, scale_row
from nblora.kernels.common.threads import entry, launch

from .gradients import Packed, Strip, factor_gradient, multiply_steps, multiply_strip, packed_at, panels_block
from .packing import Matrix, pack_columns, pack_steps, plain
from .products import Grid, Job, Product, depth_of, grid_of, job_at, multiply, multiply_piece
from .work import (
    C_STRIDE,
    PART,
    Fetch,
    block_size,
    fetch_nothing,
    long_blocks,
    pace_of,
    panel_width,
    scratch_work,
    store_block,
    transpose_block,
    with_stream,
)

FUSED = 2 * DEPTH
"""Outputs after which a job that computes both goes on from the input gradient to the weight's: what W, D and V of
them take stays in the level-2 cache."""
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
    """Samples of a block of the gradient's operands."""
    return block_size(samples, TILE_ROWS if transposed else panel_width(array), 1, BLOCK)


@part
def packed_sweep(samples, outputs, transposed, array):
    """Elements that packing gz for the weight's gradient takes; `array` is any of its dtype."""
    size = _blocks(samples, transposed, array)
    return _count(samples, size) * _count(outputs, DEPTH) * panels_block(size)


@part
def _packing(task, size):
    """Where gz is packed for the weight's gradient."""
    return Packed(task.packed, 0, _count(task.gz.shape[0], size), panels_block(size))


@part
def _low_product(task):
    """t without its factor, gz Bᵀ."""
    B = task.B
    return Product(task.gz, plain(B), True, B.shape[1], task.gz, B, False, 0, task.t)


@part
def _input_product(task):
    """gx = gz Mᵀ + t Aᵀ; where x was masked the second term is the caller's."""
    M = Matrix(task.S, task.D, task.gx.dtype.type(task.c), task.has_delta)
    inner = task.gz.shape[1] if task.has_base else 0
    rank = task.A.shape[1] if task.has_low_rank and not task.masked else 0
    return Product(task.gz, M, not task.transposed, inner, task.t, task.A, True, rank, task.gx)


@part
def _prepare(task, n0, n1, size, has_gradient, work):
    """gz = gy·act'(z), packed, and t = s gz Bᵀ for n0 <= n < n1, samples of one block."""
    if task.activation != elementwise.IDENTITY:
        for n in range(n0, n1):
            slope_row(task.gz[n], task.gy[n], task.z[n], task.activation)
    gz, panels = task.gz, _packing(task, size)
    block, start = n0 // size, n0 % size
    for k in range(0, gz.shape[1] if has_gradient else 0, DEPTH):
        end, at = min(k + DEPTH, gz.shape[1]), packed_at(panels, block, k // DEPTH)
        if task.transposed:
            pack_steps(panels.array[at:], size, start, gz, k, end, n0, n1)
        else:
            pack_columns(panels.array[at:], size, start, plain(gz), n0, n1, k, end)
    if task.has_low_rank:
        low = _low_product(task)
        multiply(work, low, Job(n0, n1, 0, task.t.shape[1]), depth_of(low))
        for n in range(n0, n1):
            scale_row(task.t[n], task.t[n], gz.dtype.type(task.s))


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
def _fused_gradient(task, i0, i1, k0, k1, size, fetch, work):
    """Compute and use G for the inputs i0 <= i < i1 and the outputs k0 <= k < k1 of a block, all samples at once.

    By strips of tiles that stay in the level-1 cache. The inputs' operand is packed by the first call of a job.
    """
    N = task.x.shape[0]
    packing = _packing(task, size)
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
    pace = pace_of(fetch, N, calls)
    for p in range(p0, p1, TILE_ROWS):
        height, call = min(TILE_ROWS, p1 - p), (p - p0) // TILE_ROWS * panels_across
        strip = Strip(p - p0, height, q1 - q0, N, size)
        multiply_strip(work, l, r, strip, At(work.g, 0), True, fetch, pace, call)
        _apply_gradient(task, p, p + height, q0, q1, work.g)


@part
def _gradient_job(task, i0, i1, k0, k1, size, work):
    """Compute and use G for the inputs i0 <= i < i1 of a block and the outputs k0 <= k < k1 of several."""
    N, packing = task.x.shape[0], _packing(task, size)
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
            meanwhile = fetch_nothing(task.D, task.packed)
            if end == N and task.update and task.has_delta:
                meanwhile = Fetch(task.V, task.D, p0, p1, q0, q1, task.packed, 0, 0)
            if k + DEPTH < k1:
                meanwhile = with_stream(meanwhile, packed_at(packing, n // size, k // DEPTH + 1), packing.block)
            elif end < N:
                meanwhile = with_stream(meanwhile, packed_at(packing, n // size + 1, k0 // DEPTH), packing.block)
            multiply_steps(work, l, r, size, p1 - p0, q1 - q0, end - n, c, n == 0, meanwhile)
            if end == N:
                _apply_gradient(task, p0, p1, q0, q1, c)


@part
def _cross_job(task, product, job, depth, fused, size, work):
    """A job of the input gradient; where `fused` also the rows or columns of V, D and W that belong to it."""
    if not fused:
        multiply(work, product, job, depth)
        return
    total, outputs, none = product.inner + product.rank, task.gz.shape[1], fetch_nothing(task.S, task.packed)
    for k0 in range(0, total, depth):
        multiply_piece(work, product, job, depth, k0, min(k0 + depth, total))
        for k in range(k0, min(k0 + depth, outputs), DEPTH):
            end, after = min(k + DEPTH, outputs), none
            if task.update and task.has_delta:
                p0, p1, q0, q1 = (k, end, job.j0, job.j1) if task.transposed else (job.j0, job.j1, k, end)
                after = Fetch(task.V, task.D, p0, p1, q0, q1, task.packed, 0, 0)
            _fused_gradient(task, job.j0, job.j1, k, end, size, after, work)


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
    size = _blocks(N, task.transposed, task.gz)
    piece = block_size(size, width, _count(2 * workers, max(1, _count(N, size))), BLOCK)
    pieces = _count(size, piece)
    prepares = _count(N, size) * pieces
    product = _input_product(task)
    depth = FUSED if fused else depth_of(product)
    grid = grid_of(product, depth, workers)
    if fused:  # all samples in a job, and columns that a strip of the gradient can hold
        columns = min(grid.columns, BLOCK)
        grid = Grid(max(N, 1), columns, 1, _count(inputs, columns))
    crosses = grid.jobs if task.input_gradient else 0
    factors = factor_jobs(task)
    i_size = block_size(inputs, width if task.transposed else TILE_ROWS, 1, BLOCK)
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
        _cross_job(task, product, job_at(product, grid, job), depth, fused, size, work)
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
