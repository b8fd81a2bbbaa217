"""The CUDA backend: which kernel, on which tile, on which grid. Arrays stay on the device from one call to the next."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from nblora.errors import DeviceUnavailableError
from nblora.kernels.linear.cuda import forward as forward_kernels
from nblora.kernels.linear.cuda import gradients, vectors
from nblora.kernels.linear.cuda.forward import FACTOR, HAS_BASE, HAS_LOW, KEEP, LOW, OUT, WEIGHT, X
from nblora.kernels.linear.cuda.tiles import Tile
from nblora.kernels.losses.cuda import losses
from nblora.kernels.masks import cuda as masks
from nblora.kernels.update.cuda import DELTA, elementwise, grouped
from nblora.kernels.update.cuda import WEIGHT as WEIGHT_ITSELF

from .device import Device, DeviceArray, open_device
from .protocol import Array, Gradients, LowRank, Number, Operands, Saved, keeps_input


@dataclass(frozen=True)
class Shapes:
    """Tiles and block sizes for one dtype: `wide` products, few rows (`flat`), few columns (`narrow`), dense updates of
    weights of few tiles (`small`), and the rest.

    A product is split from twice `split` inner elements on: below it adding the splits up costs what they save.
    """

    wide: Tile
    flat: Tile
    narrow: Tile
    small: Tile
    threads: int
    split: int = 256


MOST_HELD = 64 << 20
"""Bytes that put-off products may keep alive: where they are larger, one fills the device alone."""

WORTH_SPLITTING = 4
"""Splits of a dense update from which on its gradient, added up from them, is worth a place in memory."""

MOST_SPLITS = 32
"""Adding them up takes one read after the other."""

# NumPy puts a dtype's name together anew each time.
NAMES = {np.dtype(name): name for name in ("float32", "float64")}

PLAIN = {
    "float32": Shapes(Tile(128, 128, 8), Tile(32, 128, 8), Tile(64, 32, 4, groups=4), Tile(64, 64, 8, groups=4), 256),
    "float64": Shapes(
        Tile(64, 64, 8, "float64"),
        Tile(16, 64, 8, "float64"),
        Tile(64, 32, 8, "float64"),
        Tile(32, 32, 8, "float64", groups=4),
        256,
    ),
}
TENSOR = PLAIN | {
    "float32": Shapes(
        Tile(128, 128, 16, tensor=True),
        Tile(32, 128, 16, tensor=True),
        PLAIN["float32"].narrow,
        Tile(64, 64, 16, tensor=True, groups=2),
        256,
    )
}
# Numba's simulator makes a Python thread of each thread: blocks of 32, few of them.
_TINY, _TINY_64 = Tile(32, 64, 16), Tile(16, 32, 8, "float64")
SIMULATED = {
    "float32": Shapes(_TINY, _TINY, _TINY, _TINY, 32),
    "float64": Shapes(_TINY_64, _TINY_64, _TINY_64, _TINY_64, 32),
}


class Pending:
    """A number on the device: the sum of a few elements, which `read` or `float` brings to the host."""

    __slots__ = ("begin", "buffer", "end")

    def __init__(self, buffer: DeviceArray, begin: int, end: int) -> None:
        self.buffer, self.begin, self.end = buffer, begin, end

    def sum_of(self, host: np.ndarray) -> float:
        """The number, from the buffer's values."""
        return float(host[self.begin : self.end].sum())

    def __float__(self) -> float:
        return float(self.buffer.part(self.begin, self.end).copy_to_host().sum())


