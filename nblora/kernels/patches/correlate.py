"""A convolution: out[n, o, h, w] = act(Σ_c Σ_t W[o, c, t] images[n, c, h·step + y_t, w·step + x_t] + b[o]).

Forward and the input's gradient, which is one of the output's gradient. The output's channels are the rows of register
tiles and the places of an image their columns. Workers draw jobs: first blocks of the weight, packed once, and then
runs of places, for all output channels. A job copies a few channels of its part of the image, with padding (`Lattice`),
and multiplies them while they are in the level-1 cache. Where rows are short it copies, from there, what each element
of the kernel meets, without places that are dropped: a few channels' patches, of as many images as make a job.

`low` rows behind those of the output, of a second weight, are computed with them: u = x A of a low-rank layer.
"""

from typing import NamedTuple

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.functions import activate_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.machine import DEPTH, TILE_ROWS, VECTOR_BITS
from nblora.kernels.common.microkernel import At, lanes, once
from nblora.kernels.common.threads import entry, launch

from .planes import compacts, copy_places, fill, plane_of
from .tile import Size, shifted_tile

BLOCK = 1 << 19
"""Bytes of C that a job holds, about: half of a level-2 cache of 1 MB."""


class Weights(NamedTuple):
    """A matrix of weights for rows of the output: that of row o, channel c and element t is
    array[o·row + c·channel + t·tap]."""

    array: object  # 1-D
    rows: int
    row: int
    channel: int
    tap: int


class CorrelateTask(NamedTuple):
    """Everything that a convolution reads and writes."""

    images: object  # (N, channels, height, width)
    lattice: object  # a `Lattice`
    weights: object  # `Weights` of the output's rows
    low_weights: object  # `Weights` of the low rows
    bias: object  # (rows,)
    z: object  # (N, rows, out_height, out_width), written; may be y
    y: object  # the same, written
    low: object  # (N, low rows, out_height, out_width), written
    packed: object  # (`packed_weights`,)
    scratch: object  # (workers, `correlate_scratch`)
    tables: object  # (workers, `channels_of_block`·taps) int64
    tile: int  # address of `shifted_tile_function`
    counters: object  # (2 + 2·workers,) int64 zeros: blocks packed; jobs drawn, by kind and share
    activation: int
    has_bias: bool
    add: bool  # to y, instead of writing it


