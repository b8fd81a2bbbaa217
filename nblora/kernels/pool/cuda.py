"""Maxima and means of windows of images, and channels scaled and shifted.

A plane is one channel of one image. A block has threads for 2^bits places, or vectors, of threads / 2^bits planes, so
that small planes leave few threads idle; of rows (N, C), whose planes are single numbers, columns stand for places.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import add_scaled, load, scale, store, zeros
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.sums import block_sum
from nblora.kernels.common.cuda.target import cuda, device_function, float64, int32, int64, kernel


@functools.cache
def pool(dtype: str, threads: int, maximum: bool):
    """Kernel: y = the largest number of every window of x, the first of NaN where there is any, and `places`, where in
    its plane it is; or the means, padding counted.

    x (planes, H, W), y (planes, H', W'), places (planes·H'·W',) int64, not touched for means; `count` of a window's
    elements. Grid (⌈planes / (threads / 2^bits)⌉, any).
    """
    THREADS, TYPE = threads, getattr(types, dtype)
    MAXIMUM, START = maximum, TYPE(-math.inf if maximum else 0)

    @kernel(threads)
    def pool(x, kh, kw, sh, sw, ph, pw, count, bits, y, places):
        height, width = int32(x.shape[1]), int32(x.shape[2])
        out_width, last = int32(y.shape[2]), int32(y.shape[1] * y.shape[2])
        t = int32(cuda.threadIdx.x)
        member = t >> bits
        plane = int64(cuda.blockIdx.x) * (THREADS >> bits) + member
        place = (int32(cuda.blockIdx.y) << bits) + t - (member << bits)
        while plane < y.shape[0] and place < last:
            h = place // out_width
            top, left = h * sh - ph, (place - h * out_width) * sw - pw
            i, bottom = max(top, 0), min(top + kh, height)
            begin, end = max(left, 0), min(left + kw, width)
            source, where, found = plane * height * width, i * width + begin, START
            while i < bottom:
                j = begin
                while j < end:
                    value = load(x, source + i * width + j, 1, 0, 1)[0]
                    if MAXIMUM:
                        if value > found or (value != value and found == found):
                            found, where = value, i * width + j
                    else:
                        found += value
                    j += 1
                i += 1
            target = plane * last + place
            if MAXIMUM:
                places[target] = where
            store(y, target, 1, 0, (found if MAXIMUM else found / count,))
            place += int32(cuda.gridDim.y) << bits

    return pool


@functools.cache
def pool_gradient(dtype: str, threads: int, maximum: bool, stride: tuple[int, int]):
    """Kernel: gx = what the windows over each number hand back to it, one after the other.

    grad (planes, H', W'), places as `pool` gives them, gx (planes, H, W). Grid as that of `pool`, for gx.
    """
    THREADS, TYPE = threads, getattr(types, dtype)
    MAXIMUM, (SH, SW) = maximum, stride
    ZERO = TYPE(0)

    @kernel(threads)
    def pool_gradient(grad, places, kh, kw, ph, pw, count, bits, gx):
        out_height, out_width = int32(grad.shape[1]), int32(grad.shape[2])
        width, last = int32(gx.shape[2]), int32(gx.shape[1] * gx.shape[2])
        t = int32(cuda.threadIdx.x)
        member = t >> bits
        plane = int64(cuda.blockIdx.x) * (THREADS >> bits) + member
        place = (int32(cuda.blockIdx.y) << bits) + t - (member << bits)
        while plane < gx.shape[0] and place < last:
            y = place // width
            bottom, right = y + ph, place - y * width + pw
            h = (bottom - kh) // SH + 1 if bottom >= kh else int32(0)
            begin = (right - kw) // SW + 1 if right >= kw else int32(0)
            h_end, end = min(bottom // SH, out_height - 1), min(right // SW, out_width - 1)
            total = ZERO
            while h <= h_end:
                w = begin
                while w <= end:
                    window = (plane * out_height + h) * out_width + w
                    if not MAXIMUM or places[window] == place:
                        total += load(grad, window, 1, 0, 1)[0]
                    w += 1
                h += 1
            store(gx, plane * last + place, 1, 0, (total if MAXIMUM else total / count,))
            place += int32(cuda.gridDim.y) << bits

    return pool_gradient


@functools.cache
def channels(dtype: str, threads: int):
    """The kernels of channels of one dtype: images are (N, channels, places), or (planes, places) where only planes
    matter; `aligned` says that their vectors may be used."""
    THREADS, LANES, TYPE = threads, 16 // np.dtype(dtype).itemsize, getattr(types, dtype)
    ZERO = TYPE(0)
    activate, through = rules(dtype).activate_lanes[LANES], rules(dtype).through_lanes[LANES]
    activate_one, slope_one = rules(dtype).activate, rules(dtype).slope
    total = block_sum(threads)

    @device_function
    def vectors(places):
        return (places + LANES - 1) // LANES

    @kernel(threads)
    def means(x, count, bits, y):
        """y[plane] = the mean of its places, `count` of them: a group of 2^bits threads adds them up in a tree, always
        in the same order. x (planes, places); grid (⌈planes / (threads / 2^bits)⌉,)."""
        shared = cuda.shared.array(THREADS, TYPE)
        t, places = int32(cuda.threadIdx.x), int64(x.shape[1])
        group = t >> bits
        member = t - (group << bits)
        plane = int64(cuda.blockIdx.x) * (THREADS >> bits) + group
        value, place = ZERO, int64(member)
        while plane < x.shape[0] and place < places:
            value += load(x, plane * places + place, 1, 0, 1)[0]
            place += 1 << bits
        shared[t] = value
        cuda.syncthreads()  # the group's sums are there
        width = (1 << bits) >> 1
        while width > 0:
            if member < width:
                shared[t] += shared[t + width]
            cuda.syncthreads()  # this level of the tree is there
            width >>= 1
        if member == 0 and plane < x.shape[0]:
            store(y, plane, 1, 0, (shared[t] / count,))

    @kernel(threads)
    def means_gradient(grad, count, bits, aligned, gx):
        """gx[plane, place] = grad[plane] / count. gx (planes, places); grid (⌈planes / (threads / 2^bits)⌉, any)."""
        places, t = int64(gx.shape[1]), int32(cuda.threadIdx.x)
        member = t >> bits
        plane = int64(cuda.blockIdx.x) * (THREADS >> bits) + member
        vector = (int64(cuda.blockIdx.y) << bits) + t - (member << bits)
        while plane < gx.shape[0] and vector < vectors(places):
            value = load(grad, plane, 1, 0, 1)[0] / count
            begin = vector * LANES
            store(gx, plane * places + begin, places - begin, aligned, zeros(LANES, value))
            vector += int64(cuda.gridDim.y) << bits

    @kernel(threads)
    def of_images(x, factor, shift, code, bits, aligned, y):
        """y = act(x factor + shift), each channel with its own numbers. Grid (⌈planes / (threads / 2^bits)⌉, any)."""
        count, places, t = int32(x.shape[1]), int64(x.shape[2]), int32(cuda.threadIdx.x)
        member, planes = t >> bits, THREADS >> bits
        plane = int64(cuda.blockIdx.x) * planes + member
        channel = (int32(cuda.blockIdx.x) % count * planes + member) % count
        vector = (int64(cuda.blockIdx.y) << bits) + t - (member << bits)
        while plane < x.shape[0] * count and vector < vectors(places):
            begin = vector * LANES
            offset, valid = plane * places + begin, places - begin
            moved = zeros(LANES, load(shift, channel, 1, 0, 1)[0])
            z = add_scaled(moved, load(x, offset, valid, aligned, LANES), load(factor, channel, 1, 0, 1)[0])
            store(y, offset, valid, aligned, activate(z, code))
            vector += int64(cuda.gridDim.y) << bits

    @kernel(threads, 2 if dtype == "float32" else 1)  # held to 128 registers it would keep float64 in local memory
    def of_images_gradient(grad, x, factor, shift, code, bits, chunk, aligned, gx, sums):
        """gx = g factor with g = grad act'(x factor + shift), and of the images of each split Σ g x and Σ g.

        sums (splits·2, channels), the two of a split one after the other. Grid (channels, splits), `chunk` images each.
        """
        along_shared = cuda.shared.array(THREADS, float64)
        plain_shared = cuda.shared.array(THREADS, float64)
        count, places, t = int64(x.shape[1]), int64(x.shape[2]), int32(cuda.threadIdx.x)
        channel, split = int64(cuda.blockIdx.x), int64(cuda.blockIdx.y)
        member = t >> bits
        times, moved = load(factor, channel, 1, 0, 1)[0], load(shift, channel, 1, 0, 1)[0]
        n, end = split * chunk + member, min(split * chunk + chunk, int64(x.shape[0]))
        along, plain = ZERO, ZERO
        while n < end:
            vector = int64(t - (member << bits))
            while vector < vectors(places):
                begin = vector * LANES
                offset, valid = (n * count + channel) * places + begin, places - begin
                values = load(x, offset, valid, aligned, LANES)
                z = add_scaled(zeros(LANES, moved), values, times)
                g = through(load(grad, offset, valid, aligned, LANES), z, code)
                store(gx, offset, valid, aligned, scale(g, times))
                for lane in range(LANES):
                    along += g[lane] * values[lane]
                    plain += g[lane]
                vector += 1 << bits
            n += THREADS >> bits
        first, second = total(along_shared, t, float64(along)), total(plain_shared, t, float64(plain))
        if t == 0:
            store(sums, 2 * split * count + channel, 1, 0, (TYPE(first),))
            store(sums, (2 * split + 1) * count + channel, 1, 0, (TYPE(second),))

    @kernel(threads)
    def of_rows(x, factor, shift, code, bits, y):
        """The same of rows (N, C). A block has 2^bits columns; grid (⌈C / 2^bits⌉, any)."""
        count, t = int64(x.shape[1]), int32(cuda.threadIdx.x)
        member = t >> bits
        column = (int64(cuda.blockIdx.x) << bits) + t - (member << bits)
        n = int64(cuda.blockIdx.y) * (THREADS >> bits) + member
        while column < count and n < x.shape[0]:
            value = load(x, n * count + column, 1, 0, 1)[0]
            z = value * load(factor, column, 1, 0, 1)[0] + load(shift, column, 1, 0, 1)[0]
            store(y, n * count + column, 1, 0, (activate_one(z, code),))
            n += int64(cuda.gridDim.y) * (THREADS >> bits)

    @kernel(threads)
    def of_rows_gradient(grad, x, factor, shift, code, bits, chunk, gx, sums):
        """The same of rows (N, C). A thread owns a column of `chunk` rows, a split. sums (splits·2, C) with splits =
        gridDim.y·threads / 2^bits."""
        count, t = int64(x.shape[1]), int32(cuda.threadIdx.x)
        member = t >> bits
        column = (int64(cuda.blockIdx.x) << bits) + t - (member << bits)
        split = int64(cuda.blockIdx.y) * (THREADS >> bits) + member
        if column < count:
            times, moved = load(factor, column, 1, 0, 1)[0], load(shift, column, 1, 0, 1)[0]
            n, end = split * chunk, min(split * chunk + chunk, int64(x.shape[0]))
            along, plain = ZERO, ZERO
            while n < end:
                value = load(x, n * count + column, 1, 0, 1)[0]
                g = load(grad, n * count + column, 1, 0, 1)[0] * slope_one(value * times + moved, code)
                store(gx, n * count + column, 1, 0, (g * times,))
                along += g * value
                plain += g
                n += 1
            store(sums, 2 * split * count + column, 1, 0, (along,))
            store(sums, (2 * split + 1) * count + column, 1, 0, (plain,))

    @kernel(threads)
    def scales(weight, bias, mean, variance, eps, factor, shift):
        """Factor = weight / √(variance + eps), shift = bias - mean factor; all (C,)."""
        i = int64(cuda.grid(1))
        while i < factor.size:
            value = load(weight, i, 1, 0, 1)[0] / math.sqrt(load(variance, i, 1, 0, 1)[0] + eps)
            store(factor, i, 1, 0, (value,))
            store(shift, i, 1, 0, (load(bias, i, 1, 0, 1)[0] - load(mean, i, 1, 0, 1)[0] * value,))
            i += cuda.gridsize(1)

    @kernel(threads)
    def scales_gradient(factor, shift, mean, variance, eps, weight):
        """Weight = (factor - mean shift) / √(variance + eps), of gradients; all (C,)."""
        i = int64(cuda.grid(1))
        while i < weight.size:
            value = load(factor, i, 1, 0, 1)[0] - load(mean, i, 1, 0, 1)[0] * load(shift, i, 1, 0, 1)[0]
            store(weight, i, 1, 0, (value / math.sqrt(load(variance, i, 1, 0, 1)[0] + eps),))
            i += cuda.gridsize(1)

    return SimpleNamespace(
        means=means,
        means_gradient=means_gradient,
        of_images=of_images,
        of_images_gradient=of_images_gradient,
        of_rows=of_rows,
        of_rows_gradient=of_rows_gradient,
        scales=scales,
        scales_gradient=scales_gradient,
    )
