"""Operations on rows on a GPU: tables, norms, gates, and which rows are read."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from nblora.kernels.embedding import cuda as tables_kernels
from nblora.kernels.embedding.cuda import ADD, DESCEND, FOLLOW, MEAN, SECOND, SUM
from nblora.kernels.norm import cuda as norms
from nblora.kernels.pointwise.cuda import pointwise as pointwise_kernels
from nblora.kernels.rows import cuda as kernels

from ..embedding import Embedding
from ..protocol import Array, Backend, Delta, Number, Product, Rows
from .deferred import Deferred
from .shapes import NAMES, base_aligned

VECTORS = 4
"""Vectors that each thread of a group takes of a row, until the group is the whole block."""
WORTH_SHARING = 8
"""Samples of a row that one thread adds up one after the other, before several share them."""


class RowOperations(Deferred):
    """The operations of `protocol.Backend` and `ReferenceBlocks` whose arrays are rows.

    What copies rows or multiplies them is asked for on the way back too, and lets gradients wait that are put off, but
    for those that it reads.
    """

    _norm_shares = 128
    """Parts at most in which gradients of a norm's weight and bias are summed up, on a GPU of any size."""

    # --- how rows lie on threads -------------------------------------------------------------------------------

    def _lie(self, rows: int, *arrays: Array) -> tuple[tuple[int, int], int, int, int]:
        """Grid, threads, bits of a block's columns of vectors, and whether rows are aligned, for arrays of one width,
        a thread a vector."""
        threads = self._threads(arrays[0])
        vectors = self._vectors(arrays[0])
        bits = min(threads.bit_length() - 1, 5, max(0, vectors - 1).bit_length())  # at most a warp's
        return (-(-rows // (threads >> bits)), -(-vectors // (1 << bits))), threads, bits, self._vector_rows(*arrays)

    def _group(self, array: Array) -> tuple[int, int, int]:
        """Blocks, threads and bits of a group where a group of threads has a row."""
        threads = self._threads(array)
        bits = min(threads.bit_length() - 1, max(0, -(-self._vectors(array) // VECTORS) - 1).bit_length())
        return -(-array.shape[0] // (threads >> bits)), threads, bits

    def _vectors(self, array: Array) -> int:
        """Vectors of a row."""
        return -(-array.shape[1] // (16 // array.dtype.itemsize))

    def _vector_rows(self, *arrays: Array) -> int:
        """Whether every row of arrays of one width and dtype begins at a multiple of 16 bytes."""
        return int(arrays[0].shape[-1] * arrays[0].dtype.itemsize % 16 == 0 and base_aligned(*arrays))

    # --- tables ------------------------------------------------------------------------------------------------

    def embedding(self) -> Product:
        """The product of rows that integers name."""
        return Embedding(cast(Backend, self))

    def take_rows(
        self, tables: Sequence[Array], factors: Sequence[float], indices: Array, target: Array, add: bool
    ) -> None:
        """target[n] (+)= Σ factor·table[indices[n]] over one or two tables, in place; indices (N,) int64."""
        self._device.settle()
        self._take(tables, factors, indices, target, add)

    def _take(
        self, tables: Sequence[Array], factors: Sequence[float], indices: Array, target: Array, add: bool
    ) -> None:
        if not target.size:
            return
        number = target.dtype.type
        grid, threads, bits, aligned = self._lie(len(target), target, *tables)
        self._device.launch(
            tables_kernels.take(NAMES[target.dtype], threads),
            grid,
            threads,
            tables[0],
            tables[-1],
            number(factors[0]),
            number(factors[-1]),
            self._remembered(indices),
            SECOND * (len(tables) > 1) | ADD * add,
            bits,
            aligned,
            target,
        )

    def sum_rows(self, gradient: Array, rows: Rows, factor: float, target: Array) -> None:
        """target[i] = factor·Σ gradient[n] over the samples of row i, in place; zero for a row without."""
        self._before_writing(target)
        self._add_up(SUM, gradient, rows.order, rows.starts, target, factor=factor)

    def descend_rows(self, gradient: Array, rows: Rows, lr: float, target: Array) -> None:
        """target[i] -= lr·Σ gradient[n] over the samples of row i, in place."""
        self._before_writing(target)
        self._add_up(DESCEND, gradient, rows.order, rows.starts, target, lr=lr)

    def follow_rows(self, gradient: Array, rows: Rows, delta: Delta, lr: float) -> None:
        """V = m V + (1 - m) dD, D -= lr V, in place, for all rows; dD[i] = c·Σ gradient[n] over row i's samples."""
        self._before_writing(delta.delta, delta.velocity)
        self._add_up(FOLLOW, gradient, rows.order, rows.starts, delta.delta, delta.scaling, lr, delta)

    def row_means(self, x: Array, begins: np.ndarray) -> Array:
        """The mean of rows begins[s] to begins[s + 1] of (N, F) for each s, (S, F); no range is empty."""
        self._device.settle()
        means = self._device.empty((len(begins) - 1, x.shape[1]), x.dtype)
        self._add_up(MEAN, x, begins, begins, means)
        return means

    def _add_up(
        self,
        what: int,
        gradient: Array,
        order: np.ndarray,
        starts: np.ndarray,
        target: Array,
        factor: float = 1.0,
        lr: float = 0.0,
        delta: Delta | None = None,
    ) -> None:
        """Add rows up by `what` of the kernel; where each has many samples, several threads share them."""
        if not target.size:
            return
        velocity, momentum = (delta.velocity, delta.momentum) if delta else (target, 0.0)
        (_, across), threads, bits, aligned = self._lie(0, gradient, target, velocity)
        each = len(gradient) // len(target) // WORTH_SHARING
        share_bits = min(each.bit_length(), threads.bit_length() - 1 - bits)
        number = target.dtype.type
        self._device.launch(
            tables_kernels.add_up(NAMES[target.dtype], threads, what),
            (-(-len(target) // (threads >> bits + share_bits)), across),
            threads,
            gradient,
            self._remembered(order),
            self._remembered(starts),
            number(factor),
            number(momentum),
            number((1 - momentum) * factor),
            number(lr),
            bits,
            share_bits,
            aligned,
            velocity,
            target,
        )

    def row_means_gradient(self, grad: Array, begins: np.ndarray) -> Array:
        """The gradient of the rows."""
        rows = self._device.empty((int(begins[-1]), grad.shape[1]), grad.dtype)
        if rows.size:
            (_, across), threads, bits, aligned = self._lie(0, grad, rows)
            most = -(-len(rows) // (len(grad) * (threads >> bits)))  # blocks that have rows of an average range
            wanted = -(-self._device.waves * self._device.multiprocessors // (len(grad) * across))
            self._device.launch(
                kernels.spread(NAMES[grad.dtype], threads),
                (len(grad), across, max(1, min(most, wanted))),
                threads,
                grad,
                self._remembered(begins),
                bits,
                aligned,
                rows,
            )
        return rows

    # --- which rows, which columns -----------------------------------------------------------------------------

    def gather(self, x: Array, rows: np.ndarray) -> Array:
        """x[rows]: rows of (N, F), of int64."""
        self._before_reading(x)
        found = self._device.empty((len(rows), x.shape[1]), x.dtype)
        self._take([x], [1.0], rows, found, False)
        return found

    def scatter(self, target: Array, rows: np.ndarray, source: Array, add: bool = False) -> None:
        """target[rows[n]] (+)= source[n], in place; no row twice."""
        self._before_reading(source)
        self._before_writing(target)
        if source.size:
            grid, threads, bits, aligned = self._lie(len(source), source, target)
            kernel = kernels.scatter(NAMES[source.dtype], threads)
            self._device.launch(kernel, grid, threads, source, self._remembered(rows), int(add), bits, aligned, target)

    def split_columns(self, x: Array, parts: int) -> list[Array]:
        """Parts of equal width of each row of (N, F)."""
        found = [self._device.empty((x.shape[0], x.shape[1] // parts), x.dtype) for _ in range(parts)]
        self._columns(found, x, False)
        return found

    def join_columns(self, parts: Sequence[Array]) -> Array:
        """The inverse of `split_columns`."""
        rows, width = parts[0].shape
        whole = self._device.empty((rows, width * len(parts)), parts[0].dtype)
        self._columns(parts, whole, True)
        return whole

    def _columns(self, parts: Sequence[Array], whole: Array, join: bool) -> None:
        self._before_reading(*(parts if join else (whole,)))
        if whole.size:
            grid, threads, bits, aligned = self._lie(len(whole), *parts)
            self._device.launch(
                kernels.columns(NAMES[whole.dtype], threads, join),
                (*grid, len(parts)),
                threads,
                self._upload([[part.address] for part in parts], np.int64),
                parts[0].shape[1],
                bits,
                int(aligned and base_aligned(whole)),
                whole,
            )

    # --- norms -------------------------------------------------------------------------------------------------

    def norm(self, x: Array, weight: Array, bias: Array | None, eps: float, centred: bool) -> tuple[Array, Array]:
        """y = (x - m) r w + b of rows (N, F), and (m, r) of each, (N, 2)."""
        self._device.settle()
        y, stats = self._device.empty(x.shape, x.dtype), self._device.empty((len(x), 2), x.dtype)
        if x.size:
            blocks, threads, bits = self._group(x)
            shift = weight if bias is None else bias
            self._device.launch(
                norms.norm(NAMES[x.dtype], threads, bits, centred),
                blocks,
                threads,
                x,
                weight,
                shift,
                x.dtype.type(eps),
                int(bias is not None),
                self._vector_rows(x, y, weight, shift),
                y,
                stats,
            )
        return y, stats

    def norm_gradient(
        self, grad: Array, x: Array, stats: Array, weight: Array, centred: bool, wanted: tuple[bool, bool]
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Gradients of x, of weight and of bias: the first where wanted[0], the others where wanted[1]."""
        width, kind, number = x.shape[1], x.dtype, NAMES[x.dtype]
        gx = self._device.empty(x.shape, kind) if wanted[0] else None
        own = (self._device.empty((width,), kind), self._device.empty((width,), kind)) if wanted[1] else (None, None)
        blocks, threads, bits = self._group(x)
        chunk = threads >> bits
        if wanted[1]:
            chunk *= -(-blocks // self._norm_shares)
            blocks = -(-len(x) // max(1, chunk))
        parts = self._device.empty((2 * blocks, width), kind) if wanted[1] else x
        if x.size and any(wanted):
            out = x if gx is None else gx
            kernel = norms.norm_gradient(number, threads, bits, centred, *wanted)
            aligned = self._vector_rows(grad, x, weight, out, parts)
            self._device.launch(kernel, blocks, threads, grad, x, stats, weight, chunk, aligned, out, parts)
        if wanted[1]:
            grid = -(-width // 32), 2
            self._device.launch(norms.add_parts(number, threads), grid, threads, parts, *own)
        return gx, *own

    # --- activations, gates ------------------------------------------------------------------------------------

    def pointwise(self, x: Array, code: int) -> Array:
        """act(x)."""
        self._device.settle()
        return self._each("activated", (x,), code)[0]

    def pointwise_gradient(self, grad: Array, x: Array, code: int) -> Array:
        """grad∘act'(x)."""
        return self._each("activation_gradients", (grad, x), code)[0]

    def gated(self, x: Array, u: Array, code: int) -> Array:
        """act(x)∘u."""
        self._device.settle()
        return self._each("gated", (x, u), code)[0]

    def gated_gradient(self, grad: Array, x: Array, u: Array, code: int) -> tuple[Array, Array]:
        """Gradients of x and of u."""
        gx, gu = self._each("gated_gradients", (grad, x, u), code, 2)
        return gx, gu

    def multiplied(self, x: Array, y: Array) -> Array:
        """x∘y, of one shape."""
        self._before_reading(x, y)
        return self._masked(x, y)

    def dropout(self, x: Array, share: float, rng: np.random.Generator) -> tuple[Array, int]:
        """x / (1 - share) where it is kept and 0 where it is dropped, by the numbers of `dropout_mask`; and the key
        that draws them again."""
        self._device.settle()
        key = int(rng.integers(2**64, dtype=np.uint64))
        return self.dropout_gradient(x, share, key), key

    def dropout_gradient(self, grad: Array, share: float, kept: int) -> Array:
        """The gradient of x."""
        gx = self._device.empty(grad.shape, grad.dtype)
        kernel = pointwise_kernels(NAMES[grad.dtype], self._threads(grad)).dropped
        key, least = (np.int64(kept % 2**32), np.int64(kept // 2**32)), np.int64(share * 2**32)
        self._stride(kernel, grad, *key, least, grad.dtype.type(1 / (1 - share)), int(base_aligned(grad, gx)), gx)
        return gx

    def _each(self, name: str, given: Sequence[Array], code: int, results: int = 1) -> list[Array]:
        """New arrays by an element-wise kernel."""
        first = given[0]
        new = [self._device.empty(first.shape, first.dtype) for _ in range(results)]
        kernel = getattr(pointwise_kernels(NAMES[first.dtype], self._threads(first)), name)
        self._stride(kernel, first, *given[1:], code, int(base_aligned(*given, *new)), *new)
        return new

    # --- what a model answers ----------------------------------------------------------------------------------

    def largest(self, x: Array) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of (N, F) the place of its largest number, the first of NaN where there is any, and that number;
        one copy to the host."""
        self._device.settle()
        found = self._device.empty((len(x), 2), np.float64)
        self._find_largest(x, None, found)
        places, numbers = found.copy_to_host().T
        return places.astype(np.int64), numbers.astype(x.dtype)

    def right_answers(self, logits: Array, labels: Array) -> Number:
        """How many rows of logits (N, out) have the largest number where labels (N,) int64 say, negative ones never."""
        self._device.settle()
        if not logits.size:
            return 0.0
        given = self.adopt(labels)
        known = self.from_host(np.asarray(labels, np.int64)) if given is None else given
        buffer, begin, found = self._reserve(len(logits))
        self._find_largest(logits, known, found)
        return self._number(buffer, begin, begin + len(logits))

    def _find_largest(self, x: Array, labels: Array | None, found: Array) -> None:
        if x.size:
            blocks, threads, bits = self._group(x)
            kernel = kernels.largest(NAMES[x.dtype], threads, labels is not None)
            given = found if labels is None else labels
            self._device.launch(kernel, blocks, threads, x, given, bits, int(base_aligned(x)), found)
