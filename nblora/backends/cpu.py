"""The CPU backend: lays tasks out for the kernels and runs them on Numba's threads.

Every array is C-contiguous, aligned and of one dtype. What a task lacks is filled by a stand-in of the same type, so
that each kernel has one specialisation a dtype. Scratch is kept between calls, one set for each caller at a time.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from nblora.kernels.common.microkernel import tile_functions
from nblora.kernels.embedding import cpu as row_kernel
from nblora.kernels.linear.cpu import forward as forward_kernel
from nblora.kernels.linear.cpu import sweep as sweep_kernel
from nblora.kernels.linear.cpu.few import FEW, FEW_SMALL, SMALL
from nblora.kernels.linear.cpu.few_forward import few_forward, packed_few_forward
from nblora.kernels.linear.cpu.few_sweep import few_sweep, packed_few_sweep
from nblora.kernels.linear.cpu.rowtiles import row_tiles
from nblora.kernels.linear.cpu.work import PART, PARTS
from nblora.kernels.losses import cpu as loss_kernel
from nblora.kernels.patches.window import Slide
from nblora.kernels.update import cpu as update_kernel

from .arena import Arena
from .blocks_cpu import CPUBlocks
from .convolution_cpu import CPUConvolution
from .crew import Crew
from .host import plain as _plain
from .host import workers_for as _workers
from .protocol import Array, Base, Delta, Gradients, Operands, Product, Rows, Saved, keeps_input
from .reference import ReferenceBackend

_NO_SCALARS = (0.0,) * 6


KEPT = 1 << 26
"""Bytes of packed activations that are kept for the next call; what more samples need is freed after the call."""


class _Scratch:
    """Sets of scratch memory, lent to one call at a time and kept for the next."""

    def __init__(self) -> None:
        self._free: dict[tuple[np.dtype, int], list[np.ndarray]] = {}
        self._packed: dict[np.dtype, list[np.ndarray]] = {}

    def take(self, dtype: np.dtype, workers: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scratch of (workers, PARTS·PART) elements, and of at least (size,) for packed activations; both aligned."""
        try:
            scratch = self._free[dtype, workers].pop()
        except (KeyError, IndexError):
            scratch = _aligned(workers * PARTS * PART, dtype).reshape(workers, -1)
        try:
            packed = self._packed[dtype].pop()
        except (KeyError, IndexError):
            packed = _aligned(size, dtype)
        return scratch, packed if packed.size >= size else _aligned(size, dtype)

    def give(self, scratch: np.ndarray, packed: np.ndarray) -> None:
        """Hand both back; sets of a number of workers that is no longer used are dropped."""
        dtype, workers = key = scratch.dtype, len(scratch)
        if key not in self._free:
            for other in [k for k in self._free if k[0] == dtype and 1 != k[1] != workers != 1]:
                self._free.pop(other, None)
        self._free.setdefault(key, []).append(scratch)
        if packed.nbytes <= KEPT:
            self._packed.setdefault(dtype, []).append(packed)


