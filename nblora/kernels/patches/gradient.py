"""The gradient of a convolution's weight: out(c, t, o) = s Σ_n Σ_q x(n, c, t, q) g[n, o, q], x what t meets at q.

Rows of register tiles are the numbers of a patch (channel, element), columns the output's channels, and the inner
dimension all places of all images. First g is packed with its channels last, in panels of two vectors, zero at places
that are dropped (`Lattice`). Then each job owns a block of rows and of columns, over all images: it copies its channels
with padding, and from there for every 256 places the rows of a tile, which are runs of them. So sums have one owner and
one order, whatever the number of workers.
"""

from typing import NamedTuple

from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.machine import DEPTH, ROW_STRIDE, TILE_ROWS
from nblora.kernels.common.microkernel import Ahead, At, Tile, lanes, once, tile
from nblora.kernels.common.threads import entry, launch
from nblora.kernels.common.vectors import copy_vector, transpose_square

from .planes import compacts, copy_places, fill, plane_of

ROWS = 72
"""Rows of a job, about: packed g is read once for so many."""


class GradientTask(NamedTuple):
    """Everything that the gradient reads and writes; of the places of all images those p0 <= p < p1."""

    images: object  # (N, channels, height, width)
    lattice: object  # a `Lattice`
    g: object  # (N, outputs, rows, row)
    g_lattice: object  # the `Lattice` of g's own planes, at the same pitch
    out: object  # 1-D, added to: that of channel c, element t and output o at (c·taps + t)·step + o·output_step
    packed: object  # (`packed_places`,)
    scratch: object  # (workers, `gradient_scratch`)
    tile: int  # address of `tile_functions`, A in rows
    counters: object  # (2 + 2·workers,) int64 zeros: blocks packed; jobs drawn, by kind and share
    p0: int
    p1: int
    step: int
    output_step: int
    s: float


