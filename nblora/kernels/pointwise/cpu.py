"""Activations and gates over whole arrays, and the rotation of rotary positions.

One kernel with a code, so that a process loads one. Arrays are cut into chunks that stay in a level-1 cache.
"""

from typing import NamedTuple

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw
from nblora.kernels.common.functions import activate_row, slope_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.microkernel import once
from nblora.kernels.common.threads import entry, launch

ACTIVATE, SLOPE, GATE, GATE_SLOPE = range(4)
CHUNK = 1 << 11
"""Elements that a worker holds at a time: of four arrays in float64, 64 KB."""
JOB = 1 << 14
"""Elements of a job."""


class PointwiseTask(NamedTuple):
    """Flat arrays of one length; `code` is an activation's.

    ACTIVATE: y = act(x). SLOPE: y = g act'(x). GATE: y = act(x) u. GATE_SLOPE: y = g u act'(x), v = g act(x).
    """

    what: int
    code: int
    x: object
    u: object
    g: object
    y: object  # written
    v: object  # written
    counters: object  # (workers,) int64 zeros


@part
def _multiply(y, x):
    once()
    for i in range(y.shape[0]):
        y[i] *= x[i]


@part
def _copy(y, x):
    once()
    for i in range(y.shape[0]):
        y[i] = x[i]


@part
def _activate(y, x, code):
    if code == elementwise.IDENTITY:
        _copy(y, x)
    else:
        activate_row(y, x, code)


@part
def _slope(y, g, x, code):
    if code == elementwise.IDENTITY:
        _copy(y, g)
    else:
        slope_row(y, g, x, code)


@part
def _chunk(what, code, x, u, g, y, v):
    if what == ACTIVATE:
        _activate(y, x, code)
    elif what == SLOPE:
        _slope(y, g, x, code)
    elif what == GATE:
        _activate(y, x, code)
        _multiply(y, u)
    else:
        _activate(v, x, code)
        _multiply(v, g)
        _slope(y, g, x, code)
        _multiply(y, u)


@part
def _worker(task, worker, workers):
    size = task.x.shape[0]
    while True:
        job = draw(task.counters, 0, (size + JOB - 1) // JOB, worker, workers)
        if job < 0:
            break
        for start in range(job * JOB, min(size, job * JOB + JOB), CHUNK):
            end = min(size, start + CHUNK)
            x, u, g, y, v = (
                task.x[start:end],
                task.u[start:end],
                task.g[start:end],
                task.y[start:end],
                task.v[start:end],
            )
            _chunk(task.what, task.code, x, u, g, y, v)


_entry = entry(_worker)


@kernel
def pointwise(task, workers, board, helpers):
    """Work off a `PointwiseTask` in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)


ROWS = 16
"""Rows of a job of `rotate`."""


class RotateTask(NamedTuple):
    """Heads of rows turned in place: (a, b) = (a cos - b sin, b cos + a sin), b lying half a rotated width behind a."""

    x: object  # (N, heads·size)
    positions: object  # (N,) int64
    cosines: object  # (positions, half)
    sines: object  # (positions, half)
    heads: int
    back: bool  # by the negative angle
    counters: object  # (workers,) int64 zeros


@part
def _turn(a, b, cosines, sines, sign):
    once()
    for i in range(a.shape[0]):
        s = sign * sines[i]
        first, second = a[i], b[i]
        a[i] = first * cosines[i] - second * s
        b[i] = second * cosines[i] + first * s


@part
def _rotate_worker(task, worker, workers):
    rows, half = task.x.shape[0], task.cosines.shape[1]
    size = task.x.shape[1] // task.heads
    sign = task.x.dtype.type(-1 if task.back else 1)
    while True:
        job = draw(task.counters, 0, (rows + ROWS - 1) // ROWS, worker, workers)
        if job < 0:
            break
        for n in range(job * ROWS, min(rows, job * ROWS + ROWS)):
            row, place = task.x[n], task.positions[n]
            for head in range(task.heads):
                start = head * size
                a, b = row[start : start + half], row[start + half : start + 2 * half]
                _turn(a, b, task.cosines[place], task.sines[place], sign)


_rotate_entry = entry(_rotate_worker)


@kernel
def rotate(task, workers, board, helpers):
    """Work off a `RotateTask` in so many shares, with helpers that stand by at the board."""
    function, address = _rotate_entry(task)
    launch(function, address, workers, board, helpers)
