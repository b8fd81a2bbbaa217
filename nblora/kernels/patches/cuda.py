"""Patches of images as rows, and back.

Rows have the numbers of a patch side by side, images those of a line: a tile of both is turned round in shared memory,
so that what is read and what is written lie side by side for the threads of a warp. A thread looks up its patch once
and then goes through features, of which one thread tells the block where each lies; the kernel's sizes are constants,
so that this takes no division by what is not known.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from numba.core import types

from nblora.kernels.common.cuda.intrinsics import load, store
from nblora.kernels.common.cuda.target import cuda, device_function, int32, int64, kernel

from .window import Window

FAR = 1 << 29
"""A row where no image has one, nor any patch that begins there: what must not be moved is said to lie there."""


class Steps(NamedTuple):
    """What of a `Window` is constant in a compiled kernel."""

    kh: int
    kw: int
    sh: int
    sw: int
    dh: int
    dw: int

    @classmethod
    def of(cls, window: Window) -> "Steps":
        """Those of a window."""
        return cls(window.kh, window.kw, window.sh, window.sw, window.dh, window.dw)

    @property
    def apart(self) -> bool:
        """Whether no two patches share a place of the image."""
        return self.sh > (self.kh - 1) * self.dh and self.sw > (self.kw - 1) * self.dw


def edge(threads: int) -> int:
    """Rows and features of a tile: a power of two, of whose elements a thread moves four, or two."""
    return 1 << (threads.bit_length() + 1) // 2


def lying(steps: Steps) -> tuple[Callable, Callable]:
    """Two device functions that tell where a patch, and a number of it, lie.

    `corner(place, out_height, out_width, pad_height, pad_width)` is the image, row and column of the first number of a
    patch, counted through all images; `shift(f)` the channel, rows and columns from there to feature f.
    """
    KH, KW, SH, SW, DH, DW = steps

    @device_function
    def corner(place, out_height, out_width, pad_height, pad_width):
        n = place // (int64(out_height) * out_width)
        within = int32(place - n * out_height * out_width)
        h = int32(within // out_width)
        return n, int32(h * SH - pad_height), int32((within - h * out_width) * SW - pad_width)

    @device_function
    def shift(f):
        c = f // (KH * KW)
        i = (f - c * (KH * KW)) // KW
        return c, i * DH, (f - (c * KH + i) * KW) * DW

    return corner, shift


@functools.cache
def unfold(dtype: str, threads: int, steps: Steps):
    """Kernel: patches[r] = patch `start` + r of images (N, channels, height, width), zeros outside.

    patches (rows, features), in the order (channel, i, j). Grid (⌈rows / edge⌉, any): blocks along y share the
    features.
    """
    TYPE, EDGE = getattr(types, dtype), edge(threads)
    PITCH, LINES, EACH = EDGE + 1, threads // EDGE, EDGE * EDGE // threads
    SIZE, ZERO = EDGE * PITCH, TYPE(0)
    corner, shift = lying(steps)

    @kernel(threads)
    def unfold(images, out_height, out_width, pad_height, pad_width, start, patches):
        tile = cuda.shared.array(SIZE, TYPE)
        offsets = cuda.shared.array(EDGE, int64)
        downs = cuda.shared.array(EDGE, int32)
        acrosses = cuda.shared.array(EDGE, int32)
        t = int32(cuda.threadIdx.x)
        line = int32(t // EDGE)
        lane = int32(t - line * EDGE)
        height, width = int32(images.shape[2]), int32(images.shape[3])
        rows, features = int64(patches.shape[0]), int64(patches.shape[1])
        above, before = int64(cuda.blockIdx.x) * EDGE, int64(cuda.blockIdx.y) * EDGE
        tall = int32(min(rows - above, int64(EDGE)))  # patches of the tile
        n, y, x = corner(start + above + lane, out_height, out_width, pad_height, pad_width)
        first = ((n * images.shape[1]) * height + y) * width + x
        if lane >= tall:
            y = int32(FAR)
        while before < features:
            if t < EDGE:
                c, down, across = shift(before + t)
                offsets[t] = (c * height + down) * width + across
                downs[t] = int32(down) if before + t < features else int32(FAR)
                acrosses[t] = int32(across)
            cuda.syncthreads()  # it is known where the tile's features lie
            for step in range(EACH):  # a thread's patch is that of its lane
                k = int32(line + step * LINES)
                value, row, column = ZERO, int32(y + downs[k]), int32(x + acrosses[k])
                if row >= 0 and row < height and column >= 0 and column < width:
                    value = load(images, first + offsets[k], 1, 0, 1)[0]
                tile[k * PITCH + lane] = value
            cuda.syncthreads()  # the tile is there
            if before + lane < features:  # and now its feature
                target = (above + line) * features + before + lane
                for step in range(EACH):
                    k = int32(line + step * LINES)
                    if k < tall:
                        store(patches, target, 1, 0, (tile[lane * PITCH + k],))
                    target += LINES * features
            before += int64(cuda.gridDim.y) * EDGE

    return unfold


@functools.cache
def fold_apart(dtype: str, threads: int, steps: Steps):
    """Kernel: the transpose of `unfold` where no two patches share a place: every number has one place to go to.

    Added where `add`, else written. Grid as that of `unfold`.
    """
    TYPE, EDGE = getattr(types, dtype), edge(threads)
    PITCH, LINES, EACH = EDGE + 1, threads // EDGE, EDGE * EDGE // threads
    SIZE, ZERO = EDGE * PITCH, TYPE(0)
    corner, shift = lying(steps)

    @kernel(threads)
    def fold_apart(patches, out_height, out_width, pad_height, pad_width, start, add, images):
        tile = cuda.shared.array(SIZE, TYPE)
        offsets = cuda.shared.array(EDGE, int64)
        downs = cuda.shared.array(EDGE, int32)
        acrosses = cuda.shared.array(EDGE, int32)
        t = int32(cuda.threadIdx.x)
        line = int32(t // EDGE)
        lane = int32(t - line * EDGE)
        height, width = int32(images.shape[2]), int32(images.shape[3])
        rows, features = int64(patches.shape[0]), int64(patches.shape[1])
        above, before = int64(cuda.blockIdx.x) * EDGE, int64(cuda.blockIdx.y) * EDGE
        tall = int32(min(rows - above, int64(EDGE)))  # patches of the tile
        n, y, x = corner(start + above + lane, out_height, out_width, pad_height, pad_width)
        first = ((n * images.shape[1]) * height + y) * width + x
        if lane >= tall:
            y = int32(FAR)
        while before < features:
            if t < EDGE:
                c, down, across = shift(before + t)
                offsets[t] = (c * height + down) * width + across
                downs[t] = int32(down) if before + t < features else int32(FAR)
                acrosses[t] = int32(across)
            if before + lane < features:  # a thread's feature is that of its lane
                source = (above + line) * features + before + lane
                for step in range(EACH):
                    k = int32(line + step * LINES)
                    if k < tall:
                        tile[lane * PITCH + k] = load(patches, source, 1, 0, 1)[0]
                    source += LINES * features
            cuda.syncthreads()  # the tile is there, and where its features lie
            for step in range(EACH):  # and now its patch
                k = int32(line + step * LINES)
                row, column = int32(y + downs[k]), int32(x + acrosses[k])
                if row >= 0 and row < height and column >= 0 and column < width:
                    target = first + offsets[k]
                    held = load(images, target, 1, 0, 1)[0] if add else ZERO
                    store(images, target, 1, 0, (held + tile[k * PITCH + lane],))
            cuda.syncthreads()  # it has been read
            before += int64(cuda.gridDim.y) * EDGE

    return fold_apart


@functools.cache
def fold(dtype: str, threads: int, steps: Steps):
    """Kernel: the transpose of `unfold`: each number of an image gathers what falls on it, patch after patch.

    Added where `add`, else written where a patch lies. `first` is the first image that a patch lies on. A thread owns a
    place, and goes through channels. Grid (⌈places of these images / edge⌉, any): blocks along y share the channels.
    """
    TYPE, EDGE = getattr(types, dtype), edge(threads)
    LINES = threads // EDGE
    KH, KW, SH, SW, DH, DW = steps
    DOWN, ACROSS = (KH - 1) * DH, (KW - 1) * DW
    ZERO = TYPE(0)

    @kernel(threads)
    def fold(patches, out_height, out_width, pad_height, pad_width, start, add, first, images):
        t = int32(cuda.threadIdx.x)
        line = t // EDGE
        channels, height, width = int64(images.shape[1]), int64(images.shape[2]), int64(images.shape[3])
        rows, features = int64(patches.shape[0]), int64(patches.shape[1])
        place = int64(cuda.blockIdx.x) * EDGE + t - line * EDGE
        n = place // (height * width)
        within = place - n * height * width
        n += first
        y = within // width
        bottom, right = y + pad_height, within - y * width + pad_width
        top, left = bottom - DOWN, right - ACROSS
        h_begin = (top + SH - 1) // SH if top > 0 else int64(0)
        w_begin = (left + SW - 1) // SW if left > 0 else int64(0)
        h_end, w_end = min(bottom // SH, int64(out_height) - 1), min(right // SW, int64(out_width) - 1)
        c = int64(cuda.blockIdx.y) * LINES + line
        while c < channels:
            total, met = ZERO, int32(0)
            h = h_begin
            while h <= h_end:
                i = (bottom - h * SH) // DH
                w = w_begin
                while w <= w_end:
                    j = (right - w * SW) // DW
                    r = (n * out_height + h) * out_width + w - start
                    if h * SH + i * DH == bottom and w * SW + j * DW == right and r >= 0 and r < rows:
                        total += load(patches, r * features + (c * KH + i) * KW + j, 1, 0, 1)[0]
                        met = int32(1)
                    w += 1
                h += 1
            if met > 0:
                target = ((n * channels + c) * height + y) * width + right - pad_width
                held = load(images, target, 1, 0, 1)[0] if add else ZERO
                store(images, target, 1, 0, (held + total,))
            c += int64(cuda.gridDim.y) * LINES

    return fold
