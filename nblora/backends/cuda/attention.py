"""Attention and rotary positions on a GPU."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nblora.kernels.attention.cuda import few, forward, gradients, rotary
from nblora.kernels.attention.cuda.few import Few
from nblora.kernels.attention.cuda.tiles import LOG2_E, Tile

from ..blocks import Heads
from ..device import Device, DeviceArray
from ..protocol import Array
from .deferred import Deferred
from .shapes import NAMES, base_aligned

FEW = 4
"""Queries of a sequence, at most, of which each has a block of its own: they read the same keys again."""


@dataclass(frozen=True)
class AttentionShapes:
    """Tiles of one dtype, by the sizes of heads that they take, in ascending order; and threads of other blocks."""

    forward: tuple[Tile, ...]
    gradient: tuple[Tile, ...]
    forward_dropping: tuple[Tile, ...]  # what is dropped takes registers
    gradient_dropping: tuple[Tile, ...]
    few: tuple[Few, ...]
    threads: int


_128, _256 = Tile(64, 64, 128, 256, 16, resident=1), Tile(32, 128, 256, 256, resident=1)
_NARROW = tuple(Tile(64, 32, size, 128) for size in (32, 64))
_128_64 = Tile(32, 32, 128, 256, 16, "float64", resident=1)
_256_64 = Tile(16, 64, 256, 256, dtype="float64", resident=1)
_NARROW_64 = tuple(Tile(32, 32, size, 128, dtype="float64") for size in (32, 64))
ATTENTION = {
    "float32": AttentionShapes(
        (*(Tile(64, 64, size, 128) for size in (32, 64, 128)), Tile(64, 64, 256, 256, resident=1)),
        (*(Tile(64, 64, size, 128) for size in (32, 64)), _128, _256),
        (*_NARROW, _128, Tile(32, 64, 256, 128, resident=1)),
        (*_NARROW, _128, _256),
        tuple(Few(64, size, 128) for size in (32, 64, 128, 256)),
        256,
    ),
    "float64": AttentionShapes(
        (*_NARROW_64, Tile(32, 32, 128, 128, dtype="float64"), Tile(32, 32, 256, 256, 16, "float64", resident=1)),
        *((*_NARROW_64, _128_64, _256_64),) * 3,
        tuple(Few(64, size, 128, "float64") for size in (32, 64, 128, 256)),
        256,
    ),
}


def _tiny(rows: int, columns: int, dtype: str) -> AttentionShapes:
    sizes, lanes = (16, 32, 64, 128, 256), 16 // np.dtype(dtype).itemsize
    tiles = tuple(Tile(rows, columns, size, 8, 4, dtype) for size in sizes)
    return AttentionShapes(*(tiles,) * 4, tuple(Few(16, size, max(8, size // lanes), dtype) for size in sizes), 16)


TINY_ATTENTION = {"float32": _tiny(8, 16, "float32"), "float64": _tiny(4, 8, "float64")}
"""A few threads each, for Numba's simulator, to which a thread is the dearest thing, and for tests."""


