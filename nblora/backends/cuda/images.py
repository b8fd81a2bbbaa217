"""Operations on images on a GPU: patches, pooling, norms of channels."""

import math
from typing import Any

import numpy as np

from nblora.kernels.patches import cuda as patches
from nblora.kernels.patches.window import Slide, Window
from nblora.kernels.pool import cuda as kernels

from ..blocks import Pooling
from ..convolution import Convolution
from ..protocol import Array, Product
from .deferred import Deferred
from .shapes import NAMES, base_aligned

PIECE = 64 << 20
"""Bytes of patches held at a time: enough rows to fill a GPU with tiles of their product."""

MOST_SHARES = 64
"""Shares of a sum over rows: adding them up takes one read after the other."""

MOST_ACROSS = 65535
"""Blocks of a grid along its second axis."""


class Images(Deferred):
    """The operations of `protocol.Backend` and `ReferenceBlocks` whose arrays are images."""

    # --- patches -----------------------------------------------------------------------------------------------

    def convolution(self, slide: Slide) -> Product:
        """The product of patches."""
        return Convolution(self, slide, PIECE)  # type: ignore[arg-type]  # a whole backend

    def unfold(self, images: Array, window: Window, start: int, stop: int) -> Array:
        """Patches [start, stop) of images as rows."""
        rows = self._device.empty((stop - start, window.features), images.dtype)
        if rows.size:
            threads, steps = self._threads(images), patches.Steps.of(window)
            kernel = patches.unfold(NAMES[images.dtype], threads, steps)
            grid = self._tiles(threads, rows.shape)
            self._device.launch(kernel, grid, threads, images, *_lie(window, start), rows)
        return rows

    def fold(self, rows: Array, window: Window, start: int, images: Array, add: bool) -> None:
        """The transpose of `unfold`, in place."""
        self._before_writing(images)
        if not rows.size:
            return
        threads, steps = self._threads(images), patches.Steps.of(window)
        if steps.apart:
            kernel = patches.fold_apart(NAMES[images.dtype], threads, steps)
            grid = self._tiles(threads, rows.shape)
            self._device.launch(kernel, grid, threads, rows, *_lie(window, start), int(add), images)
            return
        first, last = start // window.places, (start + len(rows) - 1) // window.places
        kernel, edge = patches.fold(NAMES[images.dtype], threads, steps), patches.edge(threads)
        tall = -(-(last + 1 - first) * window.height * window.width // edge)
        grid = tall, self._shares(tall, -(-window.channels * edge // threads))
        self._device.launch(kernel, grid, threads, rows, *_lie(window, start), int(add), first, images)

    def _tiles(self, threads: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """The grid over tiles of patches: all of their rows, and so many shares of the features as fill the device."""
        tall, wide = (-(-size // patches.edge(threads)) for size in shape)
        return tall, self._shares(tall, wide)

    def _shares(self, tall: int, most: int) -> int:
        """Blocks along the second axis, at most `most`, where the first has `tall`."""
        return max(1, min(-(-self._device.waves * self._device.multiprocessors // tall), most, MOST_ACROSS))

    # --- pooling -----------------------------------------------------------------------------------------------

    def pool(self, x: Array, shape: Pooling) -> tuple[Array, Array]:
        """Maxima or means of windows, and where each maximum was."""
        self._device.settle()
        maximum, kernel, stride, padding = shape
        y = self._device.empty((*x.shape[:2], *shape.reach(*x.shape[2:])), x.dtype)
        places = self._device.empty((y.size if maximum else 0,), np.int64)
        if y.size:
            threads, planes = self._threads(x), math.prod(x.shape[:2])
            bits, grid = self._planes(threads, planes, math.prod(y.shape[2:]))
            self._device.launch(
                kernels.pool(NAMES[x.dtype], threads, maximum),
                grid,
                threads,
                x.reshape(planes, *x.shape[2:]),
                *kernel,
                *stride,
                *padding,
                x.dtype.type(math.prod(kernel)),
                bits,
                y.reshape(planes, *y.shape[2:]),
                places,
            )
        return y, places.reshape(y.shape) if maximum else places

    def pool_gradient(self, grad: Array, places: Array, shape: Pooling, height: int, width: int) -> Array:
        """The gradient of images of this height and width."""
        maximum, kernel, stride, padding = shape
        gx = self._device.empty((*grad.shape[:2], height, width), grad.dtype)
        if gx.size:
            threads, planes = self._threads(grad), math.prod(grad.shape[:2])
            bits, grid = self._planes(threads, planes, height * width)
            self._device.launch(
                kernels.pool_gradient(NAMES[grad.dtype], threads, maximum, tuple(stride)),
                grid,
                threads,
                grad.reshape(planes, *grad.shape[2:]),
                self.from_host(places).reshape(places.size),
                *kernel,
                *padding,
                grad.dtype.type(math.prod(kernel)),
                bits,
                gx.reshape(planes, height, width),
            )
        return gx

    def means(self, x: Array) -> Array:
        """The mean of every channel of images."""
        self._device.settle()
        y = self._device.empty(x.shape[:2], x.dtype)
        if y.size:
            threads, places = self._threads(x), math.prod(x.shape[2:])
            bits = min(threads.bit_length() - 1, (places // 2).bit_length())
            grid = -(-y.size // (threads >> bits))
            kernel = kernels.channels(NAMES[x.dtype], threads).means
            planes, count = x.reshape(y.size, places), x.dtype.type(places)
            self._device.launch(kernel, grid, threads, planes, count, bits, y.reshape(y.size))
        return y

    def means_gradient(self, grad: Array, height: int, width: int) -> Array:
        """The gradient of images of this height and width."""
        gx = self._device.empty((*grad.shape, height, width), grad.dtype)
        if gx.size:
            threads, places = self._threads(grad), height * width
            lanes, count = 16 // grad.dtype.itemsize, grad.dtype.type(places)
            bits, grid = self._planes(threads, grad.size, -(-places // lanes))
            kernel = kernels.channels(NAMES[grad.dtype], threads).means_gradient
            aligned = int(places % lanes == 0 and base_aligned(gx))
            flat = grad.reshape(grad.size), gx.reshape(grad.size, places)
            self._device.launch(kernel, grid, threads, flat[0], count, bits, aligned, flat[1])
        return gx

    def _planes(self, threads: int, planes: int, each: int) -> tuple[int, tuple[int, int]]:
        """The bits of places, or vectors, of a block, and its grid, for planes that have `each` of them."""
        bits = min(threads.bit_length() - 1, (each - 1).bit_length())
        return bits, (-(-planes // (threads >> bits)), min(-(-each >> bits), MOST_ACROSS))

    # --- channels ----------------------------------------------------------------------------------------------

    def channels(self, x: Array, scale: Array, shift: Array, code: int) -> Array:
        """act(x scale + shift), each channel with its own numbers."""
        self._device.settle()
        y = self._device.empty(x.shape, x.dtype)
        if not y.size:
            return y
        threads, (images, count), places = self._threads(x), x.shape[:2], math.prod(x.shape[2:])
        each = kernels.channels(NAMES[x.dtype], threads)
        if places == 1:
            bits, across = _columns(threads, count)
            grid = across, self._shares(across, -(-images // (threads >> bits)))
            flat = x.reshape(images, count), y.reshape(images, count)
            self._device.launch(each.of_rows, grid, threads, flat[0], scale, shift, code, bits, flat[1])
            return y
        lanes = 16 // x.dtype.itemsize
        bits, grid = self._planes(threads, images * count, -(-places // lanes))
        aligned = int(places % lanes == 0 and base_aligned(x, y))
        flat = x.reshape(images, count, places), y.reshape(images, count, places)
        self._device.launch(each.of_images, grid, threads, flat[0], scale, shift, code, bits, aligned, flat[1])
        return y

    def channels_gradient(
        self, grad: Array, x: Array, scale: Array, shift: Array, code: int
    ) -> tuple[Array, Array, Array]:
        """Gradients of x, of scale and of shift."""
        gx = self._device.empty(x.shape, x.dtype)
        (images, count), places = x.shape[:2], math.prod(x.shape[2:])
        if not x.size:
            return gx, self.zeros((count,), x.dtype), self.zeros((count,), x.dtype)
        threads = self._threads(x)
        each = kernels.channels(NAMES[x.dtype], threads)
        numbers: tuple[int, ...]
        if places == 1:
            bits, across = _columns(threads, count)
            members = threads >> bits
            down = self._shares(across, min(-(-images // (8 * members)), -(-MOST_SHARES // members)))
            chunk = -(-images // (down * members))
            sums = self._device.empty((2 * down * members, count), x.dtype)
            flat = [array.reshape(images, count) for array in (grad, x, gx)]
            kernel, grid, numbers = each.of_rows_gradient, (across, down), (bits, chunk)
        else:
            lanes = 16 // x.dtype.itemsize
            bits, _ = self._planes(threads, 1, -(-places // lanes))
            splits = self._shares(count, -(-images // (threads >> bits)))
            chunk = -(-images // splits)
            splits = -(-images // chunk)
            sums = self._device.empty((2 * splits, count), x.dtype)
            aligned = int(places % lanes == 0 and base_aligned(grad, x, gx))
            flat = [array.reshape(images, count, places) for array in (grad, x, gx)]
            kernel, grid, numbers = each.of_images_gradient, (count, splits), (bits, chunk, aligned)
        self._device.launch(kernel, grid, threads, *flat[:2], scale, shift, code, *numbers, flat[2], sums)
        added = (sums if len(sums) == 2 else self._finish(sums, 2)).reshape(2 * count)
        return gx, added.part(0, count), added.part(count, 2 * count)

    def channel_scale(
        self, weight: Array, bias: Array, mean: Array, variance: Array, eps: float
    ) -> tuple[Array, Array]:
        """What a batch norm with fixed statistics multiplies each channel with, and adds."""
        self._device.settle()
        scale, shift = (self._device.empty(weight.shape, weight.dtype) for _ in range(2))
        threads, number = self._threads(weight), weight.dtype.type(eps)
        kernel = kernels.channels(NAMES[weight.dtype], threads).scales
        if scale.size:
            grid = self._blocks(scale.size, threads)
            self._device.launch(kernel, grid, threads, weight, bias, mean, variance, number, scale, shift)
        return scale, shift

    def channel_scale_gradient(self, scale: Array, shift: Array, mean: Array, variance: Array, eps: float) -> Array:
        """The gradient of the weight, of those of scale and shift."""
        weight = self._device.empty(scale.shape, scale.dtype)
        threads, number = self._threads(scale), scale.dtype.type(eps)
        kernel = kernels.channels(NAMES[scale.dtype], threads).scales_gradient
        if weight.size:
            grid = self._blocks(weight.size, threads)
            self._device.launch(kernel, grid, threads, scale, shift, mean, variance, number, weight)
        return weight


def _lie(window: Window, start: int) -> tuple[Any, ...]:
    """How patches lie on an image, as kernels are told."""
    return window.out_height, window.out_width, window.ph, window.pw, np.int64(start)


def _columns(threads: int, count: int) -> tuple[int, int]:
    """The bits of columns of a block, and how many blocks have all."""
    bits = min(threads.bit_length() - 1, (count - 1).bit_length())
    return bits, -(-count >> bits)
