"""In-place updates of whole arrays, merging, and the low-rank input gradient under dropout.

The element-wise updates are one kernel with a code, so that a process loads one; `momentum` here updates from a
gradient held in memory, the fused form is in `sweep`.
"""

import math
from typing import NamedTuple

import numpy as np

from nblora.kernels.common.atomics import draw
from nblora.kernels.common.threads import entry, launch

from ..common import elementwise
from ..common.jit import kernel, part

SGD, MOMENTUM, ADAMW, ADD, SCALE, MULTIPLY = range(6)

CHUNK = 1 << 15
"""Elements of a chunk: 128 KB of float32, so that a chunk of each operand stays in the level-2 cache."""

momentum_step = part(elementwise.momentum_step)
descend = part(elementwise.descend)


@part
def _adamw_chunk(p, g, first, second, lr, beta1, beta2, eps, weight_decay, step):
    """AdamW with decoupled decay (Loshchilov and Hutter, 2019)."""
    kind = p.dtype.type
    keep = kind(1 - lr * weight_decay)
    size = kind(lr / (1 - beta1**step))
    correction = kind(1 / (1 - beta2**step))
    b1, b2, gain1, gain2, small = kind(beta1), kind(beta2), kind(1 - beta1), kind(1 - beta2), kind(eps)
    for i in range(p.shape[0]):
        first[i] = b1 * first[i] + gain1 * g[i]
        second[i] = b2 * second[i] + gain2 * g[i] * g[i]
        p[i] = keep * p[i] - size * first[i] / (math.sqrt(second[i] * correction) + small)


@part
def _update_chunk(code, p, g, first, second, scalars):
    kind = p.dtype.type
    if code == SGD:
        lr = kind(scalars[0])
        for i in range(p.shape[0]):
            p[i] = descend(p[i], g[i], lr)
    elif code == MOMENTUM:
        lr, momentum, gain = kind(scalars[0]), kind(scalars[1]), kind(1 - scalars[1])
        for i in range(p.shape[0]):
            first[i] = momentum_step(first[i], g[i], momentum, gain)
            p[i] = descend(p[i], first[i], lr)
    elif code == ADAMW:
        lr, beta1, beta2, eps, weight_decay, step = scalars
        _adamw_chunk(p, g, first, second, lr, beta1, beta2, eps, weight_decay, step)
    elif code == ADD:
        for i in range(p.shape[0]):
            p[i] += g[i]
    elif code == SCALE:
        factor = kind(scalars[0])
        for i in range(p.shape[0]):
            p[i] *= factor
    else:
        for i in range(p.shape[0]):
            p[i] *= g[i]


class UpdateTask(NamedTuple):
    """Flat arrays, updated in place by the rule `code`.

    SGD: p -= lr g. MOMENTUM: first = m first + (1 - m) g, p -= lr first. ADAMW: moments `first` and `second`.
    ADD: p += g. SCALE: p *= factor. MULTIPLY: p *= g.
    """

    code: int
    p: object
    g: object
    first: object
    second: object
    scalars: object  # six: lr or factor, m or beta1, beta2, eps, decay, step
    counters: object  # (workers,) int64 zeros: chunks drawn


@part
def _update_worker(task, worker, workers):
    chunks = (task.p.shape[0] + CHUNK - 1) // CHUNK
    while True:
        chunk = draw(task.counters, 0, chunks, worker, workers)
        if chunk < 0:
            break
        start, end = chunk * CHUNK, min(task.p.shape[0], chunk * CHUNK + CHUNK)
        arrays = task.p[start:end], task.g[start:end], task.first[start:end], task.second[start:end]
        _update_chunk(task.code, arrays[0], arrays[1], arrays[2], arrays[3], task.scalars)


_update_entry = entry(_update_worker)


@kernel
def update(task, workers, board, helpers):
    """Work off an `UpdateTask` in so many shares, with helpers that stand by at the board."""
    function, address = _update_entry(task)
    launch(function, address, workers, board, helpers)


@part(fastmath={"contract", "reassoc"})
def _chunk_sum_of_squares(chunk):
    total = 0.0
    for i in range(chunk.shape[0]):
        value = np.float64(chunk[i])
        total += value * value
    return total


@kernel
def sum_of_squares(array):
    """Σ a² of a flat array, in float64, chunk after chunk."""
    total = 0.0
    for start in range(0, array.shape[0], CHUNK):
        total += _chunk_sum_of_squares(array[start : min(array.shape[0], start + CHUNK)])
    return total


@part
def _merge_row(out, weight, delta, left, right, s, c, has_delta):
    for q in range(out.shape[0]):
        out[q] = weight[q] + c * delta[q] if has_delta else weight[q]
    for r in range(left.shape[0]):
        factor, row = s * left[r], right[r]
        for q in range(out.shape[0]):
            out[q] += factor * row[q]


MERGED_ROWS = 16
"""Rows of a job of `merge`."""


class MergeTask(NamedTuple):
    """out = S + c D + s·left·right, stored (P, Q): left (P, rank), right (rank, Q); for FullyConnected Bᵀ and Aᵀ."""

    out: object
    S: object
    D: object
    left: object
    right: object
    s: float
    c: float
    has_delta: bool
    counters: object  # (workers,) int64 zeros: jobs drawn


@part
def _merge_worker(task, worker, workers):
    kind, rows = task.out.dtype.type, task.out.shape[0]
    while True:
        job = draw(task.counters, 0, (rows + MERGED_ROWS - 1) // MERGED_ROWS, worker, workers)
        if job < 0:
            break
        for p in range(job * MERGED_ROWS, min(rows, job * MERGED_ROWS + MERGED_ROWS)):
            _merge_row(
                task.out[p], task.S[p], task.D[p], task.left[p], task.right, kind(task.s), kind(task.c), task.has_delta
            )


_merge_entry = entry(_merge_worker)


@kernel
def merge(task, workers, board, helpers):
    """Work off a `MergeTask` in so many shares, with helpers that stand by at the board."""
    function, address = _merge_entry(task)
    launch(function, address, workers, board, helpers)


@kernel(fastmath={"contract", "reassoc"})
def add_masked_low_rank(gx, mask, t, A):
    """gx += mask∘(t Aᵀ): gx and mask (N, in), t (N, rank), A (in, rank)."""
    for n in range(gx.shape[0]):
        t_row, gx_row, mask_row = t[n], gx[n], mask[n]
        for i in range(gx_row.shape[0]):
            A_row = A[i]
            total = gx.dtype.type(0)
            for r in range(t_row.shape[0]):
                total += t_row[r] * A_row[r]
            gx_row[i] += mask_row[i] * total