class Attention(Deferred):
    """The operations of `ReferenceBlocks` that look at heads."""

    def __init__(self, device: Device, precision: str = "float32") -> None:
        super().__init__(device, precision)
        self._attention = TINY_ATTENTION if device.simulated else ATTENTION
        self._tables: dict[int, tuple[Any, int, dict[int, np.ndarray]]] = {}

    def attention(self, q: Array, k: Array, v: Array, shape: Heads) -> tuple[Array, Array]:
        """softmax(scale q kᵀ) v for each sequence and head, and the logarithms of the sums, (N, heads).

        q (N, heads·size), k and v (M, key_heads·size).
        """
        self._device.settle()
        o, sums = self._device.empty(q.shape, q.dtype), self._device.empty((q.shape[0], shape.heads), q.dtype)
        if not q.size:
            return o, sums
        shapes, size = self._attention[NAMES[q.dtype]], q.shape[1] // shape.heads
        group = shape.heads // shape.key_heads
        sequences, numbers = self._sequences(shape), self._head_numbers(q, shape)
        aligned = self._heads_aligned(size, q, k, v, o)
        if not shape.bar and self._tables_of(shape.begins)[1] <= FEW:
            block = replace(_fitting(shapes.few, size), several=group > 1)
            grid = q.shape[0], shape.key_heads * -(-group // block.rows), 1
            tiles = self._row_tiles(shape.begins, 1)
            self._device.launch(
                few.few(block), grid, block.threads, q, k, v, tiles, *sequences, *numbers, aligned, o, sums
            )
            return o, sums
        tile = _fitting(shapes.forward_dropping if shape.bar else shapes.forward, size)
        tiles = self._row_tiles(shape.begins, tile.rows)
        kernel, grid = forward.forward(tile, bool(shape.bar)), (tiles.shape[0], shape.heads, 1)
        dropping = _dropping(shape, q.dtype)
        self._device.launch(
            kernel, grid, tile.threads, q, k, v, tiles, *sequences, *numbers, *dropping, aligned, o, sums
        )
        return o, sums

    def attention_gradient(
        self, grad: Array, q: Array, k: Array, v: Array, o: Array, sums: Array, shape: Heads
    ) -> tuple[Array, Array, Array]:
        """Gradients of q, k and v."""
        gq, gk, gv = (self._device.empty(array.shape, array.dtype) for array in (q, k, v))
        shapes, size = self._attention[NAMES[q.dtype]], q.shape[1] // shape.heads
        tile, dtype = _fitting(shapes.gradient_dropping if shape.bar else shapes.gradient, size), q.dtype
        products = self._device.empty(sums.shape, dtype)
        aligned = self._heads_aligned(size, grad, q, k, v, o, gq, gk, gv)
        sequences, numbers = self._sequences(shape), self._head_numbers(q, shape)
        scalars = *numbers, *_dropping(shape, dtype), dtype.type(shape.scale), aligned
        given = grad, q, k, v, sums, products
        if q.size:
            blocks = -(-sums.size * gradients.MEMBERS // shapes.threads)
            kernel = gradients.output_products(NAMES[dtype], shapes.threads)
            self._device.launch(kernel, blocks, shapes.threads, grad, o, size, aligned, products)
            tiles = self._row_tiles(shape.begins, tile.rows)
            grid = tiles.shape[0], shape.heads, 1
            kernel = gradients.query_gradient(tile, bool(shape.bar))
            self._device.launch(kernel, grid, tile.threads, *given, tiles, *sequences, *scalars, gq)
        if k.size:
            tiles = self._row_tiles(shape.key_begins, tile.rows)
            grid = tiles.shape[0], shape.key_heads, 1
            kernel = gradients.key_gradients(tile, bool(shape.bar))
            self._device.launch(kernel, grid, tile.threads, *given, tiles, *sequences, *scalars, gk, gv)
        return gq, gk, gv

    def rotate(
        self, x: Array, positions: np.ndarray, cosines: np.ndarray, sines: np.ndarray, heads: int, back: bool = False
    ) -> None:
        """Turn the first 2·half features of each head of rows (N, heads·size), in place, by the angles of their
        positions, the pairs (i, i + half); `cosines` and `sines` (positions, half). `back`: the other way."""
        self._before_writing(x)
        if not x.size or not cosines.shape[1]:
            return
        c, s = self._remembered(cosines), self._remembered(sines)
        size, half, threads = x.shape[1] // heads, cosines.shape[1], self._attention[NAMES[x.dtype]].threads
        lanes = 16 // x.dtype.itemsize
        aligned = int(size % lanes == half % lanes == 0 and base_aligned(x, c, s))
        blocks = self._blocks(x.shape[0] * threads, threads)
        direction = x.dtype.type(-1 if back else 1)
        kernel = rotary.rotate(NAMES[x.dtype], threads)
        self._device.launch(
            kernel, blocks, threads, x, self._remembered(positions), c, s, heads, size, direction, aligned
        )

    def _tables_of(self, begins: np.ndarray) -> tuple[Any, int, dict[int, np.ndarray]]:
        """What is known of sequences for as long as `begins` lives: a reference to it, the most rows that one has, and
        tables of tiles by their rows."""
        key = id(begins)
        known = self._tables.get(key)
        if known is None or known[0]() is not begins:
            reference = weakref.ref(begins, lambda _: self._tables.pop(key, None))
            known = self._tables[key] = reference, int(np.diff(begins).max(initial=0)), {}
        return known

    def _row_tiles(self, begins: np.ndarray, rows: int) -> DeviceArray:
        """(sequence, first row) of each tile of so many rows, the last rows of sequences first: where attention is
        causal these have most to do."""
        tables = self._tables_of(begins)[2]
        if rows not in tables:
            tiles = -(-np.diff(begins) // rows)
            sequences = np.repeat(np.arange(len(tiles)), tiles)
            places = np.arange(len(sequences)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
            table = np.stack([sequences, begins[:-1][sequences] + places * rows], axis=1)
            tables[rows] = table[np.argsort(-places, kind="stable")].astype(np.int64)
        return self._remembered(tables[rows])

    def _sequences(self, shape: Heads) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        """Where queries begin, and where keys begin and end."""
        key_begins = self._remembered(shape.key_begins)
        ends = key_begins.part(1, key_begins.size) if shape.key_ends is None else self._remembered(shape.key_ends)
        return self._remembered(shape.begins), key_begins, ends

    def _head_numbers(self, q: Array, shape: Heads) -> tuple[Any, ...]:
        """Heads that share a key head, features of a head, whether causal, and the scale to base 2."""
        size = q.shape[1] // shape.heads
        return shape.heads // shape.key_heads, size, int(shape.causal), q.dtype.type(shape.scale * LOG2_E)

    def _heads_aligned(self, size: int, *arrays: Array) -> int:
        return int(size % (16 // arrays[0].dtype.itemsize) == 0 and base_aligned(*arrays))


def _fitting(shapes: Any, size: int) -> Any:
    for shape in shapes:
        if size <= shape.size:
            return shape
    raise ValueError(f"on a GPU a head has at most {shapes[-1].size} features, got {size}: stay on the CPU")


def _dropping(shape: Heads, dtype: np.dtype) -> tuple[Any, ...]:
    """Seed, bar and gain of the weights that are kept."""
    seed = np.array(shape.seed % 2**64, np.uint64).astype(np.int64)
    return np.int64(seed), np.int64(shape.bar), dtype.type(1 / (1 - shape.dropout))
