"""Patches on the CPU: `unfold` makes them rows for the linear kernels, `fold` adds rows to the images they come from.

A row of patches holds runs of `kw` neighbours, too short to copy one by one. So both work on blocks of `STRIP` patches
by one vector of features: along the patches a feature is a run of neighbours in the image, copied as such into a strip
that stays in the level-1 cache, and squares of vectors are transposed in registers on their way. Where the runs of a
block begin is found once for all its features: for each of them anew it took half of the time. With kernels of one
element both turn channels first into channels last and back.
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
    runs: object  # (workers, 5·STRIP) int64
    counters: object  # (workers,) int64 zeros: jobs drawn
    window: object  # a `Window`
    start: int
    add: bool  # `fold`: add to the images, or write where each place is met once


@part
def _find_runs(runs, window, p0, p1):
    """Runs of neighbours among the patches p0 <= p < p1: where each begins, its image, row and column there, and its
    length. Return their number."""
    once()
    places = window.out_height * window.out_width
    n, h, w = p0 // places, p0 % places // window.out_width, p0 % window.out_width
    at, total, number = 0, p1 - p0, 0
    while at < total:
        count = min(total - at, window.out_width - w)
        runs[5 * number] = n
        runs[5 * number + 1] = h * window.sh - window.ph
        runs[5 * number + 2] = w * window.sw - window.pw
        runs[5 * number + 3] = at
        runs[5 * number + 4] = count
        number += 1
        at += count
        w, h = 0, h + 1
        if h == window.out_height:
            n, h = n + 1, 0
    return number


@part
def _inside(first, step, count, width):
    """The elements begin <= i < end of a run whose place first + i·step lies in a line of this width."""
    if step == 1:  # a division takes as long as a run
        begin, end = max(0, -first), width - first
    else:
        begin, end = (step - 1 - first) // step if first < 0 else 0, (width - first + step - 1) // step
    begin = min(begin, count)
    return begin, max(begin, min(end, count))


@part
def _gather(strip, flat, runs, number, channel, size, shape, offset, step):
    """strip[: total] = one feature of a block's patches: `channel` where its plane begins in an image of `size`
    elements, `shape` (height, width), `offset` (rows, columns) of the kernel's element."""
    once()
    height, width = shape
    for r in range(number):
        y, first = runs[5 * r + 1] + offset[0], runs[5 * r + 2] + offset[1]
        at, count = runs[5 * r + 3], runs[5 * r + 4]
        begin, end = 0, 0
        if 0 <= y < height:
            begin, end = _inside(first, step, count, width)
        line = runs[5 * r] * size + channel + y * width + first
        for i in range(begin):
            strip[at + i] = 0
        if step == 1:
            target, source = strip[at + begin : at + end], flat[line + begin : line + end]
            for i in range(target.shape[0]):
                target[i] = source[i]
        else:
            for i in range(begin, end):
                strip[at + i] = flat[line + i * step]
        for i in range(end, count):
            strip[at + i] = 0


@part
def _spread(strip, flat, runs, number, channel, size, shape, offset, step, add):
    """The way back of `_gather`: elements of a strip added to an image, or written there."""
    once()
    height, width = shape
    for r in range(number):
        y, first = runs[5 * r + 1] + offset[0], runs[5 * r + 2] + offset[1]
        if y < 0 or y >= height:
            continue
        at = runs[5 * r + 3]
        begin, end = _inside(first, step, runs[5 * r + 4], width)
        line = runs[5 * r] * size + channel + y * width + first
        if not add:
            for i in range(begin, end):
                flat[line + i * step] = strip[at + i]
        elif step == 1:
            target, source = flat[line + begin : line + end], strip[at + begin : at + end]
            for i in range(target.shape[0]):
                target[i] += source[i]
        else:
            for i in range(begin, end):
                flat[line + i * step] += strip[at + i]


@part
def _unfold_block(task, strip, runs, p0, p1):
    """Rows of the patches p0 <= p < p1, at most `STRIP`."""
    rows = task.rows
    features, vector, window = rows.shape[1], lanes(rows), task.window
    flat, images, total = rows.reshape(-1), task.images.reshape(-1), p1 - p0
    whole = total // vector * vector
    taps, plane, shape = window.kh * window.kw, window.height * window.width, (window.height, window.width)
    number = _find_runs(runs, window, p0, p1)
    for k0 in range(0, features, vector):
        deep = min(vector, features - k0)
        for k in range(deep):
            c, tap = (k0 + k) // taps, (k0 + k) % taps
            offset = tap // window.kw * window.dh, tap % window.kw * window.dw
            line = strip[k * STRIP :]
            _gather(line, images, runs, number, c * plane, plane * window.channels, shape, offset, window.sw)
        begin = (p0 - task.start) * features + k0
        done = whole if deep == vector else 0
        for p in range(0, done, vector):
            transpose_square(flat, begin + p * features, features, strip, p, STRIP)
        for p in range(done, total):
            for k in range(deep):
                flat[begin + p * features + k] = strip[k * STRIP + p]


@part
def _fold_block(task, strip, runs, p0, p1, k_begin, k_end):
    """Bring the features k_begin <= k < k_end of the patches p0 <= p < p1, at most `STRIP`, to the images."""
    rows = task.rows
    features, vector, window = rows.shape[1], lanes(rows), task.window
    flat, images, total = rows.reshape(-1), task.images.reshape(-1), p1 - p0
    whole = total // vector * vector
    taps, plane, shape = window.kh * window.kw, window.height * window.width, (window.height, window.width)
    number = _find_runs(runs, window, p0, p1)
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
            c, tap = (k0 + k) // taps, (k0 + k) % taps
            offset = tap // window.kw * window.dh, tap % window.kw * window.dw
            line = strip[k * STRIP :]
            _spread(line, images, runs, number, c * plane, plane * window.channels, shape, offset, window.sw, task.add)


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
            _unfold_block(task, task.strips[worker], task.runs[worker], p, min(p + STRIP, last))


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
            _fold_block(task, task.strips[worker], task.runs[worker], p, min(p + STRIP, end), c0 * size, c1 * size)


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
