"""Patches on the CPU: `unfold` makes them rows for the linear kernels, `fold` adds rows to the images they come from.

A row of patches holds runs of `kw` neighbours, too short to copy one by one. So both work on blocks of `STRIP` patches
by one vector of features: along the patches a feature is a run of neighbours in the image, copied as such into a strip
that stays in the level-1 cache, and squares of vectors are transposed in registers on their way. With kernels of one
element they turn channels first into channels last and back.
"""

from typing import NamedTuple

from nblora.kernels.common.atomics import draw
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.microkernel import lanes, once
from nblora.kernels.common.threads import entry, launch
from nblora.kernels.common.vectors import transpose_square

STRIP = 64
"""Patches of a block."""
BLOCKS = 4
"""Blocks of a job of `unfold`."""


class PatchTask(NamedTuple):
    """Patches [start, start + M) of the images, by `Window`, and which way they go."""

    images: object  # (N, channels, height, width)
    rows: object  # (M, features)
    strips: object  # (workers, lanes·STRIP)
    counters: object  # (workers,) int64 zeros: jobs drawn
    window: object  # a `Window`
    start: int
    add: bool  # `fold`: add to the images, or write where each place is met once


@part
def _take_run(strip, at, line, first, step, count):
    """strip[at + i] = line[first + i·step], zero beyond the line's ends."""
    width = line.shape[0]
    i = 0
    while i < count and first + i * step < 0:
        strip[at + i] = 0
        i += 1
    inside = min(count, (width - first + step - 1) // step) if first < width else i
    if step == 1:
        for j in range(i, inside):
            strip[at + j] = line[first + j]
    else:
        for j in range(i, inside):
            strip[at + j] = line[first + j * step]
    for j in range(max(i, inside), count):
        strip[at + j] = 0


@part
def _give_run(strip, at, line, first, step, count, add):
    """line[first + i·step] (+)= strip[at + i] between the line's ends."""
    width = line.shape[0]
    i = 0
    while i < count and first + i * step < 0:
        i += 1
    inside = min(count, (width - first + step - 1) // step) if first < width else i
    if not add:
        for j in range(i, inside):
            line[first + j * step] = strip[at + j]
    elif step == 1:
        for j in range(i, inside):
            line[first + j] += strip[at + j]
    else:
        for j in range(i, inside):
            line[first + j * step] += strip[at + j]


@part
def _along(task, strip, k, p0, p1, gather):
    """Move the feature k of the patches p0 <= p < p1 between the images and strip[: p1 - p0], run by run."""
    once()
    window, images = task.window, task.images
    size = window.kh * window.kw
    c, i, j = k // size, k % size // window.kw, k % window.kw
    places = window.out_height * window.out_width
    n, h, w = p0 // places, p0 % places // window.out_width, p0 % window.out_width
    at, total = 0, p1 - p0
    while at < total:
        count = min(total - at, window.out_width - w)
        y, first = h * window.sh - window.ph + i * window.dh, w * window.sw - window.pw + j * window.dw
        if 0 <= y < window.height:
            line = images[n, c, y]
            if gather:
                _take_run(strip, at, line, first, window.sw, count)
            else:
                _give_run(strip, at, line, first, window.sw, count, task.add)
        elif gather:
            for q in range(at, at + count):
                strip[q] = 0
        at += count
        w, h = 0, h + 1
        if h == window.out_height:
            n, h = n + 1, 0


@part
def _unfold_block(task, strip, p0, p1):
    """Rows of the patches p0 <= p < p1, at most `STRIP`."""
    rows = task.rows
    features, vector = rows.shape[1], lanes(rows)
    flat, total = rows.reshape(-1), p1 - p0
    whole = total // vector * vector
    for k0 in range(0, features, vector):
        deep = min(vector, features - k0)
        for k in range(deep):
            _along(task, strip[k * STRIP :], k0 + k, p0, p1, True)
        begin = (p0 - task.start) * features + k0
        done = whole if deep == vector else 0
        for p in range(0, done, vector):
            transpose_square(flat, begin + p * features, features, strip, p, STRIP)
        for p in range(done, total):
            for k in range(deep):
                flat[begin + p * features + k] = strip[k * STRIP + p]


@part
def _fold_block(task, strip, p0, p1, k_begin, k_end):
    """Bring the features k_begin <= k < k_end of the patches p0 <= p < p1, at most `STRIP`, to the images."""
    rows = task.rows
    features, vector = rows.shape[1], lanes(rows)
    flat, total = rows.reshape(-1), p1 - p0
    whole = total // vector * vector
    for k0 in range(k_begin, k_end, vector):
        deep = min(vector, k_end - k0)
        begin = (p0 - task.start) * features + k0
        done = whole if k0 + vector <= features else 0
        for p in range(0, done, vector):
            transpose_square(strip, p, STRIP, flat, begin + p * features, features)
        for p in range(done, total):
            for k in range(deep):
                strip[k * STRIP + p] = flat[begin + p * features + k]
        for k in range(deep):
            _along(task, strip[k * STRIP :], k0 + k, p0, p1, False)


@part
def _unfold_worker(task, worker, workers):
    first, last = task.start, task.start + task.rows.shape[0]
    size = STRIP * BLOCKS
    while True:
        job = draw(task.counters, 0, (last - first + size - 1) // size, worker, workers)
        if job < 0:
            break
        begin = first + job * size
        for p in range(begin, min(begin + size, last), STRIP):
            _unfold_block(task, task.strips[worker], p, min(p + STRIP, last))


@part
def _fold_worker(task, worker, workers):
    """Each job owns some channels of one image, so that no number has two writers."""
    window, first, last = task.window, task.start, task.start + task.rows.shape[0]
    places, size = window.out_height * window.out_width, window.kh * window.kw
    images = (last - 1) // places - first // places + 1 if last > first else 0
    groups = min(window.channels, (4 * workers + images - 1) // max(images, 1))
    while True:
        job = draw(task.counters, 0, images * groups, worker, workers)
        if job < 0:
            break
        n, group = first // places + job // groups, job % groups
        c0, c1 = window.channels * group // groups, window.channels * (group + 1) // groups
        begin, end = max(first, n * places), min(last, (n + 1) * places)
        for p in range(begin, end, STRIP):
            _fold_block(task, task.strips[worker], p, min(p + STRIP, end), c0 * size, c1 * size)


_unfold_entry, _fold_entry = entry(_unfold_worker), entry(_fold_worker)


@kernel
def unfold(task, workers, board, helpers):
    """Fill the rows of a `PatchTask` from its images, in so many shares, with helpers that stand by at the board."""
    function, address = _unfold_entry(task)
    launch(function, address, workers, board, helpers)


@kernel
def fold(task, workers, board, helpers):
    """Bring the rows of a `PatchTask` to its images, in so many shares, with helpers that stand by at the board."""
    function, address = _fold_entry(task)
    launch(function, address, workers, board, helpers)
