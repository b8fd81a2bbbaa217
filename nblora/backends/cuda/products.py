"""Products of matrices: which tile, on which grid. Where a product has too few tiles to fill the device, its inner
dimension is split and the splits are added up in order."""

from typing import Any

import numpy as np

from nblora.kernels.linear.cuda import gradients, vectors
from nblora.kernels.linear.cuda.forward import OUT, WEIGHT, X
from nblora.kernels.linear.cuda.tiles import Tile
from nblora.kernels.update.cuda import elementwise

from ..protocol import Array
from .launching import Launching
from .shapes import NAMES, base_aligned, vector_flag

MOST_SPLITS = 32
"""Adding them up takes one read after the other."""


class Products(Launching):
    """Products, and what adds their splits up."""

    def _tile(self, rows: int, dtype: np.dtype) -> Tile:
        shapes = self._shapes[NAMES[dtype]]
        return shapes.flat if rows <= shapes.flat.rows else shapes.wide

    def _splits(self, tile: Tile, rows: int, columns: int, inner: int) -> tuple[tuple[int, int, int], int]:
        """Grid, rows along x, of which there may be 2³¹ tiles, and the share of `inner` of each split."""
        least = self._shapes[tile.dtype].split
        across, down = -(-columns // tile.columns), -(-rows // tile.rows)
        wanted = -(-self._filling(tile) // (across * down))
        # Where it is split at all, the groups of a block take shares of a split.
        most = 1 if inner < 2 * least else inner // (least // tile.groups)
        splits = max(1, min(wanted, most, MOST_SPLITS))
        chunk = -(-max(inner, 1) // (splits * tile.depth)) * tile.depth
        return (down, across, max(1, -(-inner // chunk))), chunk

    def _filling(self, tile: Tile) -> int:
        """Blocks that keep every multiprocessor busy."""
        return max(1, min(tile.resident, self._device.busy // tile.threads)) * self._device.multiprocessors

    def _product(
        self, tile: Tile, p: Array, p_inner: bool, q: Array, q_inner: bool, factor: float, mask: Array | None = None
    ) -> Array:
        """factor · (mask∘P) Q; P is (rows, inner) where `p_inner`, Q (columns, inner) where `q_inner`."""
        rows = p.shape[0 if p_inner else 1]
        sums = self._sums(tile, p, p_inner, q, q_inner, factor, mask)
        return sums if sums.shape[0] == rows else self._finish(sums, rows)

    def _sums(
        self, tile: Tile, p: Array, p_inner: bool, q: Array, q_inner: bool, factor: float, mask: Array | None = None
    ) -> Array:
        """The same, (splits·rows, columns), to be added up."""
        rows, inner = p.shape if p_inner else p.shape[::-1]
        columns = q.shape[0 if q_inner else 1]
        grid, chunk = self._splits(tile, rows, columns, inner)
        sums = self._device.empty((grid[2] * rows, columns), p.dtype)
        flags = vector_flag(X, p, tile) | vector_flag(WEIGHT, q, tile) | vector_flag(OUT, sums, tile)
        kernel = gradients.product(tile, p_inner, q_inner, mask is not None)
        shared = p if mask is None else mask
        self._device.launch(kernel, grid, tile.threads, p, shared, q, p.dtype.type(factor), flags, chunk, sums)
        return sums

    def _project(self, x: Array, matrix: Array, along: bool, factor: float, mask: Array | None = None) -> Array:
        """factor · (mask∘x) M for few columns; M is (columns, inner) where `along`."""
        if x.shape[0] > 1:
            return self._product(self._shapes[NAMES[x.dtype]].narrow, x, True, matrix, along, factor, mask)
        if mask is not None:
            x = self._masked(x, mask)
        return self._finish(self._vector_sums(x, matrix, along, None), 1, factor)

    def _masked(self, x: Array, mask: Array) -> Array:
        out = self._device.empty(x.shape, x.dtype)
        if out.size:
            threads = self._threads(x)
            kernel, aligned = elementwise(NAMES[x.dtype], threads).masked, int(base_aligned(x, mask, out))
            self._device.launch(kernel, self._blocks(out.size // 4 + 1, threads), threads, x, mask, out, aligned)
        return out

    def _vector_sums(self, x: Array, matrix: Array, along: bool, delta: Any) -> Array:
        """Sums of the products of one vector and a matrix, (splits, columns), to be finished."""
        shapes, dtype = self._shapes[NAMES[x.dtype]], x.dtype
        changed, factor = (delta.delta, dtype.type(delta.scaling)) if delta else (matrix, dtype.type(0))
        lanes = shapes.wide.lanes
        vector = x.reshape(x.size)
        aligned = int(matrix.shape[1] % lanes == 0 and base_aligned(matrix, x, changed))
        if along:
            rows = matrix.shape[0]
            sums = self._device.empty((1, rows), dtype)
            kernel = vectors.along_rows(NAMES[dtype], shapes.threads, delta is not None)
            grid = -(-rows // (shapes.threads // vectors.GROUP))
            self._device.launch(kernel, grid, shapes.threads, vector, matrix, changed, factor, aligned, sums)
            return sums
        return self._column_sums(vector, matrix, changed, factor, aligned, delta is not None, False)

    def _column_sums(
        self, x: Array, matrix: Array, changed: Array, factor: Any, aligned: int, delta: bool, ones: bool
    ) -> Array:
        shapes = self._shapes[NAMES[matrix.dtype]]
        rows, columns = matrix.shape
        across = -(-columns // (shapes.threads * shapes.wide.lanes))
        splits = max(1, min(-(-4 * self._device.multiprocessors // across), rows // 32))
        chunk = -(-rows // splits)
        splits = -(-rows // chunk)
        sums = self._device.empty((splits, columns), matrix.dtype)
        kernel = vectors.down_columns(NAMES[matrix.dtype], shapes.threads, delta, ones)
        self._device.launch(kernel, (across, splits), shapes.threads, x, matrix, changed, factor, aligned, chunk, sums)
        return sums

    def _finish(
        self,
        sums: Array,
        rows: int,
        factor: float = 1.0,
        *,
        low: Array | None = None,
        matrix: Array | None = None,
        strided: bool = False,
        mask: Array | None = None,
        bias: Array | None = None,
        code: int = 0,
        z: Array | None = None,
    ) -> Array:
        """Add the splits of `sums` up, and what else there is; z is written where it is given."""
        flags = (
            vectors.FINISH_LOW * (low is not None)
            | vectors.FINISH_MASK * (mask is not None)
            | vectors.FINISH_BIAS * (bias is not None)
            | vectors.FINISH_KEEP * (z is not None)
        )
        y = self._device.empty((rows, sums.shape[1]), sums.dtype)
        threads = self._threads(sums)
        bits = min(threads.bit_length(), sums.shape[1].bit_length() + (sums.shape[1].bit_count() > 1)) - 1
        self._device.launch(
            vectors.finish(NAMES[sums.dtype], threads),
            (-(-rows // (threads >> bits)), -(-sums.shape[1] // (1 << bits)), 1),
            threads,
            bits,
            sums.shape[0] // rows,
            sums,
            sums.dtype.type(factor),
            sums if low is None else low,
            sums if matrix is None else matrix,
            int(strided),
            sums if mask is None else mask,
            self._zero_bias(1, sums.dtype) if bias is None else bias,
            code,
            flags,
            y if z is None else z,
            y,
        )
        return y
