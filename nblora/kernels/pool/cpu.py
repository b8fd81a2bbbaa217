"""Maxima and means of windows of images, and channels scaled and shifted; a job is one channel of one image."""

from typing import NamedTuple

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw
from nblora.kernels.common.functions import activate_row, slope_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.microkernel import once
from nblora.kernels.common.threads import entry, launch


class PoolTask(NamedTuple):
    """Planes (images·channels, H, W) and their windows' results (images·channels, H', W')."""

    back: bool  # x is written, from y
    x: object
    y: object
    places: object  # like y, int64: which element of its plane a maximum was; any for means
    kernel: object  # (kh, kw)
    stride: object
    padding: object
    maximum: bool
    counters: object  # (workers,) int64 zeros


@part
def _largest(x, i0, i1, j0, j1):
    """The largest of a window, the first of equal ones or of NaN, and its place."""
    best, place = x[i0, j0], i0 * x.shape[1] + j0
    for i in range(i0, i1):
        for j in range(j0, j1):
            value = x[i, j]
            if value > best or (value != value and best == best):
                best, place = value, i * x.shape[1] + j
    return best, place


@part
def _plane(task, plane):
    once()
    x, y = task.x[plane], task.y[plane]
    height, width = x.shape
    share = x.dtype.type(1.0 / (task.kernel[0] * task.kernel[1]))
    if task.back:
        for i in range(height):
            for j in range(width):
                x[i, j] = 0
    for h in range(y.shape[0]):
        top = h * task.stride[0] - task.padding[0]
        i0, i1 = max(top, 0), min(top + task.kernel[0], height)
        for w in range(y.shape[1]):
            left = w * task.stride[1] - task.padding[1]
            j0, j1 = max(left, 0), min(left + task.kernel[1], width)
            if task.maximum and not task.back:
                y[h, w], task.places[plane, h, w] = _largest(x, i0, i1, j0, j1)
            elif task.maximum:
                place = task.places[plane, h, w]
                x[place // width, place % width] += y[h, w]
            else:
                total = x.dtype.type(0)
                for i in range(i0, i1):
                    for j in range(j0, j1):
                        if task.back:
                            x[i, j] += share * y[h, w]
                        else:
                            total += x[i, j]
                if not task.back:
                    y[h, w] = share * total


@part
def _worker(task, worker, workers):
    while True:
        plane = draw(task.counters, 0, task.x.shape[0], worker, workers)
        if plane < 0:
            break
        _plane(task, plane)


_entry = entry(_worker)


@kernel
def pool(task, workers, board, helpers):
    """Work off a `PoolTask` in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)


class ChannelTask(NamedTuple):
    """Planes (images, channels, size): y = act(x scale + shift), or the way back."""

    back: bool
    code: int
    x: object
    scale: object  # (channels,)
    shift: object
    y: object  # written; on the way back the gradient that comes
    gx: object  # written on the way back
    sums: object  # (2, images, channels), written on the way back: Σ g x and Σ g
    counters: object  # (workers,) int64 zeros


@part
def _affine(y, x, scale, shift):
    once()
    for i in range(y.shape[0]):
        y[i] = x[i] * scale + shift


@part(fastmath={"contract", "reassoc"})
def _back_row(gx, g, x, scale):
    """gx = scale g; Σ g x and Σ g. g may be gx."""
    once()
    along, plain = g.dtype.type(0), g.dtype.type(0)
    for i in range(g.shape[0]):
        along += g[i] * x[i]
        plain += g[i]
        gx[i] = scale * g[i]
    return along, plain


@part
def _channel(task, image, channel):
    x, y, scale, shift = task.x[image, channel], task.y[image, channel], task.scale[channel], task.shift[channel]
    if not task.back:
        _affine(y, x, scale, shift)
        if task.code != elementwise.IDENTITY:
            activate_row(y, y, task.code)
        return
    gx = task.gx[image, channel]
    if task.code != elementwise.IDENTITY:
        _affine(gx, x, scale, shift)
        slope_row(gx, y, gx, task.code)
        y = gx
    task.sums[0, image, channel], task.sums[1, image, channel] = _back_row(gx, y, x, scale)


@part
def _channel_worker(task, worker, workers):
    count = task.x.shape[1]
    while True:
        job = draw(task.counters, 0, task.x.shape[0] * count, worker, workers)
        if job < 0:
            break
        _channel(task, job // count, job % count)


_channel_entry = entry(_channel_worker)


@kernel
def channels(task, workers, board, helpers):
    """Work off a `ChannelTask` in so many shares, with helpers that stand by at the board."""
    function, address = _channel_entry(task)
    launch(function, address, workers, board, helpers)
