"""What is put off, to be launched together: gradients of factors, and updates by one rule."""

import numpy as np

from nblora.kernels.linear.cuda import gradients
from nblora.kernels.linear.cuda.forward import OUT, WEIGHT, X
from nblora.kernels.update.cuda import grouped

from ..device import Device
from ..protocol import Array
from .products import Products
from .shapes import NAMES, vector_flag

MOST_HELD = 64 << 20
"""Bytes that put-off products may keep alive: where they are larger, one fills the device alone."""


class Deferred(Products):
    """Work that waits until something else is asked for."""

    def __init__(self, device: Device, precision: str = "float32") -> None:
        super().__init__(device, precision)
        self._products: list[tuple[Array, Array | None, Array, Array]] = []
        self._held = 0
        self._updates: list[tuple[str, list[Array], tuple[float, ...]]] = []

    def _put_off(self, rule: str, arrays: list[Array], scalars: tuple[float, ...]) -> None:
        """Keep an update until something else is asked for; updates by one rule then take one launch."""
        self._flush_products()
        if self._updates and (self._updates[0][0], self._updates[0][1][0].dtype) != (rule, arrays[0].dtype):
            self._flush_updates()
        if arrays[0].size:
            self._updates.append((rule, arrays, scalars))
            self._device.defer(self._flush)

    def _flush(self) -> None:
        self._flush_products()
        self._flush_updates()

    def _flush_updates(self) -> None:
        updates, self._updates = self._updates, []
        if not updates:
            return
        rule, first = updates[0][0], updates[0][1][0]
        threads = self._threads(first)
        table = self._upload([[arrays[0].size, *(a.address for a in arrays)] for _, arrays, _ in updates], np.int64)
        numbers = self._upload([scalars for _, _, scalars in updates], np.float64)
        blocks = self._blocks(max(arrays[0].size for _, arrays, _ in updates), threads)
        kernel = getattr(grouped(NAMES[first.dtype], threads), rule)
        self._device.launch(kernel, (blocks, len(updates), 1), threads, table, numbers)

    def _factor_gradient(self, p: Array, q: Array, mask: Array | None = None) -> Array:
        """(mask∘P)ᵀ Q over the samples: put off where one split of a few tiles does it and nobody else can write to
        what it reads."""
        tile = self._shapes[NAMES[p.dtype]].narrow
        grid, _ = self._splits(tile, p.shape[1], q.shape[1], p.shape[0])
        if grid[2] > 1 or not all(self._device.is_ours(array) for array in (p, q, *((mask,) if mask else ()))):
            return self._product(tile, p, False, q, False, 1.0, mask)
        out = self._device.empty((p.shape[1], q.shape[1]), p.dtype)
        if self._products and self._products[0][0].dtype != p.dtype:
            self._flush_products()
        self._products.append((p, mask, q, out))
        self._held += p.nbytes + q.nbytes
        self._device.defer(self._flush)
        if self._held > MOST_HELD:
            self._flush_products()
        return out

    def _flush_products(self) -> None:
        products, self._products, self._held = self._products, [], 0
        for masked in (False, True):
            chosen = [product for product in products if (product[1] is not None) == masked]
            if not chosen:
                continue
            tile = self._shapes[NAMES[chosen[0][0].dtype]].narrow
            rows, blocks = [], 0
            for p, mask, q, out in chosen:
                other = p if mask is None else mask
                flags = vector_flag(X, p, tile, other) | vector_flag(WEIGHT, q, tile) | vector_flag(OUT, out, tile)
                down, across = -(-p.shape[1] // tile.rows), -(-q.shape[1] // tile.columns)
                addresses = p.address, other.address, q.address, out.address
                rows.append((blocks, *addresses, p.shape[1], q.shape[1], p.shape[0], flags, down))
                blocks += down * across
            kernel = gradients.grouped_products(tile, masked)
            self._device.launch(kernel, (blocks, 1, 1), tile.threads, self._upload(rows, np.int64))

    def _before_reading(self, *arrays: Array) -> None:
        written = [product[3] for product in self._products]
        written += [array for _, (parameter, _, *slots), _ in self._updates for array in (parameter, *slots)]
        if any(_overlap(array, other) for array in arrays for other in written):
            self._device.settle()

    def _before_writing(self, *arrays: Array) -> None:
        waiting = [array for product in self._products for array in product if array is not None]
        waiting += [array for _, held, _ in self._updates for array in held]
        if any(_overlap(array, other) for array in arrays for other in waiting):
            self._device.settle()


def _overlap(one: Array, other: Array) -> bool:
    return bool(one.address < other.address + other.nbytes and other.address < one.address + one.nbytes)
