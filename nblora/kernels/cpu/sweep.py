"""Backward: every gradient, and where asked the update of V, D and W, in one parallel region.

    gz = gy·act'(z)      t = s gz Bᵀ      dB = uᵀ gz      dA = (mask∘x)ᵀ t      db = Σ gz
    gx = gz (W + c D)ᵀ + t Aᵀ             G = xᵀ gz: dW = G, dD = c G

With S [P, Q] stored, L [N, P] and R [N, Q]: Dense has L = x, R = gz; FullyConnected has L = gz, R = x; G = Lᵀ R in
either. A block of G lives in scratch until it has been used, so the gradient never exists as a matrix.

Workers draw jobs from a counter, kind after kind: samples (gz and t), input gradient, factors and bias, weight
gradient. A kind that needs another waits until that one's blocks are counted as done. Up to `BLOCK` samples the input
and weight gradients are one kind: a job owns whole rows (Dense) or columns (FullyConnected) of S, those whose input
gradient it computes, and updates each tile right after it took its part of the product.
"""

from typing import NamedTuple

from .. import elementwise
from ..jit import kernel, part
from .atomics import fetch_add, wait_for
from .functions import slope_row
from .machine import BLOCK, DEPTH, TILE_ROWS
from .microkernel import lanes
from .packing import pack_columns, pack_steps
from .products import (
    C_STRIDE,
    across_rows,
    along_rows,
    block_at,
    block_size,
    factor_along_rows,
    gradient,
    long_blocks,
    multiply_steps,
    sample_blocks,
    scratch_work,
    store_block,
    transpose_block,
)
from .threads import call, entry, launch

momentum_step = part(elementwise.momentum_step)
descend = part(elementwise.descend)

DRAWN, PREPARED, CROSSED = range(3)


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
    gx: object  # (N, in), written
    dA: object  # (in, rank), written
    dB: object  # (rank, out), written
    db: object  # (out,), written where `train` and `has_bias`
    dW: object  # stored, written where `train` and not `update`
    dD: object  # stored, written where `has_delta` and not `update`
    scratch: object  # (workers, PARTS·PART)
    tile_rows: int  # addresses of `tile_functions`
    tile_steps: int
    counters: object  # (3,) int64 zeros
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


@part
def _prepare_job(task, n0, n1, work):
    """gz = gy·act'(z) and t = s gz Bᵀ for n0 <= n < n1."""
    if task.activation != elementwise.IDENTITY:
        for n in range(n0, n1):
            slope_row(task.gz[n], task.gy[n], task.z[n], task.activation)
    if task.has_low_rank:
        s = task.gz.dtype.type(task.s)
        rank, inner = task.B.shape
        for r in range(0, rank, BLOCK):
            end = min(r + BLOCK, rank)
            across_rows(work, True, task.B, task.B, s, False, r, end, task.gz, n0, n1, n1 - n0, 0, inner)
            transpose_block(work.g, work.c, end - r, n1 - n0)
            store_block(task.t, n0, n1, r, end, work.g, s)


@part
def _finish_input(task, n0, n1, size, i0, i1, prepared, work):
    """Add t Aᵀ to the blocks of the input gradient in C, and store them; C is transposed for a Dense layer."""
    low = task.has_low_rank and not task.masked
    one = task.gx.dtype.type(1)
    if low:
        wait_for(task.counters, PREPARED, prepared)
        if task.transposed:
            factor_along_rows(work, False, task.t, n0, n1, size, task.A, i0, i1)
        else:
            A, rank = task.A, task.A.shape[1]
            across_rows(work, not task.has_base, A, A, one, False, i0, i1, task.t, n0, n1, size, 0, rank)
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
def _input_product(task, n0, n1, size, i0, i1, k0, k1, work):
    """C (+)= gz Mᵀ over k0 <= k < k1 of the outputs; transposed, [in][n], for a Dense layer."""
    S, D, c, combined = task.S, task.D, task.gx.dtype.type(task.c), task.has_delta
    if task.transposed:
        along_rows(work, k0 == 0, task.gz, n0, n1, size, S, D, c, combined, i0, i1, k0, k1)
    elif task.has_base:
        across_rows(work, k0 == 0, S, D, c, combined, i0, i1, task.gz, n0, n1, size, k0, k1)


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
                V, D = task.V[p0 + p, q0:q1], task.D[p0 + p, q0:q1]
                for q in range(block.shape[0]):
                    V[q] = momentum_step(V[q], block[q], momentum, gain)
                    D[q] = descend(D[q], V[q], delta_lr)
            if task.train:
                S = task.S[p0 + p, q0:q1]
                for q in range(block.shape[0]):
                    S[q] = descend(S[q], block[q], lr)
        else:
            if task.has_delta:
                dD = task.dD[p0 + p, q0:q1]
                for q in range(block.shape[0]):
                    dD[q] = c * block[q]
            if task.train:
                dW = task.dW[p0 + p, q0:q1]
                for q in range(block.shape[0]):
                    dW[q] = block[q]


@part
def _weight_gradient(task, p0, p1, q0, q1, new_rows, new_columns, work):
    """Compute and use G for p0 <= p < p1, q0 <= q < q1, by strips of tiles that stay in the level-1 cache.

    Operands that the call before has packed are not packed again. Beyond `DEPTH` samples whole blocks accumulate.
    """
    L, R = (task.gz, task.x) if task.transposed else (task.x, task.gz)
    N = L.shape[0]
    if N > DEPTH:
        gradient(work, L, p0, p1, R, q0, q1, BLOCK)
        for q in range(q0, q1, BLOCK):
            _apply_gradient(task, p0, p1, q, min(q + BLOCK, q1), work.c[block_at(q0, q, BLOCK) :])
        return
    if new_rows:
        pack_steps(work.l, L, p0, p1, 0, N)
    if new_columns:
        pack_columns(work.r, R, R, work.r.dtype.type(0), False, 0, N, q0, q1)
    for p in range(p0, p1, TILE_ROWS):
        end = min(p + TILE_ROWS, p1)
        multiply_steps(work, p - p0, end - p0, q1 - q0, N, work.g, True)
        _apply_gradient(task, p, end, q0, q1, work.g)