class CUDABackend:
    """The operations of `protocol.Backend` on one GPU.

    Everything runs on the default stream, in the order of the calls: a kernel that changes D comes after those that
    read it. Where a product has too few tiles to fill the device, its inner dimension is split and the splits are
    added up in order.
    """

    def __init__(self, device: Device, precision: str = "float32") -> None:
        self.device, self.precision = device.name, precision
        self._device = device
        self._plain = SIMULATED if device.simulated else PLAIN
        self._shapes = TENSOR if precision == "tf32" else self._plain
        self._zero_biases: dict[Any, DeviceArray] = {}
        self._numbers: tuple[DeviceArray, int] | None = None
        self._products: list[tuple[Array, Array | None, Array, Array]] = []
        self._rings = {np.dtype(kind): (device.empty((4096,), kind), 0) for kind in ("int64", "float64")}
        self._held = 0
        self._updates: list[tuple[str, list[Array], tuple[float, ...]]] = []

    # --- memory ------------------------------------------------------------------------------------------------

    def adopt(self, value: Any) -> DeviceArray | None:
        """The array itself, or a view of it, where it is on a GPU; None for what is on the host."""
        return self._device.adopt(value)

    def from_host(self, array: Any) -> Array:
        """Bring a NumPy array to the device; what is there already stays."""
        return array if isinstance(array, DeviceArray) else self._device.upload(array)

    def base_from_host(self, array: Any) -> Array:
        """Bring the weight of a frozen base to the device: as bfloat16 with that precision."""
        if self.precision != "bf16-base" or array.dtype != np.float32:
            return self.from_host(array)
        return self._device.upload(np.asarray(array), bfloat16=True)

    def to_host(self, array: Array) -> np.ndarray:
        """Bring an array to NumPy."""
        return array.copy_to_host() if isinstance(array, DeviceArray) else array

    def release(self) -> None:
        """Free memory that nothing refers to any more."""
        self._device.settle()
        self._numbers = None
        self._device.release()

    def lending(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do: the device keeps a free list of its own."""
        return contextlib.nullcontext()

    def zeros_like(self, array: Array) -> Array:
        """A new array of zeros, same shape and dtype."""
        new = self._device.empty(array.shape, array.dtype)
        self._stride(elementwise(NAMES[new.dtype], self._threads(new)).fill, new, new.dtype.type(0), 1)
        return new

    def dropout_mask(self, rng: np.random.Generator, shape: tuple[int, ...], share: float, dtype: np.dtype) -> Array:
        """0 for the share that is dropped, 1 / (1 - share) for the rest: by Philox, with a key that `rng` draws."""
        mask, key = self._device.empty(shape, dtype), int(rng.integers(2**64, dtype=np.uint64))
        if mask.size:
            threads = self._threads(mask)
            self._device.launch(
                masks.dropout_mask(NAMES[mask.dtype], threads),
                self._blocks(mask.size // 4 + 1, threads),
                threads,
                np.int64(key % 2**32),
                np.int64(key // 2**32),
                np.int64(share * 2**32),
                dtype.type(1 / (1 - share)),
                int(_base_aligned(mask)),
                mask,
            )
        return mask

    def _threads(self, array: Array) -> int:
        return self._shapes[NAMES[array.dtype]].threads

    def _blocks(self, work: int, threads: int) -> int:
        """Blocks for a kernel whose grid strides over `work`."""
        return max(1, min(-(-work // threads), self._device.waves * self._device.multiprocessors))

    def _stride(self, kernel: Any, first: Array, *arguments: Any) -> None:
        """Launch an element-wise kernel over the vectors of `first`."""
        if first.size:
            threads = self._threads(first)
            self._device.launch(kernel, self._blocks(first.size // 4 + 1, threads), threads, first, *arguments)

    def _zero_bias(self, outputs: int, dtype: np.dtype) -> DeviceArray:
        key = outputs, dtype
        if key not in self._zero_biases:
            self._zero_biases[key] = self._device.upload(np.zeros(outputs, dtype))
        return self._zero_biases[key]

    # --- products ----------------------------------------------------------------------------------------------

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
        flags = _aligned(X, p, tile) | _aligned(WEIGHT, q, tile) | _aligned(OUT, sums, tile)
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
            kernel = elementwise(NAMES[x.dtype], threads).masked
            self._device.launch(kernel, self._blocks(out.size // 4 + 1, threads), threads, x, mask, out, 1)
        return out

    def _vector_sums(self, x: Array, matrix: Array, along: bool, delta: Any) -> Array:
        """Sums of the products of one vector and a matrix, (splits, columns), to be finished."""
        shapes, dtype = self._shapes[NAMES[x.dtype]], x.dtype
        changed, factor = (delta.delta, dtype.type(delta.scaling)) if delta else (matrix, dtype.type(0))
        lanes = shapes.wide.lanes
        vector = x.reshape(x.size)
        aligned = int(matrix.shape[1] % lanes == 0 and _base_aligned(matrix, x, changed))
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

    # --- the operations ----------------------------------------------------------------------------------------

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Saved | None]:
        """y = act(x (W + c D) + s (mask∘x) A B + b), and what backward needs where `keep`."""
        self._device.settle()
        base, low_rank, _, code, _ = operands
        N = x.shape[0]
        outputs = low_rank.B.shape[1] if low_rank else base.weight.shape[0 if base.transposed else 1]  # type: ignore[union-attr]  # one of the two is there
        low = self._device.empty((N, low_rank.A.shape[1]), x.dtype) if low_rank else None
        z = self._device.empty((N, outputs), x.dtype) if keep and code else None
        if N == 0:
            y = self._device.empty((0, outputs), x.dtype)
        else:
            if low_rank:
                low = self._project(x, low_rank.A, False, low_rank.scaling, mask)
            y = self._forward(x, operands, low, outputs, z)
        return y, Saved(x if keeps_input(operands) else None, low, z, mask) if keep else None

    def _forward(self, x: Array, operands: Operands, low: Array | None, outputs: int, z: Array | None) -> Array:
        base, low_rank, delta, code, _ = operands
        bias = base.bias if base else None
        B = low_rank.B if low_rank else None
        if x.shape[0] == 1 and base:
            sums = self._vector_sums(x, base.weight, base.transposed, delta)
            return self._finish(sums, 1, low=low, matrix=B, bias=bias, code=code, z=z)
        tile = self._tile(x.shape[0], x.dtype)
        weight = base.weight if base else x
        grid, chunk = self._splits(tile, x.shape[0], outputs, x.shape[1] if base else 0)
        y = self._device.empty((grid[2] * x.shape[0], outputs), x.dtype)
        flags = _aligned(X, x, tile) | _aligned(WEIGHT, weight, tile, delta.delta if delta else weight)
        flags |= _aligned(OUT, y, tile) | (HAS_BASE if base else 0) | (KEEP if z is not None else 0)
        if low is not None:
            flags |= HAS_LOW | _aligned(LOW, low, tile) | _aligned(FACTOR, B, tile)
        self._device.launch(
            forward_kernels.forward(tile, base.transposed if base else False, delta is not None),
            grid,
            tile.threads,
            x,
            weight,
            delta.delta if delta else weight,
            x.dtype.type(delta.scaling if delta else 0),
            x if low is None else low,
            x if B is None else B,
            self._zero_bias(outputs, x.dtype) if bias is None else bias,
            code,
            flags,
            chunk,
            y if z is None else z,
            y,
        )
        return y if grid[2] == 1 else self._finish(y, x.shape[0], bias=bias, code=code, z=z)

    def backward(self, grad_output: Array, saved: Saved, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient, from the values as they are; `delta` and `weight` stored."""
        gz, gradients_ = self._skinny(grad_output, saved, operands, input_gradient)
        base, _, delta, _, train = operands
        dD = dW = None
        if base and (delta or train):
            p, q = (gz, saved.x) if base.transposed else (saved.x, gz)
            tile = self._shapes[NAMES[gz.dtype]].wide
            dW = self._dense_gradient(tile, p, q, 1.0) if train else None
            dD = self._dense_gradient(tile, p, q, delta.scaling) if delta else None
        return gradients_._replace(delta=dD, weight=dW)

    def _dense_gradient(self, tile: Tile, p: Array, q: Array, factor: float) -> Array:
        if not p.shape[0]:
            return self.zeros_like(self._device.empty((p.shape[1], q.shape[1]), p.dtype))
        return self._product(tile, p, False, q, False, factor)

    def backward_update(
        self,
        grad_output: Array,
        saved: Saved,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward in one sweep that never holds dD or dW: V = m V + (1-m) dD, D -= delta_lr V, W -= lr dW."""
        gz, gradients_ = self._skinny(grad_output, saved, operands, input_gradient)
        base, _, delta, _, train = operands
        if base and (delta or train):
            x = cast(Array, saved.x)
            self._dense_update(*((gz, x) if base.transposed else (x, gz)), operands, lr, delta_lr)
        return gradients_

    def _dense_update(self, p: Array, q: Array, operands: Operands, lr: float, delta_lr: float) -> None:
        """G = Pᵀ Q; V = m V + (1-m) c G, D -= delta_lr V; W -= lr G: those that there are."""
        base, _, delta, _, train = operands
        weight, number = base.weight, p.dtype.type  # type: ignore[union-attr]  # only what has a base comes here
        D, V = (delta.delta, delta.velocity) if delta else (weight, weight)
        momentum, c = (delta.momentum, delta.scaling) if delta else (0.0, 0.0)
        scalars = number(momentum), number((1 - momentum) * c), number(delta_lr), number(lr)
        changed = weight if train else D
        shapes, (samples, rows), columns = self._shapes[NAMES[p.dtype]], p.shape, q.shape[1]
        tile = shapes.wide
        if -(-rows // tile.rows) * -(-columns // tile.columns) < self._filling(tile):
            tile = shapes.small
        grid, _ = self._splits(tile, rows, columns, samples)
        if grid[2] >= WORTH_SPLITTING:
            sums = self._sums(tile, p, False, q, False, 1.0)
            aligned = int(columns % tile.lanes == 0 and _base_aligned(D, V, weight))
            threads, parts = shapes.threads, DELTA * (delta is not None) | WEIGHT_ITSELF * bool(train)
            kernel = elementwise(NAMES[p.dtype], threads).descend_sums
            blocks = self._blocks(changed.size // 4 + 1, threads)
            self._device.launch(kernel, blocks, threads, sums, *scalars, parts, aligned, D, V, changed)
            return
        flags = _aligned(X, p, tile) | _aligned(WEIGHT, q, tile) | _aligned(OUT, D, tile, V, weight)
        kernel = gradients.dense_update(tile, delta is not None, bool(train))
        self._device.launch(kernel, (*grid[:2], 1), tile.threads, p, q, *scalars, flags, D, V, changed)

    def _skinny(
        self, grad_output: Array, saved: Saved, operands: Operands, input_gradient: bool
    ) -> tuple[Array, Gradients]:
        """gz, and every gradient but the dense ones: none of this changes a parameter."""
        base, low_rank, _, code, train = operands
        self._flush_updates()
        t: Array | None = None
        dA = dB = db = None
        if saved.z is None:
            gz = grad_output
        elif low_rank and self._fits_narrow(grad_output, low_rank):
            gz, t = self._through_and_down(grad_output, saved.z, code, low_rank)
        else:
            gz = self._through_activation(grad_output, saved.z, code)
        N, samples = gz.shape[0], saved.x
        if low_rank and N:
            if t is None:
                t = self._project(gz, low_rank.B, True, low_rank.scaling)
            dA = self._factor_gradient(cast(Array, samples), t, saved.mask)
            dB = self._factor_gradient(cast(Array, saved.low), gz)
        elif low_rank:
            dA, dB = self.zeros_like(low_rank.A), self.zeros_like(low_rank.B)
        if base and train and base.bias is not None:
            db = self._bias_gradient(gz) if N else self.zeros_like(base.bias)
        gx = self._input_gradient(gz, t, operands, saved) if input_gradient else None
        return gz, Gradients(gx, dA, dB, None, None, db)

    def _through_activation(self, grad_output: Array, z: Array, code: int) -> Array:
        gz = self._device.empty(z.shape, z.dtype)
        if gz.size:
            threads = self._threads(z)
            kernel = elementwise(NAMES[z.dtype], threads).activation_gradient
            self._device.launch(kernel, self._blocks(z.size, threads), threads, grad_output, z, code, gz)
        return gz

    def _fits_narrow(self, grad_output: Array, low_rank: LowRank) -> bool:
        narrow = self._shapes[NAMES[grad_output.dtype]].narrow
        return grad_output.shape[0] > 1 and low_rank.B.shape[0] <= narrow.columns

    def _through_and_down(self, gy: Array, z: Array, code: int, low_rank: LowRank) -> tuple[Array, Array]:
        """gz = gy ∘ act'(z) and t = s gz Bᵀ in one pass over gy."""
        tile = self._shapes[NAMES[gy.dtype]].narrow
        N, B = gy.shape[0], low_rank.B
        grid, chunk = self._splits(tile, N, B.shape[0], gy.shape[1])
        gz = self._device.empty(gy.shape, gy.dtype)
        sums = self._device.empty((grid[2] * N, B.shape[0]), gy.dtype)
        flags = _aligned(X, gy, tile, z, gz) | _aligned(WEIGHT, B, tile) | _aligned(OUT, sums, tile)
        factor = gy.dtype.type(low_rank.scaling)
        kernel = gradients.product_through(tile)
        self._device.launch(kernel, grid, tile.threads, gy, z, gz, code, B, factor, flags, chunk, sums)
        return gz, sums if grid[2] == 1 else self._finish(sums, N)

    def _bias_gradient(self, gz: Array) -> Array:
        aligned = int(gz.shape[1] % self._shapes[NAMES[gz.dtype]].wide.lanes == 0 and _base_aligned(gz))
        sums = self._column_sums(gz.reshape(gz.size), gz, gz, gz.dtype.type(0), aligned, False, True)
        return self._finish(sums, 1).reshape(gz.shape[1])

    def _input_gradient(self, gz: Array, t: Array | None, operands: Operands, saved: Saved) -> Array:
        base, low_rank, delta, _, _ = operands
        A = low_rank.A if low_rank else None
        N = gz.shape[0]
        inputs = base.weight.shape[0 if not base.transposed else 1] if base else A.shape[0]  # type: ignore[union-attr]  # one of the two is there
        if not N:
            return self._device.empty((0, inputs), gz.dtype)
        mask = saved.mask if low_rank else None
        if N == 1 and base:
            sums = self._vector_sums(gz, base.weight, not base.transposed, delta)
            return self._finish(sums, 1, low=t, matrix=A, strided=True, mask=mask)
        tile = self._tile(N, gz.dtype)
        weight = base.weight if base else gz
        grid, chunk = self._splits(tile, N, inputs, gz.shape[1] if base else 0)
        gx = self._device.empty((grid[2] * N, inputs), gz.dtype)
        flags = _aligned(X, gz, tile) | _aligned(WEIGHT, weight, tile, delta.delta if delta else weight)
        flags |= _aligned(OUT, gx, tile, gx if mask is None else mask) | (HAS_BASE if base else 0)
        if t is not None:
            flags |= HAS_LOW | _aligned(LOW, t, tile) | _aligned(FACTOR, A, tile)
        self._device.launch(
            gradients.input_gradient(tile, base.transposed if base else False, delta is not None, mask is not None),
            grid,
            tile.threads,
            gz,
            weight,
            delta.delta if delta else weight,
            gz.dtype.type(delta.scaling if delta else 0),
            gz if t is None else t,
            gz if A is None else A,
            gz if mask is None else mask,
            flags,
            chunk,
            gx,
        )
        return gx if grid[2] == 1 else self._finish(gx, N)

    def merge(self, operands: Operands) -> Array:
        """W + s A B + c D as a new stored array."""
        self._device.settle()
        base, low_rank, delta, _, _ = operands
        weight, dtype = base.weight, base.weight.dtype  # type: ignore[union-attr]  # only what has a base is merged
        transposed = base.transposed  # type: ignore[union-attr]  # as above
        p, q = (low_rank.A, low_rank.B) if low_rank else (weight, weight)
        if transposed:
            p, q = q, p
        out = self._device.empty(weight.shape, dtype)
        # Plain arithmetic whatever the precision: a merged weight is kept.
        tile = self._plain[NAMES[dtype]].wide
        flags = _aligned(WEIGHT, out, tile, weight, delta.delta if delta else out)
        if low_rank:
            flags |= HAS_LOW | _aligned(LOW, p, tile) | _aligned(FACTOR, q, tile)
        rows, columns = weight.shape
        self._device.launch(
            gradients.merge(tile, transposed, delta is not None),
            (-(-rows // tile.rows), -(-columns // tile.columns), 1),
            tile.threads,
            p,
            q,
            dtype.type(low_rank.scaling if low_rank else 0),
            weight,
            delta.delta if delta else weight,
            dtype.type(delta.scaling if delta else 0),
            flags,
            out,
        )
        return out

    def sgd_update(self, parameter: Array, gradient: Array, lr: float) -> None:
        """parameter -= lr gradient, in place."""
        self._put_off("sgd", [parameter, gradient], (lr,))

    def momentum_update(self, delta: Array, velocity: Array, gradient: Array, momentum: float, lr: float) -> None:
        """V = m V + (1-m) gradient; D -= lr V, in place."""
        self._device.settle()
        number = delta.dtype.type
        aligned = int(_base_aligned(delta, velocity, gradient))
        kernel = elementwise(NAMES[delta.dtype], self._threads(delta)).momentum
        scalars = number(momentum), number(1 - momentum), number(lr)
        self._stride(kernel, delta, velocity, gradient, *scalars, aligned)

    def adamw_update(
        self,
        parameter: Array,
        gradient: Array,
        first: Array,
        second: Array,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """AdamW with decoupled decay, `step` counted from 1, in place."""
        b1, b2 = betas
        scalars = (1 - lr * weight_decay, lr / (1 - b1**step), b1, 1 - b1, b2, 1 - b2, 1 - b2**step, eps)
        self._put_off("adamw", [parameter, gradient, first, second], scalars)

    def add(self, target: Array, source: Array) -> None:
        """target += source, in place."""
        self._device.settle()
        kernel = elementwise(NAMES[target.dtype], self._threads(target)).add
        self._stride(kernel, target, source, int(_base_aligned(target, source)))

    def scale(self, target: Array, factor: float) -> None:
        """target *= factor, in place."""
        self._device.settle()
        kernel = elementwise(NAMES[target.dtype], self._threads(target)).times
        self._stride(kernel, target, target.dtype.type(factor), int(_base_aligned(target)))

    def sum_of_squares(self, array: Array) -> float:
        """Σ a², accumulated in float64."""
        return float(self.sums_of_squares([array])[0])

    def sums_of_squares(self, arrays: Sequence[Array]) -> list[Number]:
        """Σ a² of each, in one launch."""
        self._device.settle()
        filled = [array for array in arrays if array.size]
        if not filled:
            return [0.0] * len(arrays)
        if any(array.bfloat16 for array in filled) or len({array.dtype for array in filled}) > 1:
            return [self._square_by_itself(array) for array in arrays]
        threads = self._threads(filled[0])
        # A few blocks an array: of many small ones each has enough to do.
        blocks = self._blocks(max(array.size for array in filled), threads)
        blocks = max(1, min(blocks, self._device.waves * self._device.multiprocessors // len(filled)))
        table = self._upload([[array.size, array.address] for array in filled], np.int64)
        buffer, begin, partial = self._reserve(blocks * len(filled))
        kernel = grouped(NAMES[filled[0].dtype], threads).sums_of_squares
        self._device.launch(kernel, (blocks, len(filled), 1), threads, table, partial)
        found = iter([Pending(buffer, begin + i * blocks, begin + (i + 1) * blocks) for i in range(len(filled))])
        return [next(found) if array.size else 0.0 for array in arrays]

    def _square_by_itself(self, array: Array) -> Number:
        if array.bfloat16:  # of a frozen base, looked at only to find a fault
            return float(np.square(array.copy_to_host(), dtype=np.float64).sum())
        return self.sums_of_squares([array])[0]

    def read(self, numbers: Sequence[Number]) -> list[float]:
        """The numbers as floats: one copy to the host."""
        ends: dict[DeviceArray, int] = {}
        for number in numbers:
            if isinstance(number, Pending):
                ends[number.buffer] = max(ends.get(number.buffer, 0), number.end)
        hosts = {buffer: buffer.part(0, end).copy_to_host() for buffer, end in ends.items()}
        self._numbers = None
        return [float(n.sum_of(hosts[n.buffer]) if isinstance(n, Pending) else n) for n in numbers]

    def _reserve(self, count: int) -> tuple[DeviceArray, int, DeviceArray]:
        """Room for `count` float64 beside those of other numbers that are read together: buffer, place, view."""
        buffer, begin = self._numbers or (self._device.empty((max(4096, count),), np.float64), 0)
        if begin + count > buffer.size:
            buffer, begin = self._device.empty((max(4096, count),), np.float64), 0
        self._numbers = buffer, begin + count
        return buffer, begin, buffer.part(begin, begin + count)

    def _upload(self, rows: Any, dtype: Any) -> DeviceArray:
        """A small table for a kernel. It goes round in one piece of memory: who writes there again comes later."""
        values = np.array(rows, dtype)
        ring, place = self._rings[np.dtype(dtype)]
        if values.size > ring.size:
            return self._device.upload(values)
        if place + values.size > ring.size:
            place = 0
        self._rings[values.dtype] = ring, place + values.size
        table = ring.part(place, place + values.size).reshape(values.shape)
        self._device.write(table, values)
        return table

    # --- what is put off, to be launched together ------------------------------------------------------------------

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
                flags = _aligned(X, p, tile, other) | _aligned(WEIGHT, q, tile) | _aligned(OUT, out, tile)
                down, across = -(-p.shape[1] // tile.rows), -(-q.shape[1] // tile.columns)
                addresses = p.address, other.address, q.address, out.address
                rows.append((blocks, *addresses, p.shape[1], q.shape[1], p.shape[0], flags, down))
                blocks += down * across
            kernel = gradients.grouped_products(tile, masked)
            self._device.launch(kernel, (blocks, 1, 1), tile.threads, self._upload(rows, np.int64))

    def mean_squared_error(self, output: Array, target: Array) -> tuple[Number, Array]:
        """Mean squared error and its gradient."""
        return self._loss("mean_squared_error", output, target, output.size)

    def binary_cross_entropy(self, logits: Array, target: Array) -> tuple[Number, Array]:
        """Binary cross-entropy with logits and its gradient."""
        return self._loss("binary_cross_entropy", logits, target, logits.size)

    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[Number, Array]:
        """Softmax cross-entropy with integer labels and its gradient."""
        return self._loss("softmax_cross_entropy", logits, labels, int(np.count_nonzero(self.to_host(labels) >= 0)))

    def _loss(self, name: str, output: Array, target: Array, count: int) -> tuple[Number, Array]:
        """The loss, and its gradient, where `output` is: on the device, or on the host."""
        on_device = self.adopt(output)
        values = self.from_host(output) if on_device is None else on_device
        given = self.adopt(target)
        targets = self.from_host(target) if given is None else given
        threads = self._threads(values)
        blocks = self._blocks(values.size, threads)
        if name == "softmax_cross_entropy":  # a block a row, of no more warps than the row has work for
            threads, blocks = min(threads, max(32, 1 << (values.shape[1] // 4).bit_length())), len(values)
        gradient = self._device.empty(values.shape, values.dtype)
        buffer, begin, partial = self._reserve(blocks)
        kernel = getattr(losses(NAMES[values.dtype], threads), name)
        self._device.launch(kernel, blocks, threads, values, targets, np.float64(1 / max(1, count)), gradient, partial)
        value = Pending(buffer, begin, begin + blocks)
        return (float(value), self.to_host(gradient)) if on_device is None else (value, gradient)


def _base_aligned(*arrays: Array) -> bool:
    """Whether every array begins at a multiple of 16 bytes."""
    return all(array.address % 16 == 0 for array in arrays)


def _aligned(flag: int, array: Array, tile: Tile, *others: Array) -> int:
    """`flag` where rows of the arrays, which have one width, begin at multiples of a vector."""
    return flag if array.shape[-1] % tile.lanes == 0 and _base_aligned(array, *others) else 0


def open_backend(index: int, precision: str) -> CUDABackend:
    """The backend of one GPU and precision; DeviceUnavailableError that says what is missing."""
    device = open_device(index)
    if precision == "tf32" and device.compute_capability < (8, 0):
        what = "Numba's simulator has none" if device.simulated else "this GPU is older"
        raise DeviceUnavailableError(
            f"precision 'tf32' needs tensor cores of compute capability 8.0 or newer, and {what}; use 'float32'"
        )
    return CUDABackend(device, precision)
