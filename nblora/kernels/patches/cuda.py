"""Patches of images as rows, and back.

Rows have the numbers of a patch side by side, images those of a line: a tile of both is turned round in shared memory,
so that what is read and what is written lie side by side for the threads of a warp. A thread looks up its patch once
and then goes through features; the kernel's sizes are constants, so that no feature takes a division.
"""

import functools
from typing import NamedTuple

from numba.core import types

from nblora.kernels.common.cuda.intrinsics import load, store
from nblora.kernels.common.cuda.target import cuda, int32, int64, kernel

from .window import Window


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


@functools.cache
def unfold(dtype: str, threads: int, steps: Steps):
    """Kernel: patches[r] = patch `start` + r of images (N, channels, height, width), zeros outside.

    patches (rows, features), in the order (channel, i, j). Grid (⌈rows / edge⌉, any): blocks along y share the
    features.
    """
    TYPE, EDGE = getattr(types, dtype), edge(threads)
    PITCH, LINES, EACH = EDGE + 1, threads // EDGE, EDGE * EDGE // threads
    SIZE = EDGE * PITCH
    KH, KW, SH, SW, DH, DW = steps
    ZERO = TYPE(0)

    @kernel(threads)
    def unfold(images, out_height, out_width, pad_height, pad_width, start, patches):
        tile = cuda.shared.array(SIZE, TYPE)
        t = int32(cuda.threadIdx.x)
        line = t // EDGE
        lane = t - line * EDGE
        channels, height, width = int64(images.shape[1]), int64(images.shape[2]), int64(images.shape[3])
        rows, features = int64(patches.shape[0]), int64(patches.shape[1])
        above = int64(cuda.blockIdx.x) * EDGE
        place = start + above + lane
        places = int64(out_height) * out_width
        n = place // places
        place -= n * places
        h = place // out_width
        y, x = h * SH - pad_height, (place - h * out_width) * SW - pad_width
        image = n * channels * height * width
        before = int64(cuda.blockIdx.y) * EDGE
        while before < features:
            for step in range(EACH):  # a thread's patch is that of its lane
                k = line + step * LINES
                value, f = ZERO, before + k
                if above + lane < rows and f < features:
                    c = f // (KH * KW)
                    i = (f - c * (KH * KW)) // KW
                    down, across = y + i * DH, x + (f - (c * KH + i) * KW) * DW
                    if down >= 0 and down < height and across >= 0 and across < width:
                        value = load(images, image + (c * height + down) * width + across, 1, 0, 1)[0]
                tile[k * PITCH + lane] = value
            cuda.syncthreads()  # the tile is there
            for step in range(EACH):  # its lane's feature
                k = line + step * LINES
                if above + k < rows and before + lane < features:
                    store(patches, (above + k) * features + before + lane, 1, 0, (tile[lane * PITCH + k],))
            cuda.syncthreads()  # it has been written
            before += int64(cuda.gridDim.y) * EDGE

    return unfold


@functools.cache
def fold_apart(dtype: str, threads: int, steps: Steps):
    """Kernel: the transpose of `unfold` where no two patches share a place: every number has one place to go to.

    Added where `add`, else written. Grid as that of `unfold`.
    """
    TYPE, EDGE = getattr(types, dtype), edge(threads)
    PITCH, LINES, EACH = EDGE + 1, threads // EDGE, EDGE * EDGE // threads
    SIZE = EDGE * PITCH
    KH, KW, SH, SW, DH, DW = steps
    ZERO = TYPE(0)

    @kernel(threads)
    def fold_apart(patches, out_height, out_width, pad_height, pad_width, start, add, images):
        tile = cuda.shared.array(SIZE, TYPE)
        t = int32(cuda.threadIdx.x)
        line = t // EDGE
        lane = t - line * EDGE
        channels, height, width = int64(images.shape[1]), int64(images.shape[2]), int64(images.shape[3])
        rows, features = int64(patches.shape[0]), int64(patches.shape[1])
        above = int64(cuda.blockIdx.x) * EDGE
        place = start + above + lane
        places = int64(out_height) * out_width
        n = place // places
        place -= n * places
        h = place // out_width
        y, x = h * SH - pad_height, (place - h * out_width) * SW - pad_width
        image = n * channels * height * width
        before = int64(cuda.blockIdx.y) * EDGE
        while before < features:
            for step in range(EACH):  # a thread's feature is that of its lane
                k = line + step * LINES
                if above + k < rows and before + lane < features:
                    value = load(patches, (above + k) * features + before + lane, 1, 0, 1)[0]
                    tile[lane * PITCH + k] = value
            cuda.syncthreads()  # the tile is there
            for step in range(EACH):  # its lane's patch
                k = line + step * LINES
                f = before + k
                if above + lane < rows and f < features:
                    c = f // (KH * KW)
                    i = (f - c * (KH * KW)) // KW
                    down, across = y + i * DH, x + (f - (c * KH + i) * KW) * DW
                    if down >= 0 and down < height and across >= 0 and across < width:
                        target = image + (c * height + down) * width + across
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