@part
def _cross_job(task, n0, n1, size, i0, i1, prepared, fused, work):
    """A block of the input gradient; where `fused` also the rows or columns of V, D and W that belong to it."""
    outputs = task.gz.shape[1]
    wait_for(task.counters, PREPARED, prepared if task.activation != elementwise.IDENTITY else 0)
    for k0 in range(0, outputs, DEPTH):
        k1 = min(k0 + DEPTH, outputs)
        _input_product(task, n0, n1, size, i0, i1, k0, k1, work)
        if fused:
            p0, p1, q0, q1 = (k0, k1, i0, i1) if task.transposed else (i0, i1, k0, k1)
            first = k0 == 0
            _weight_gradient(task, p0, p1, q0, q1, task.transposed or first, not task.transposed or first, work)
    _finish_input(task, n0, n1, size, i0, i1, prepared, work)


@part
def _factor_job(out, L, R, p0, q0, work):
    """A block of dA or dB: out[p, q] = Σ_n L[n, p] R[n, q]."""
    p1, q1 = min(p0 + BLOCK, out.shape[0]), min(q0 + BLOCK, out.shape[1])
    gradient(work, L, p0, p1, R, q0, q1, BLOCK)
    store_block(out, p0, p1, q0, q1, work.c, out.dtype.type(1))


@part
def _bias_job(task, o0, o1):
    """db = Σ_n gz."""
    db = task.db[o0:o1]
    db[:] = 0
    for n in range(task.gz.shape[0]):
        gz = task.gz[n, o0:o1]
        for o in range(db.shape[0]):
            db[o] += gz[o]


@part
def _count(total, size):
    return (total + size - 1) // size


@part
def sweep_worker(task, worker, workers):
    """Draw jobs until none is left."""
    work = scratch_work(task.scratch[worker], task.tile_rows, task.tile_steps)
    N, inputs = task.x.shape
    outputs, rank = task.gz.shape[1], task.t.shape[1]
    P, Q = (outputs, inputs) if task.transposed else (inputs, outputs)
    width = 2 * lanes(task.gz)

    has_gradient = task.has_delta or task.train
    fused = has_gradient and N <= BLOCK
    few = block_size(N, lanes(task.gz), 2 * workers, BLOCK)
    prepares = _count(N, few) if task.has_low_rank or task.activation != elementwise.IDENTITY else 0
    quantum = TILE_ROWS if task.transposed else width
    size, samples = sample_blocks(N, quantum, task.gz)
    pieces = 4 * workers * samples // max(N, 1)
    features = block_size(inputs, width if task.transposed else TILE_ROWS, min(pieces, inputs // 96), BLOCK)
    across = _count(inputs, features)
    crosses = max(1, _count(N, samples)) * across
    dA = _count(inputs, BLOCK) * _count(rank, BLOCK) if task.has_low_rank else 0
    dB = _count(outputs, BLOCK) * _count(rank, BLOCK) if task.has_low_rank else 0
    biases = _count(outputs, BLOCK) if task.train and task.has_bias else 0
    p_size = block_size(P, TILE_ROWS, 1, BLOCK)
    q_size = block_size(Q, BLOCK, 4 * workers // _count(P, p_size), long_blocks(task.gz) * BLOCK)
    gradients = _count(P, p_size) * _count(Q, q_size) if has_gradient and not fused else 0

    while True:
        job = fetch_add(task.counters, DRAWN, 1)
        if job < prepares:
            _prepare_job(task, job * few, min(N, job * few + few), work)
            fetch_add(task.counters, PREPARED, 1)
            continue
        job -= prepares
        if job < crosses:
            n0, i0 = job // across * samples, job % across * features
            _cross_job(task, n0, min(N, n0 + samples), size, i0, min(inputs, i0 + features), prepares, fused, work)
            fetch_add(task.counters, CROSSED, 1)
            continue
        job -= crosses
        wait_for(task.counters, PREPARED, prepares)
        if job < dA:
            across_rank = _count(rank, BLOCK)
            _factor_job(task.dA, task.x_low, task.t, job // across_rank * BLOCK, job % across_rank * BLOCK, work)
            continue
        job -= dA
        if job < dB:
            across_outputs = _count(outputs, BLOCK)
            _factor_job(task.dB, task.u, task.gz, job // across_outputs * BLOCK, job % across_outputs * BLOCK, work)
            continue
        job -= dB
        if job < biases:
            _bias_job(task, job * BLOCK, min(outputs, job * BLOCK + BLOCK))
            continue
        job -= biases
        if job >= gradients:
            break
        if task.update:
            wait_for(task.counters, CROSSED, crosses)
        p0, q0 = job // _count(Q, q_size) * p_size, job % _count(Q, q_size) * q_size
        _weight_gradient(task, p0, min(P, p0 + p_size), q0, min(Q, q0 + q_size), True, True, work)


_entry = entry(sweep_worker)


@kernel
def sweep(task, workers):
    """Run a `SweepTask` with so many workers, in the calling thread where it is one."""
    function, address = _entry(task)
    if workers == 1:
        call(function, address, 0, 1)
    else:
        launch(function, address, workers)
