"""LayerNorm and RMSNorm over rows, forward and backward, each in one pass over memory a row.

y = (x - m) r w + b with m the row's mean and r = 1 / √(variance + eps); RMSNorm has no mean: m = 0 and the mean of the
squares in place of the variance. The variance is taken from the differences, so a large mean costs no digits.
"""

from typing import NamedTuple

import numpy as np

from nblora.kernels.common.atomics import draw
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.microkernel import once
from nblora.kernels.common.threads import entry, launch

ROWS = 16
"""Rows of a job."""
SHARES = 32
"""Parts in which the gradients of weight and bias are summed up: a fixed number, so that results do not depend on the
number of threads."""


class NormTask(NamedTuple):
    """Rows to normalise."""

    x: object  # (N, F)
    weight: object  # (F,)
    bias: object  # (F,)
    y: object  # (N, F), written
    stats: object  # (N, 2), written: m and r
    eps: float
    centred: bool  # LayerNorm
    has_bias: bool
    counters: object  # (workers,) int64 zeros


class NormGradientTask(NamedTuple):
    """The way back."""

    gy: object  # (N, F)
    x: object  # (N, F)
    stats: object  # (N, 2)
    weight: object  # (F,)
    gx: object  # (N, F), written where `wants_input`
    parts: object  # (2, SHARES, F) zeros, written where `wants_own`: sums of gw and of gb
    centred: bool
    wants_input: bool
    wants_own: bool
    counters: object  # (workers,) int64 zeros


@part(fastmath={"contract", "reassoc"})
def _sum(x):
    once()
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        total += x[j]
    return total


@part(fastmath={"contract", "reassoc"})
def _sum_of_squares(x, mean):
    once()
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        d = x[j] - mean
        total += d * d
    return total


@part
def _scale(y, x, weight, mean, gain):
    once()
    for j in range(y.shape[0]):
        y[j] = (x[j] - mean) * gain * weight[j]


@part
def _scale_and_shift(y, x, weight, bias, mean, gain):
    once()
    for j in range(y.shape[0]):
        y[j] = (x[j] - mean) * gain * weight[j] + bias[j]


@part
def _norm_row(task, n):
    x, kind = task.x[n], task.x.dtype.type
    count, mean = kind(x.shape[0]), kind(0)
    if task.centred:
        mean = _sum(x) / count
    gain = kind(1) / np.sqrt(_sum_of_squares(x, mean) / count + kind(task.eps))
    task.stats[n, 0] = mean
    task.stats[n, 1] = gain
    if task.has_bias:
        _scale_and_shift(task.y[n], x, task.weight, task.bias, mean, gain)
    else:
        _scale(task.y[n], x, task.weight, mean, gain)


@part
def _norm_worker(task, worker, workers):
    rows = task.x.shape[0]
    while True:
        job = draw(task.counters, 0, (rows + ROWS - 1) // ROWS, worker, workers)
        if job < 0:
            break
        for n in range(job * ROWS, min(rows, job * ROWS + ROWS)):
            _norm_row(task, n)


_norm_entry = entry(_norm_worker)


@kernel
def norm(task, workers, board, helpers):
    """Work off a `NormTask` in so many shares, with helpers that stand by at the board."""
    function, address = _norm_entry(task)
    launch(function, address, workers, board, helpers)


@part(fastmath={"contract", "reassoc"})
def _weighted_sums(gy, x, weight, mean, gain):
    """Σ g w and Σ g w x̂."""
    once()
    plain, along = gy.dtype.type(0), gy.dtype.type(0)
    for j in range(gy.shape[0]):
        value = gy[j] * weight[j]
        plain += value
        along += value * ((x[j] - mean) * gain)
    return plain, along


@part
def _input_row(gx, gy, x, weight, mean, gain, plain, along):
    """gx = r (g w - plain - x̂ along)."""
    once()
    for j in range(gx.shape[0]):
        gx[j] = gain * (gy[j] * weight[j] - plain - (x[j] - mean) * gain * along)


@part
def _add_own_row(gw, gb, gy, x, mean, gain):
    once()
    for j in range(gw.shape[0]):
        gw[j] += gy[j] * ((x[j] - mean) * gain)
        gb[j] += gy[j]


@part
def _gradient_row(task, share, n):
    gy, x, kind = task.gy[n], task.x[n], task.x.dtype.type
    mean, gain = task.stats[n, 0], task.stats[n, 1]
    if task.wants_input:
        plain, along = _weighted_sums(gy, x, task.weight, mean, gain)
        count = kind(x.shape[0])
        plain = plain / count if task.centred else kind(0)
        _input_row(task.gx[n], gy, x, task.weight, mean, gain, plain, along / count)
    if task.wants_own:
        _add_own_row(task.parts[0, share], task.parts[1, share], gy, x, mean, gain)


@part
def _gradient_worker(task, worker, workers):
    rows = task.x.shape[0]
    while True:
        job = draw(task.counters, 0, SHARES, worker, workers)
        if job < 0:
            break
        for n in range(rows * job // SHARES, rows * (job + 1) // SHARES):
            _gradient_row(task, job, n)


_gradient_entry = entry(_gradient_worker)


@kernel
def norm_gradient(task, workers, board, helpers):
    """Work off a `NormGradientTask` in so many shares, with helpers that stand by at the board."""
    function, address = _gradient_entry(task)
    launch(function, address, workers, board, helpers)
