"""Rows of tables on the CPU.

Gradients of rows that were taken more than once are added up by the one worker that owns the row, in the order of the
samples, so results repeat bit for bit. `order` holds the samples sorted by their row, and those of row i are
order[starts[i]] to order[starts[i + 1] - 1].
"""

from typing import NamedTuple

from nblora.kernels.common.atomics import draw
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.rows import accumulate_row, copy_row, descend_row, momentum_row, scale_row
from nblora.kernels.common.threads import entry, launch

ROWS = 32
"""Rows of a job."""

SUM, DESCEND, FOLLOW = range(3)


class TakeTask(NamedTuple):
    """target[n] = factor·first[i] + second_factor·second[i], i = indices[n], the second where `has_second`, onto what
    is there where `add`."""

    first: object  # (count, features)
    second: object  # (count, features)
    indices: object  # (N,) int64
    target: object  # (N, features), written
    counters: object  # (workers,) int64 zeros: jobs drawn
    factor: float
    second_factor: float
    has_second: bool
    add: bool


@part
def _take_row(target, source, factor, add):
    """target (+)= factor·source."""
    if add:
        for j in range(target.shape[0]):
            target[j] += factor * source[j]
    else:
        scale_row(target, source, factor)


@part
def _take_worker(task, worker, workers):
    kind, samples = task.target.dtype.type, task.indices.shape[0]
    factor, second = kind(task.factor), kind(task.second_factor)
    while True:
        job = draw(task.counters, 0, (samples + ROWS - 1) // ROWS, worker, workers)
        if job < 0:
            break
        for n in range(job * ROWS, min(samples, job * ROWS + ROWS)):
            i = task.indices[n]
            _take_row(task.target[n], task.first[i], factor, task.add)
            if task.has_second:
                _take_row(task.target[n], task.second[i], second, True)


_take_entry = entry(_take_worker)


@kernel
def take(task, workers, board, helpers):
    """Work off a `TakeTask` in so many shares, with helpers that stand by at the board."""
    function, address = _take_entry(task)
    launch(function, address, workers, board, helpers)


class RowsTask(NamedTuple):
    """With G[i] = Σ gradient[n] over the samples of row i: SUM target = factor G; DESCEND target -= lr G;
    FOLLOW V = m V + (1 - m) factor G, target -= lr V. Rows without samples have G = 0."""

    code: int
    gradient: object  # (N, features)
    order: object  # (N,) int64
    starts: object  # (count + 1,) int64
    sums: object  # (workers, features): a row's gradient
    velocity: object  # (count, features)
    target: object  # (count, features), updated
    counters: object  # (workers,) int64 zeros: jobs drawn
    factor: float
    momentum: float
    lr: float


@part
def _add_up(task, total, i):
    """total = Σ gradient[n] over the samples of row i."""
    begin, end = task.starts[i], task.starts[i + 1]
    if begin == end:
        total[:] = 0
        return
    copy_row(total, task.gradient[task.order[begin]])
    for place in range(begin + 1, end):
        accumulate_row(total, task.gradient[task.order[place]])


@part
def _rows_worker(task, worker, workers):
    kind, count = task.target.dtype.type, task.target.shape[0]
    momentum, gain = kind(task.momentum), kind((1 - task.momentum) * task.factor)
    factor, lr, total = kind(task.factor), kind(task.lr), task.sums[worker]
    while True:
        job = draw(task.counters, 0, (count + ROWS - 1) // ROWS, worker, workers)
        if job < 0:
            break
        for i in range(job * ROWS, min(count, job * ROWS + ROWS)):
            if task.code == DESCEND and task.starts[i] == task.starts[i + 1]:
                continue
            _add_up(task, total, i)
            if task.code == SUM:
                scale_row(task.target[i], total, factor)
            elif task.code == DESCEND:
                descend_row(task.target[i], total, lr)
            else:
                momentum_row(task.velocity[i], task.target[i], total, momentum, gain, lr)


_rows_entry = entry(_rows_worker)


@kernel
def rows(task, workers, board, helpers):
    """Work off a `RowsTask` in so many shares, with helpers that stand by at the board."""
    function, address = _rows_entry(task)
    launch(function, address, workers, board, helpers)