@part
def channels_of_job(channels, taps, outputs, workers, vector):
    """Channels and panels of outputs of a job, of a size that keeps the workers busy."""
    panels = (outputs + 2 * vector - 1) // (2 * vector)
    jobs = (channels * taps + ROWS - 1) // ROWS
    jobs = min(channels, (jobs + workers - 1) // workers * workers)
    block = (channels + jobs - 1) // jobs
    shares = 1 if jobs >= 2 * workers else min(panels, 2 * workers)
    return block, (panels + shares - 1) // shares


@part
def places_of_image(lattice, outputs, vector):
    """Places of an image, with those that are dropped unless they are compact."""
    if compacts(lattice, outputs, vector):
        return lattice.rows * lattice.row
    return (lattice.rows - 1) * lattice.pitch + lattice.row


@part
def span_of(lattice, outputs, vector):
    """Numbers of one phase of a channel that `DEPTH` places of an image meet, and vectors behind them."""
    places = DEPTH
    if compacts(lattice, outputs, vector):
        places = min(DEPTH // lattice.row + 2, lattice.rows) * lattice.pitch
    return places + lattice.high - lattice.low + 2 * vector


@part
def _pitch(panels, vector):
    """The pitch of C: not a power of two."""
    return panels * 2 * vector + vector


@part
def gradient_scratch(channels, panels, taps, phases, span, vector):
    """Elements of a worker's scratch: C, rows, a channel with padding, and planes of g."""
    rows = channels * taps + TILE_ROWS
    return rows * (_pitch(panels, vector) + ROW_STRIDE) + phases * span + (2 * vector + 1) * (DEPTH + vector)


@part
def packed_places(outputs, places, vector):
    """Elements that g of so many places takes, of all images together."""
    width = 2 * vector
    return (outputs + width - 1) // width * width * places


@part
def _pack(task, panel, p0, p1, scratch):
    """One panel of g for the places p0 <= p < p1, at most `DEPTH`."""
    once()
    vector, outputs, every = (
        lanes(task.packed),
        task.g.shape[1],
        places_of_image(task.lattice, task.g.shape[1], lanes(task.packed)),
    )
    width, line = 2 * vector, DEPTH + vector
    flat, plane = task.g.reshape(-1), task.g.shape[2] * task.g.shape[3]
    channels, count, p = min(width, outputs - panel * width), p1 - p0, p0
    while p < p1:
        n, q = p // every, p % every
        run = min(every - q, p1 - p)
        for channel in range(channels):
            begin, to = (n * outputs + panel * width + channel) * plane, channel * line + p - p0
            fill(scratch, to, flat, begin, plane_of(task.g_lattice, 0), q, run)
        p += run
    to = (panel * (task.p1 - task.p0) + p0 - task.p0) * width
    whole = count // vector * vector
    for half in range(0, channels, vector):
        for q in range(0, whole, vector):
            transpose_square(task.packed, to + q * width + half, width, scratch, half * line + q, line)
    for q in range(whole, count):
        for channel in range(channels):
            task.packed[to + q * width + channel] = scratch[channel * line + q]


@part
def _fill_rows(task, p0, p1, c0, c1, rows_of, b):
    """What the channels c0 <= c < c1 have at the places p0 <= p < p1, a row for each element of the kernel."""
    once()
    lattice, vector = task.lattice, lanes(task.packed)
    channels, outputs = task.images.shape[1], task.g.shape[1]
    taps, phases, span = lattice.taps, lattice.phases.shape[0], span_of(lattice, outputs, vector)
    images, plane = task.images.reshape(-1), lattice.height * lattice.width
    compact, every, p = compacts(lattice, outputs, vector), places_of_image(lattice, outputs, vector), p0
    while p < p1:
        n, q0 = p // every, p % every
        q1 = min(every, q0 + p1 - p)
        first, count = q0, q1 - q0
        if compact:
            h0, h1 = q0 // lattice.row, (q1 - 1) // lattice.row
            first, count = h0 * lattice.pitch, (h1 - h0) * lattice.pitch + lattice.row
        for c in range(c0, c1):
            for phase in range(phases):
                begin = (n * channels + c) * plane
                reach = count + lattice.high - lattice.low
                fill(b, phase * span, images, begin, plane_of(lattice, phase), first + lattice.low, reach)
            for t in range(taps.shape[0]):
                to, at = ((c - c0) * taps.shape[0] + t) * ROW_STRIDE + p - p0, taps[t, 0] * span + taps[t, 1]
                if compact:
                    copy_places(rows_of, to, b, at, lattice.row, lattice.pitch, q0, q1)
                else:
                    _copy(rows_of, to, b, at, count, vector)
        p += q1 - q0


@part
def _copy(target, to, source, at, count, vector):
    """Whole vectors of a run, beyond its end too."""
    once()
    for i in range(0, count, vector):
        copy_vector(target, to + i, source, at + i)


@part
def _multiply(task, p0, p1, rows, panels, rows_of, sums, begin):
    """C += A·B for the places p0 <= p < p1, of some panels of g."""
    once()
    vector, total = lanes(task.packed), task.p1 - task.p0
    width, stride, nothing = 2 * vector, _pitch(panels[2], vector), At(task.packed, 0)
    ahead = Ahead(nothing, nothing, nothing, 0, 0, 0, DEPTH)
    for panel in range(panels[0], panels[1]):
        at = (panel * total + p0 - task.p0) * width
        vectors = 1 if 2 * (task.g.shape[1] - panel * width) <= width else 2
        for row in range(0, rows, TILE_ROWS):
            size = Tile(p1 - p0, stride, not begin, min(TILE_ROWS, rows - row), vectors, width, ROW_STRIDE)
            to = At(sums, row * stride + (panel - panels[0]) * width)
            tile(task.tile, At(rows_of, row * ROW_STRIDE), At(task.packed, at), to, size, ahead)


@part
def _job(task, c0, c1, panels, scratch):
    """The channels c0 <= c < c1 and the panels of outputs panels[0] <= p < panels[1] of at most panels[2]."""
    once()
    vector, taps = lanes(task.packed), task.lattice.taps.shape[0]
    stride, rows = _pitch(panels[2], vector), (c1 - c0) * taps
    sums, rest = scratch, scratch[(rows + TILE_ROWS) * stride :]
    rows_of, b = rest, rest[(rows + TILE_ROWS) * ROW_STRIDE :]
    for p0 in range(task.p0, task.p1, DEPTH):
        p1 = min(p0 + DEPTH, task.p1)
        _fill_rows(task, p0, p1, c0, c1, rows_of, b)
        _multiply(task, p0, p1, rows, panels, rows_of, sums, p0 == task.p0)
    width = 2 * vector
    o0, o1 = panels[0] * width, min(panels[1] * width, task.g.shape[1])
    _add(task, c0 * taps * task.step + o0 * task.output_step, rows, o1 - o0, sums, stride)


@part
def _add(task, at, rows, columns, sums, stride):
    """out += s C, from `at` on, along what is contiguous there."""
    once()
    s = task.out.dtype.type(task.s)
    if task.step == 1:
        for column in range(columns):
            target = task.out[at + column * task.output_step : at + column * task.output_step + rows]
            for row in range(target.shape[0]):
                target[row] += s * sums[row * stride + column]
    else:
        for row in range(rows):
            for column in range(columns):
                task.out[at + row * task.step + column * task.output_step] += s * sums[row * stride + column]


@part
def _worker(task, worker, workers):
    vector, outputs, scratch = lanes(task.packed), task.g.shape[1], task.scratch[worker]
    panels, pieces = (outputs + 2 * vector - 1) // (2 * vector), (task.p1 - task.p0 + DEPTH - 1) // DEPTH
    while True:
        job = draw(task.counters, 2, panels * pieces, worker, workers)
        if job < 0:
            break
        p0 = task.p0 + job % pieces * DEPTH
        _pack(task, job // pieces, p0, min(p0 + DEPTH, task.p1), scratch)
        fetch_add(task.counters, 0, 1)
    channels = task.images.shape[1]
    block, wide = channels_of_job(channels, task.lattice.taps.shape[0], outputs, workers, vector)
    blocks, shares = (channels + block - 1) // block, (panels + wide - 1) // wide
    wait_for(task.counters, 0, panels * pieces)
    while True:
        job = draw(task.counters, 2 + workers, blocks * shares, worker, workers)
        if job < 0:
            break
        c0, p0 = job // shares * block, job % shares * wide
        _job(task, c0, min(c0 + block, channels), (p0, min(p0 + wide, panels), wide), scratch)


_entry = entry(_worker)


@kernel
def gradient(task, workers, board, helpers):
    """Work off a `GradientTask` in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)