@functools.lru_cache
def _packed_size(function: Any, dtype: np.dtype, *arguments: int) -> int:
    """Elements that packing takes, by the kernel's own rule."""
    return int(function(*arguments, np.empty(0, dtype)))


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that begin at a cache line."""
    memory = np.zeros(size + 64 // dtype.itemsize, dtype)
    start = -memory.ctypes.data % 64 // dtype.itemsize
    return memory[start : start + size]


class CPUBackend(CPUBlocks, ReferenceBackend):
    """The operations of `protocol.Backend` on NumPy arrays, by kernels where there are."""

    def __init__(self) -> None:
        self._crew, self.arena = Crew(), Arena()
        self._scratch = _Scratch()
        self._tile_functions: dict[np.dtype, tuple[int, int]] = {}
        self._shifted_tiles: dict[np.dtype, int] = {}
        self._row_tile_addresses: dict[np.dtype, tuple[int, int, int]] = {}
        self._stand_ins = {np.dtype(t): (np.zeros((1, 1), t), np.zeros(1, t)) for t in ("float32", "float64")}

    def lending(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, arrays take the memory of others that are gone."""
        return self.arena.open()

    def _tiles(self, dtype: np.dtype) -> tuple[int, int]:
        """Addresses of the register tiles of a dtype."""
        found = self._tile_functions.get(dtype)
        if found is None:
            found = self._tile_functions[dtype] = tile_functions(self._stand_ins[dtype][1])
        return found

    def _row_tiles(self, dtype: np.dtype) -> tuple[int, int, int]:
        """Addresses of the tiles of few samples of a dtype."""
        found = self._row_tile_addresses.get(dtype)
        if found is None:
            found = self._row_tile_addresses[dtype] = row_tiles(self._stand_ins[dtype][1])
        return found

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Saved | None]:
        """y = act(x (W + c D) + s (mask∘x) A B + b), and what backward needs where `keep`."""
        base, low_rank, delta, activation, _ = operands
        dtype = x.dtype
        none, none_1d = self._stand_ins[dtype]
        weight = _plain(base.weight) if base is not None else none
        transposed = base is not None and base.transposed
        bias = base.bias if base is not None else None
        if low_rank is not None:
            A, B, s = _plain(low_rank.A), _plain(low_rank.B), low_rank.scaling
            outputs, rank = B.shape[1], A.shape[1]
        else:
            A, B, s, rank = none, none, 0.0, 0
            outputs = weight.shape[0] if transposed else weight.shape[1]
        samples, inputs = x.shape
        x_low = x if mask is None or low_rank is None else self._masked(x, mask)
        empty = self.arena.empty
        y = empty((samples, outputs), dtype)
        z = empty((samples, outputs), dtype) if keep and activation else y
        u = empty((samples, rank), dtype)
        if samples:
            inner = (inputs if base is not None else 0) + rank
            workers = _workers(samples * outputs * inner)
            few = base is not None and samples <= (FEW if weight.size > SMALL else FEW_SMALL)
            size = _packed_size(packed_few_forward, dtype, samples, inputs, outputs, rank, workers) if few else 0
            scratch, packed = self._scratch.take(dtype, workers, size)
            task = forward_kernel.ForwardTask(
                _plain(x),
                _plain(x_low),
                weight,
                _plain(delta.delta) if delta is not None else weight,
                A,
                B,
                _plain(bias) if bias is not None else none_1d,
                u,
                z,
                y,
                scratch,
                packed,
                *self._tiles(dtype),
                self._row_tiles(dtype),
                np.zeros(3 + 4 * workers, np.int64),
                float(s),
                float(delta.scaling) if delta is not None else 0.0,
                activation,
                transposed,
                base is not None,
                delta is not None,
                low_rank is not None,
                bias is not None,
                x_low is not x,
            )
            self._crew.run(few_forward if few else forward_kernel.forward, task, workers)
            self._scratch.give(scratch, packed)
        if not keep:
            return y, None
        kept = x if keeps_input(operands) else None
        return y, Saved(kept, u if low_rank is not None else None, z if activation else None, mask)

    def backward(self, grad_output: Array, saved: Saved, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient, from the values as they are; `delta` and `weight` stored."""
        return self._sweep(grad_output, saved, operands, None, input_gradient)

    def backward_update(
        self,
        grad_output: Array,
        saved: Saved,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward and the update of velocity, delta and a trained weight in one sweep, in place."""
        return self._sweep(grad_output, saved, operands, (lr, delta_lr), input_gradient)

    def _sweep(
        self,
        grad_output: Array,
        saved: Saved,
        operands: Operands,
        rates: tuple[float, float] | None,
        input_gradient: bool,
    ) -> Gradients:
        """Backward; with `rates`, lr and delta_lr, also the update."""
        if not (input_gradient or keeps_input(operands)):
            return Gradients(None, None, None, None, None, None)
        update, (lr, delta_lr) = rates is not None, rates or (0.0, 0.0)
        base, low_rank, delta, activation, train = operands
        x, u, z, mask = saved
        dtype = grad_output.dtype
        none, none_1d = self._stand_ins[dtype]
        weight = none
        if base is not None:
            weight = base.weight if train and update else _plain(base.weight)
        has_bias = base is not None and base.bias is not None
        transposed = base is not None and base.transposed
        samples, outputs = grad_output.shape
        inputs = x.shape[1] if x is not None else weight.shape[1 if transposed else 0]
        empty = self.arena.empty
        gx = empty((samples, inputs), dtype) if input_gradient else None
        x = cast(np.ndarray, gx if x is None else x)  # where no x was kept none is read
        dA = dB = db = dD = dW = None
        A = B = none
        masked = False
        x_low, rank = x, 0
        if low_rank is not None:
            A, B = _plain(low_rank.A), _plain(low_rank.B)
            rank = A.shape[1]
            dA, dB = np.empty(A.shape, dtype), np.empty(B.shape, dtype)
            masked = mask is not None
            if masked:
                x_low = self._masked(x, mask)
        t = empty((samples, rank), dtype)
        if train and has_bias:
            db = np.empty(outputs, dtype)
        if not update:
            dD = empty(weight.shape, dtype) if delta is not None else None
            dW = empty(weight.shape, dtype) if train else None
        gy = _plain(grad_output)
        work = samples * outputs * ((inputs if base is not None else 0) + rank) + (weight.size if delta else 0)
        workers = _workers(work)
        few = base is not None and 0 < samples <= (FEW if weight.size > SMALL else FEW_SMALL)
        if few:
            size = _packed_size(packed_few_sweep, dtype, samples, inputs, outputs, rank, workers)
        else:
            size = _packed_size(sweep_kernel.packed_sweep, dtype, samples, outputs, transposed)
        scratch, packed = self._scratch.take(dtype, workers, size)
        task = sweep_kernel.SweepTask(
            gy,
            _plain(z) if z is not None else gy,
            _plain(x),
            _plain(x_low),
            _plain(u) if u is not None else none,
            weight,
            delta.delta if delta is not None else weight,
            delta.velocity if delta is not None else none,
            A,
            B,
            empty((samples, outputs), dtype) if activation else gy,
            t,
            none if gx is None else gx,
            none if dA is None else dA,
            none if dB is None else dB,
            none_1d if db is None else db,
            none if dW is None else dW,
            none if dD is None else dD,
            scratch,
            packed,
            *self._tiles(dtype),
            self._row_tiles(dtype),
            np.zeros(3 + 5 * workers, np.int64),
            float(low_rank.scaling) if low_rank is not None else 0.0,
            float(delta.scaling) if delta is not None else 0.0,
            float(delta.momentum) if delta is not None else 0.0,
            float(lr),
            float(delta_lr),
            activation,
            transposed,
            base is not None,
            delta is not None,
            low_rank is not None,
            has_bias,
            bool(train),
            masked,
            update,
            input_gradient,
        )
        self._crew.run(few_sweep if few else sweep_kernel.sweep, task, workers)
        self._scratch.give(scratch, packed)
        if masked and gx is not None:
            update_kernel.add_masked_low_rank(gx, _plain(cast(np.ndarray, mask)), t, A)
        return Gradients(gx, dA, dB, dD, dW, db)

    def _masked(self, x: Array, mask: Array) -> Array:
        """mask∘x."""
        out = x.copy()
        self._update(update_kernel.MULTIPLY, out, mask, None, None)
        return out

    def convolution(self, slide: Slide) -> Product:
        """The product of images with a convolution's kernel."""
        return CPUConvolution(self, slide)

    def take_rows(
        self, tables: Sequence[Array], factors: Sequence[float], indices: Array, target: Array, add: bool
    ) -> None:
        """target[n] (+)= Σ factor·table[indices[n]], in place."""
        workers = _workers(2 * target.size)
        two = len(tables) > 1
        task = row_kernel.TakeTask(
            _plain(tables[0]),
            _plain(tables[-1]),
            _plain(indices),
            target,
            np.zeros(workers, np.int64),
            float(factors[0]),
            float(factors[-1]),
            two,
            add,
        )
        self._crew.run(row_kernel.take, task, workers)

    def sum_rows(self, gradient: Array, rows: Rows, factor: float, target: Array) -> None:
        """target[i] = factor·Σ gradient[n] over the samples of row i, in place."""
        self._change_rows(row_kernel.SUM, gradient, rows, target, None, float(factor), 0.0, 0.0)

    def descend_rows(self, gradient: Array, rows: Rows, lr: float, target: Array) -> None:
        """target[i] -= lr·Σ gradient[n] over the samples of row i, in place."""
        self._change_rows(row_kernel.DESCEND, gradient, rows, target, None, 1.0, 0.0, float(lr))

    def follow_rows(self, gradient: Array, rows: Rows, delta: Delta, lr: float) -> None:
        """V = m V + (1 - m) dD, D -= lr V, in place."""
        rule = float(delta.scaling), float(delta.momentum), float(lr)
        self._change_rows(row_kernel.FOLLOW, gradient, rows, delta.delta, delta.velocity, *rule)

    def _change_rows(
        self, code: int, gradient: Array, rows: Rows, target: Array, velocity: Array | None, *rule: float
    ) -> None:
        workers = _workers(gradient.size + (0 if code == row_kernel.DESCEND else target.size))
        sums, counters = np.empty((workers, target.shape[1]), target.dtype), np.zeros(workers, np.int64)
        moving = target if velocity is None else velocity
        task = row_kernel.RowsTask(code, _plain(gradient), *rows, sums, moving, target, counters, *rule)
        self._crew.run(row_kernel.rows, task, workers)

    def merge(self, operands: Operands) -> Array:
        """W + s A B + c D as a new stored array."""
        base, low_rank, delta = cast(Base, operands.base), operands.low_rank, operands.delta
        weight = _plain(base.weight)
        out = np.empty(weight.shape, weight.dtype)
        left, right, s = np.empty((len(weight), 0), weight.dtype), np.empty((0, weight.shape[1]), weight.dtype), 0.0
        if low_rank is not None:
            left, right, s = low_rank.A, low_rank.B, low_rank.scaling
            if base.transposed:
                left, right = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
        deltas = (_plain(delta.delta), float(delta.scaling), True) if delta is not None else (weight, 0.0, False)
        workers = _workers(out.size * (1 + left.shape[1]))
        counters = np.zeros(workers, np.int64)
        task = update_kernel.MergeTask(
            out, weight, deltas[0], _plain(left), _plain(right), float(s), *deltas[1:], counters
        )
        self._crew.run(update_kernel.merge, task, workers)
        return out

    def _update(
        self, code: int, p: Array, g: Array, first: Array | None, second: Array | None, *scalars: float
    ) -> None:
        """Call the update kernel; `first` and `second` are None where the rule has no such array."""
        flat = p.reshape(-1)
        one, two = (flat if array is None else array.reshape(-1) for array in (first, second))
        padded = (*scalars, *_NO_SCALARS[len(scalars) :])
        workers = _workers(p.size)
        counters = np.zeros(workers, np.int64)
        task = update_kernel.UpdateTask(code, flat, _plain(g).reshape(-1), one, two, padded, counters)
        self._crew.run(update_kernel.update, task, workers)

    def sgd_update(self, parameter: Array, gradient: Array, lr: float) -> None:
        """parameter -= lr gradient, in place."""
        self._update(update_kernel.SGD, parameter, gradient, None, None, float(lr))

    def momentum_update(self, delta: Array, velocity: Array, gradient: Array, momentum: float, lr: float) -> None:
        """V = m V + (1-m) gradient; D -= lr V, in place."""
        self._update(update_kernel.MOMENTUM, delta, gradient, velocity, None, float(lr), float(momentum))

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
        """AdamW with decoupled decay (Loshchilov and Hutter, 2019), `step` counted from 1, in place."""
        scalars = map(float, (lr, *betas, eps, weight_decay, step))
        self._update(update_kernel.ADAMW, parameter, gradient, first, second, *scalars)

    def add(self, target: Array, source: Array) -> None:
        """target += source, in place."""
        self._update(update_kernel.ADD, target, source, None, None)

    def scale(self, target: Array, factor: float) -> None:
        """target *= factor, in place."""
        self._update(update_kernel.SCALE, target, target, None, None, float(factor))

    def sum_of_squares(self, array: Array) -> float:
        """Σ a², accumulated in float64."""
        return float(update_kernel.sum_of_squares(_plain(array).reshape(-1)))

    def mean_squared_error(self, output: Array, target: Array) -> tuple[float, Array]:
        """Mean squared error and its gradient."""
        return self._loss(loss_kernel.mean_squared_error, output, target)

    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[float, Array]:
        """Softmax cross-entropy with integer labels and its gradient."""
        gradient, losses = self.arena.empty(logits.shape, logits.dtype), np.empty(len(logits))
        scale = 1 / max(1, int(np.count_nonzero(labels >= 0)))
        workers = _workers(8 * logits.size)
        counters = np.zeros(workers, np.int64)
        task = loss_kernel.CrossEntropyTask(_plain(logits), _plain(labels), gradient, losses, scale, counters)
        self._crew.run(loss_kernel.softmax_cross_entropy, task, workers)
        return float(losses.sum()) * scale, gradient

    def binary_cross_entropy(self, logits: Array, target: Array) -> tuple[float, Array]:
        """Binary cross-entropy with logits and its gradient."""
        return self._loss(loss_kernel.binary_cross_entropy, logits, target)

    @staticmethod
    def _loss(function: Any, output: Array, target: Array) -> tuple[float, Array]:
        gradient, total = np.empty(output.shape, output.dtype), np.zeros(1)
        function(_plain(output), _plain(target), gradient, total)
        return float(total[0]), gradient
