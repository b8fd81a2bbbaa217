"""Losses and their gradients by the model's output; sums of rows are taken in float64, one after the other."""

import math
from typing import NamedTuple

import numpy as np

from ..common.atomics import draw
from ..common.functions import exponential
from ..common.jit import kernel, part
from ..common.microkernel import once
from ..common.threads import entry, launch

JOB = 1 << 13
"""Logits of a job of the cross-entropy."""


@kernel
def mean_squared_error(output, target, gradient, total):
    """total[0] = Σ (y - t)² / (N·out); gradient = 2 (y - t) / (N·out). All (N, out)."""
    samples, outputs = output.shape
    scale = 1.0 / (samples * outputs)
    value = 0.0
    for n in range(samples):
        for o in range(outputs):
            error = float(output[n, o]) - float(target[n, o])
            value += error * error
            gradient[n, o] = 2.0 * scale * error
    total[0] = value * scale


class CrossEntropyTask(NamedTuple):
    """losses[n] = log Σ_o exp z_no - z_n,label; gradient = scale (softmax(z) - onehot(label)). Zero where label < 0."""

    logits: object  # (N, out)
    labels: object  # (N,) int64
    gradient: object  # (N, out), written
    losses: object  # (N,) float64, written
    scale: float
    counters: object  # (workers,) int64 zeros


@part(fastmath={"nnan", "nsz", "reassoc"})
def _largest(row):
    """The largest element; with NaN among them any, since the sum is NaN then. Or it would not be vectorised."""
    once()
    most = row[0]
    for o in range(row.shape[0]):
        most = row[o] if row[o] > most else most
    return most


@part(fastmath={"contract", "reassoc"})
def _exponentials(target, row, largest):
    """target = exp(row - largest); return the sum, in float64: of a sample well learnt little is left beside 1."""
    once()
    total = 0.0
    for o in range(row.shape[0]):
        target[o] = exponential(row[o] - largest, row)
        total += np.float64(target[o])
    return total


@part
def _multiply(row, factor):
    once()
    for o in range(row.shape[0]):
        row[o] *= factor


@part
def _cross_entropy_row(task, n):
    row, gradient, label, kind = task.logits[n], task.gradient[n], task.labels[n], task.logits.dtype.type
    if label < 0:
        for o in range(row.shape[0]):
            gradient[o] = 0
        task.losses[n] = 0.0
        return
    largest = _largest(row)
    total = _exponentials(gradient, row, largest)
    task.losses[n] = math.log(total) + (np.float64(largest) - np.float64(row[label]))
    others = total - np.float64(gradient[label])
    _multiply(gradient, kind(task.scale / total))
    gradient[label] = -task.scale / total * others


@part
def _cross_entropy_worker(task, worker, workers):
    samples, outputs = task.logits.shape
    rows = max(1, JOB // outputs)
    while True:
        job = draw(task.counters, 0, (samples + rows - 1) // rows, worker, workers)
        if job < 0:
            break
        for n in range(job * rows, min(samples, job * rows + rows)):
            _cross_entropy_row(task, n)


_cross_entropy_entry = entry(_cross_entropy_worker)


@kernel
def softmax_cross_entropy(task, workers, board, helpers):
    """Work off a `CrossEntropyTask` in so many shares, with helpers that stand by at the board."""
    function, address = _cross_entropy_entry(task)
    launch(function, address, workers, board, helpers)


@kernel
def binary_cross_entropy(logits, target, gradient, total):
    """total[0] = Σ (max(z, 0) - z t + log(1 + exp(-|z|))) / (N·out); gradient = (sigmoid(z) - t) / (N·out).

    All (N, out); t in [0, 1].
    """
    samples, outputs = logits.shape
    scale = 1.0 / (samples * outputs)
    value = 0.0
    for n in range(samples):
        for o in range(outputs):
            z, t = float(logits[n, o]), float(target[n, o])
            e = math.exp(-abs(z))
            value += (z if z > 0 else 0.0) - z * t + math.log1p(e)
            probability = (1.0 if z >= 0 else e) / (1.0 + e)
            gradient[n, o] = scale * (probability - t)
    total[0] = value * scale