@part
def channels_of_block(channels, taps):
    """Channels that are multiplied at a time."""
    return min(channels, max(1, DEPTH // taps))


class Plan(NamedTuple):
    """How the places of all images are dealt to jobs: `total` of them in each of `runs`, with a job `places`; `compact`
    where those of all images lie one after the other, without those that are dropped."""

    compact: bool
    runs: int
    total: int
    places: int


@part
def plan_of(lattice, rows, images, workers, vector):
    """The plan for so many rows: jobs of whole panels, of what a block of C holds, and of many of them equal ones."""
    width = 2 * vector
    compact = compacts(lattice, rows, vector)
    total = images * lattice.rows * lattice.row if compact else (lattice.rows - 1) * lattice.pitch + lattice.row
    runs = 1 if compact else images
    panels = (total + width - 1) // width
    most = max(1, BLOCK * 8 * vector // VECTOR_BITS // (rows * width))
    jobs = max((panels + most - 1) // most, min((4 * workers + runs - 1) // runs, (panels + 3) // 4), 1)
    return Plan(compact, runs, total, (panels + jobs - 1) // jobs * width)


@part
def _pitch(places, vector):
    """The pitch of C, and of B where it is compact: not a power of two."""
    return places + vector


@part
def span_of(lattice, plan, vector):
    """Numbers of one phase of a channel that the places of a job meet, and two vectors."""
    places = plan.places
    if plan.compact:
        places = min(places // lattice.row + 2, lattice.rows) * lattice.pitch
    return places + lattice.high - lattice.low + 2 * vector


@part
def correlate_scratch(lattice, plan, rows, channels, vector):
    """Elements of a worker's scratch, with blocks of so many channels."""
    phases, taps, pitch = lattice.phases.shape[0], lattice.taps.shape[0], _pitch(plan.places, vector)
    span = span_of(lattice, plan, vector)
    b = channels * taps * pitch + phases * span if plan.compact else channels * phases * span
    return (rows + TILE_ROWS) * pitch + b


@part
def packed_weights(rows, inner):
    """Elements that packing the weights takes."""
    return (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS * inner


@part
def _pack(task, tile, tiles, c0, c1):
    """Rows of one tile for the channels c0 <= c < c1, in steps."""
    once()
    taps, number, weights, low = task.lattice.taps, task.lattice.taps.shape[0], task.weights, task.low_weights
    first, place = tile * TILE_ROWS, (c0 * tiles + tile * (c1 - c0)) * number * TILE_ROWS
    last = min(first + TILE_ROWS, weights.rows + low.rows)
    between = min(max(first, weights.rows), last)
    for c in range(c0, c1):
        for t in range(number):
            at, low_at = c * weights.channel + taps[t, 2] * weights.tap, c * low.channel + taps[t, 2] * low.tap
            for row in range(first, between):
                task.packed[place + row - first] = weights.array[at + row * weights.row]
            for row in range(between, last):
                task.packed[place + row - first] = low.array[low_at + (row - weights.rows) * low.row]
            place += TILE_ROWS


@part
def _store(task, n, q0, q1, pitch, c, c_pitch):
    """Rows of C, of the places q0 <= q < q1 of an image, to where they belong."""
    once()
    lattice, rows, low_rows = task.lattice, task.weights.rows, task.low_weights.rows
    columns, (down, across), (a, b) = lattice.row, lattice.spread, lattice.origin
    y, z, low, zero = task.y.reshape(-1), task.z.reshape(-1), task.low.reshape(-1), task.y.dtype.type(0)
    width, size = lattice.out_width, lattice.out_height * lattice.out_width
    if pitch == width and down == 1 and across == 1:  # one run, whatever the rows
        columns = pitch = max(q1, 1)
    for row in range(rows + low_rows):
        is_low = row >= rows
        plane = (n * low_rows + row - rows if is_low else n * rows + row) * size
        shift = task.bias[row] if task.has_bias and not is_low else zero
        q = q0
        while q < q1:
            h, w = q // pitch, q % pitch
            end = min(q1, h * pitch + columns)
            if w < columns:
                at, count, start = plane + (h * down + a) * width + w * across + b, end - q, row * c_pitch + q - q0
                if is_low:
                    _store_run(low, at, c, start, count, shift, False)
                elif across == 1:
                    _store_run(z, at, c, start, count, shift, task.add)
                    if task.activation != elementwise.IDENTITY:
                        activate_row(y[at : at + count], z[at : at + count], task.activation)
                else:
                    for i in range(count):
                        z[at + i * across] = c[start + i] + shift
            q = (h + 1) * pitch


@part
def _store_run(target, at, c, start, count, shift, add):
    once()
    run, block = target[at : at + count], c[start : start + count]
    if add:
        for i in range(block.shape[0]):
            run[i] += block[i] + shift
    else:
        for i in range(block.shape[0]):
            run[i] = block[i] + shift


@part
def _fill_table(task, plan, table, channels):
    """Where the row of B begins that each step of a block meets."""
    taps, phases, vector = task.lattice.taps, task.lattice.phases.shape[0], lanes(task.y)
    span, pitch = span_of(task.lattice, plan, vector), _pitch(plan.places, vector)
    for c in range(channels):
        for t in range(taps.shape[0]):
            k = c * taps.shape[0] + t
            table[k] = k * pitch if plan.compact else (c * phases + taps[t, 0]) * span + taps[t, 1]


@part
def _fill_block(task, plan, n, first, count, c0, c1, b):
    """B: the phases of the channels c0 <= c < c1 of an image, which the places from `first` on meet."""
    once()
    lattice, channels = task.lattice, task.images.shape[1]
    images, plane, phases = task.images.reshape(-1), lattice.height * lattice.width, lattice.phases.shape[0]
    span = span_of(lattice, plan, lanes(task.y))
    for channel in range(c0, c1):
        for phase in range(phases):
            at, begin = ((channel - c0) * phases + phase) * span, (n * channels + channel) * plane
            fill(b, at, images, begin, plane_of(lattice, phase), first + lattice.low, count + span - plan.places)


@part
def _gather_block(task, plan, p0, p1, c0, c1, b, planes):
    """B compact: what the steps of the channels c0 <= c < c1 meet at the places p0 <= p < p1 of all images."""
    once()
    lattice, channels, vector = task.lattice, task.images.shape[1], lanes(task.y)
    images, plane, taps = task.images.reshape(-1), lattice.height * lattice.width, lattice.taps
    span, pitch, every = span_of(lattice, plan, vector), _pitch(plan.places, vector), lattice.rows * lattice.row
    for channel in range(c0, c1):
        p = p0
        while p < p1:
            n, q0 = p // every, p % every
            q1 = min(every, q0 + p1 - p)
            h0, h1 = q0 // lattice.row, (q1 - 1) // lattice.row
            first, count = h0 * lattice.pitch + lattice.low, (h1 - h0) * lattice.pitch + lattice.row
            for phase in range(lattice.phases.shape[0]):
                begin = (n * channels + channel) * plane
                reach = count + lattice.high - lattice.low
                fill(planes, phase * span, images, begin, plane_of(lattice, phase), first, reach)
            for t in range(taps.shape[0]):
                to = ((channel - c0) * taps.shape[0] + t) * pitch + p - p0
                copy_places(b, to, planes, taps[t, 0] * span + taps[t, 1], lattice.row, lattice.pitch, q0, q1)
            p += q1 - q0


@part
def _job(task, plan, n, p0, p1, block, table, scratch):
    """The places p0 <= p < p1 of an image, or of all, for all rows."""
    once()
    lattice, vector = task.lattice, lanes(task.y)
    channels, rows, taps = task.images.shape[1], task.weights.rows + task.low_weights.rows, lattice.taps.shape[0]
    width, pitch = 2 * vector, _pitch(plan.places, vector)
    tiles, panels = (rows + TILE_ROWS - 1) // TILE_ROWS, (p1 - p0 + width - 1) // width
    c, b = scratch, scratch[(rows + TILE_ROWS) * pitch :]
    for c0 in range(0, channels, block):
        c1 = min(c0 + block, channels)
        depth = (c1 - c0) * taps
        if plan.compact:
            _gather_block(task, plan, p0, p1, c0, c1, b, b[block * taps * pitch :])
        else:
            _fill_block(task, plan, n, p0, panels * width, c0, c1, b)
        for j in range(panels):
            vectors = 1 if 2 * (p1 - p0 - j * width) <= width else 2
            for tile in range(tiles):
                height = min(TILE_ROWS, rows - tile * TILE_ROWS)
                a = c0 * taps * tiles * TILE_ROWS + tile * depth * TILE_ROWS
                to = tile * TILE_ROWS * pitch + j * width
                size = Size(depth, pitch, c0 > 0, height, vectors)
                shifted_tile(task.tile, At(task.packed, a), At(b, j * width), At(table, 0), At(c, to), size)
    every, p = lattice.rows * lattice.row, p0
    while p < p1:
        image, q0, q1 = n, p, p1
        if plan.compact:
            image, q0 = p // every, p % every
            q1 = min(every, q0 + p1 - p)
        _store(task, image, q0, q1, lattice.row if plan.compact else lattice.pitch, c[p - p0 :], pitch)
        p += q1 - q0


@part
def _worker(task, worker, workers):
    lattice, vector = task.lattice, lanes(task.y)
    images, channels = task.images.shape[0], task.images.shape[1]
    rows, taps = task.weights.rows + task.low_weights.rows, lattice.taps.shape[0]
    block = channels_of_block(channels, taps)
    blocks, tiles = (channels + block - 1) // block, (rows + TILE_ROWS - 1) // TILE_ROWS
    while True:
        job = draw(task.counters, 2, blocks * tiles, worker, workers)
        if job < 0:
            break
        c0 = job // tiles * block
        _pack(task, job % tiles, tiles, c0, min(c0 + block, channels))
        fetch_add(task.counters, 0, 1)
    plan = plan_of(lattice, rows, images, workers, vector)
    bands = (plan.total + plan.places - 1) // plan.places
    table, scratch = task.tables[worker], task.scratch[worker]
    _fill_table(task, plan, table, block)
    wait_for(task.counters, 0, blocks * tiles)
    while True:
        job = draw(task.counters, 2 + workers, plan.runs * bands, worker, workers)
        if job < 0:
            break
        p0 = job % bands * plan.places
        _job(task, plan, job // bands, p0, min(p0 + plan.places, plan.total), block, table, scratch)


_entry = entry(_worker)


@kernel
def correlate(task, workers, board, helpers):
    """Work off a `CorrelateTask` in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)
