"""Every operation in plain NumPy, in a few lines: the specification of the others, and what runs with no compiler.

The kernels are tested against this one, with the operands in float64. A new operation lands here first: a backend whose
arrays are NumPy's inherits it until it has a kernel of its own.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from nblora.kernels.common.elementwise import activate, activation_slope
from nblora.kernels.patches.window import Slide, Window

from .blocks import ReferenceBlocks
from .convolution import Convolution
from .embedding import Embedding
from .protocol import Array, Base, Delta, Gradients, Operands, Product, Rows, Saved, keeps_input

Operation = TypeVar("Operation", bound=Callable[..., Any])


def _quiet(operation: Operation) -> Operation:
    """Let infinities and NaN pass without warnings, as compiled code does."""

    @functools.wraps(operation)
    def run(*arguments: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"):
            return operation(*arguments, **options)

    return run  # type: ignore[return-value]  # the same arguments and result


def _each(rule: Callable[[float, int], float], z: np.ndarray, code: int) -> np.ndarray:
    """A rule of `elementwise` at every element."""
    return np.array([rule(value, code) for value in z.reshape(-1).tolist()], z.dtype).reshape(z.shape)


def _logical(stored: np.ndarray, base: Base) -> np.ndarray:
    """What is stored like the base weight, as (in, out); and the other way."""
    return stored.T if base.transposed else stored


def _matrix(operands: Operands) -> np.ndarray | None:
    """M = W + c D, (in, out); None without a base."""
    base, _, delta, _, _ = operands
    if base is None:
        return None
    return _logical(base.weight if delta is None else base.weight + delta.scaling * delta.delta, base)


def _gradients(grad_output: Array, saved: Saved, operands: Operands, input_gradient: bool) -> Gradients:
    """The equations of `ReferenceBackend.backward`."""
    base, low_rank, delta, code, train = operands
    x, u, z, mask = saved
    gz = grad_output if z is None else grad_output * _each(activation_slope, z, code)
    gx = dA = dB = dD = dW = db = None
    matrix = _matrix(operands)
    if input_gradient and matrix is not None:
        gx = gz @ matrix.T
    if low_rank is not None and x is not None and u is not None:
        t = low_rank.scaling * (gz @ low_rank.B.T)
        dA, dB = (x if mask is None else mask * x).T @ t, u.T @ gz
        if input_gradient:
            low = t @ low_rank.A.T if mask is None else mask * (t @ low_rank.A.T)
            gx = low if gx is None else gx + low
    if base is not None and x is not None and (train or delta is not None):
        gradient = np.ascontiguousarray(_logical(x.T @ gz, base))
        dW = gradient if train else None
        dD = None if delta is None else delta.scaling * gradient
    if train and base is not None and base.bias is not None:
        db = gz.sum(axis=0)
    return Gradients(gx, dA, dB, dD, dW, db)


def _sources(window: Window, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Image, row and column that each number of the patches [start, stop) is read from, and which lie inside; all
    (patches, kh, kw)."""
    n, h, w = np.unravel_index(np.arange(start, stop), (max(stop, 1), window.out_height, window.out_width))
    y = (h * window.sh - window.ph)[:, None, None] + (np.arange(window.kh) * window.dh)[:, None]
    x = (w * window.sw - window.pw)[:, None, None] + np.arange(window.kw) * window.dw
    inside = (y >= 0) & (y < window.height) & (x >= 0) & (x < window.width)
    n, y, x = np.broadcast_arrays(n[:, None, None], np.clip(y, 0, window.height - 1), np.clip(x, 0, window.width - 1))
    return n, y, x, inside


class ReferenceBackend(ReferenceBlocks):
    """The operations of `protocol.Backend` on NumPy arrays."""

    device = "cpu"
    precision = "float32"
    breadth, simulated = 1, False

    def adopt(self, value: Any) -> Array | None:
        """The array itself where it is on a GPU: never."""
        return None

    def from_host(self, array: np.ndarray) -> Array:
        """Bring a NumPy array to the device: the same array."""
        return array

    def base_from_host(self, array: np.ndarray) -> Array:
        """Bring the weight of a frozen base to the device: the same array."""
        return array

    def to_host(self, array: Array) -> np.ndarray:
        """Bring an array to NumPy: the same array."""
        return array

    def release(self) -> None:
        """Free memory that nothing refers to: Python does."""

    def lending(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do: NumPy's own memory."""
        return contextlib.nullcontext()

    def dropout_mask(self, rng: np.random.Generator, shape: tuple[int, ...], share: float, dtype: np.dtype) -> Array:
        """0 for the share that is dropped, 1 / (1 - share) for the rest."""
        kept = rng.random(shape, dtype) >= share
        return kept * dtype.type(1 / (1 - share))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array whose values are undefined, C-contiguous."""
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array of zeros, C-contiguous."""
        return np.zeros(shape, dtype)

    def zeros_like(self, array: Array) -> Array:
        """A new array of zeros, same shape and dtype, C-contiguous."""
        return np.zeros(array.shape, array.dtype)

    @_quiet
    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Saved | None]:
        """y = act(z), z = x M + u B + b with M = W + c D and u = s (mask∘x) A."""
        base, low_rank, _, code, _ = operands
        matrix, u, z = _matrix(operands), None, np.zeros((), x.dtype)
        if matrix is not None:
            z = z + x @ matrix
        if low_rank is not None:
            u = low_rank.scaling * ((x if mask is None else mask * x) @ low_rank.A)
            z = z + u @ low_rank.B
        if base is not None and base.bias is not None:
            z = z + base.bias
        y = _each(activate, z, code) if code else z
        if not keep:
            return y, None
        return y, Saved(x if keeps_input(operands) else None, u, z if code else None, mask)

    @_quiet
    def backward(self, grad_output: Array, saved: Saved, operands: Operands, input_gradient: bool = True) -> Gradients:
        """gz = gy·act'(z), t = s gz Bᵀ: dA = (mask∘x)ᵀ t, dB = uᵀ gz, dD = c xᵀ gz, dW = xᵀ gz, db = Σ gz, and
        gx = gz Mᵀ + mask∘(t Aᵀ)."""
        return _gradients(grad_output, saved, operands, input_gradient)

    @_quiet
    def backward_update(
        self,
        grad_output: Array,
        saved: Saved,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward, then V = m V + (1-m) dD, D -= delta_lr V, W -= lr dW."""
        base, _, delta, _, _ = operands
        gradients = _gradients(grad_output, saved, operands, input_gradient)
        if delta is not None and gradients.delta is not None:
            self.momentum_update(delta.delta, delta.velocity, gradients.delta, delta.momentum, delta_lr)
        if base is not None and gradients.weight is not None:
            self.sgd_update(base.weight, gradients.weight, lr)
        return gradients._replace(delta=None, weight=None)

    @_quiet
    def convolution(self, slide: Slide) -> Product:
        """The product of patches."""
        return Convolution(self, slide)

    def embedding(self) -> Product:
        """The product of rows that integers name."""
        return Embedding(self)

    def unfold(self, images: Array, window: Window, start: int, stop: int) -> Array:
        """Patches [start, stop) of images as rows."""
        n, y, x, inside = _sources(window, start, stop)
        patches = np.where(inside[..., None], images.transpose(0, 2, 3, 1)[n, y, x], images.dtype.type(0))
        return np.ascontiguousarray(patches.transpose(0, 3, 1, 2).reshape(stop - start, window.features))

    def fold(self, rows: Array, window: Window, start: int, images: Array, add: bool) -> None:
        """The transpose of `unfold`, in place."""
        n, y, x, inside = _sources(window, start, start + len(rows))
        patches = rows.reshape(len(rows), window.channels, window.kh, window.kw).transpose(0, 2, 3, 1)
        places, target = (n[inside], y[inside], x[inside]), images.transpose(0, 2, 3, 1)
        if add:
            np.add.at(target, places, patches[inside])
        else:
            target[places] = patches[inside]

    def take_rows(
        self, tables: Sequence[Array], factors: Sequence[float], indices: Array, target: Array, add: bool
    ) -> None:
        """target[n] (+)= Σ factor·table[indices[n]], in place."""
        rows = sum(target.dtype.type(factor) * table[indices] for table, factor in zip(tables, factors, strict=True))
        target[...] = target + rows if add else rows

    def sum_rows(self, gradient: Array, rows: Rows, factor: float, target: Array) -> None:
        """target[i] = factor·Σ gradient[n] over the samples of row i, in place."""
        target[...] = 0
        np.add.at(target, np.repeat(np.arange(len(target)), np.diff(rows.starts)), gradient[rows.order])
        target *= target.dtype.type(factor)

    def descend_rows(self, gradient: Array, rows: Rows, lr: float, target: Array) -> None:
        """target[i] -= lr·Σ gradient[n] over the samples of row i, in place."""
        found = np.empty_like(target)
        self.sum_rows(gradient, rows, lr, found)
        target -= found

    def follow_rows(self, gradient: Array, rows: Rows, delta: Delta, lr: float) -> None:
        """V = m V + (1 - m) dD, D -= lr V, with dD[i] = c·Σ gradient[n] over the samples of row i, in place."""
        found = np.empty_like(delta.delta)
        self.sum_rows(gradient, rows, delta.scaling, found)
        self.momentum_update(delta.delta, delta.velocity, found, delta.momentum, lr)

    def merge(self, operands: Operands) -> Array:
        """W + s A B + c D as a new stored array."""
        base, low_rank, matrix = operands.base, operands.low_rank, _matrix(operands)
        assert base is not None  # nothing else is merged
        assert matrix is not None
        if low_rank is not None:
            matrix = matrix + low_rank.scaling * (low_rank.A @ low_rank.B)
        return np.array(_logical(matrix, base), order="C")

    @_quiet
    def sgd_update(self, parameter: Array, gradient: Array, lr: float) -> None:
        """parameter -= lr gradient, in place."""
        parameter -= lr * gradient

    @_quiet
    def momentum_update(self, delta: Array, velocity: Array, gradient: Array, momentum: float, lr: float) -> None:
        """V = m V + (1-m) gradient; D -= lr V, in place."""
        velocity[...] = momentum * velocity + (1 - momentum) * gradient
        delta -= lr * velocity

    @_quiet
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
        """m = β₁ m + (1-β₁) g; v = β₂ v + (1-β₂) g²; p = (1 - lr·decay) p - lr m̂ / (√v̂ + eps), with m̂ = m / (1 - β₁ᵗ)
        and v̂ = v / (1 - β₂ᵗ) (Loshchilov and Hutter, 2019), `step` t counted from 1, in place."""
        first[...] = betas[0] * first + (1 - betas[0]) * gradient
        second[...] = betas[1] * second + (1 - betas[1]) * gradient**2
        move = first / (1 - betas[0] ** step) / (np.sqrt(second / (1 - betas[1] ** step)) + eps)
        parameter[...] = (1 - lr * weight_decay) * parameter - lr * move

    @_quiet
    def add(self, target: Array, source: Array) -> None:
        """target += source, in place."""
        target += source

    @_quiet
    def scale(self, target: Array, factor: float) -> None:
        """target *= factor, in place."""
        target *= factor

    @_quiet
    def sum_of_squares(self, array: Array) -> float:
        """Σ a², accumulated in float64."""
        return float((array.astype(np.float64) ** 2).sum())

    def sums_of_squares(self, arrays: Sequence[Array]) -> list[float]:
        """Σ a² of each."""
        return [self.sum_of_squares(array) for array in arrays]

    def read(self, numbers: Sequence[float]) -> list[float]:
        """The numbers, which are floats here."""
        return list(numbers)

    @_quiet
    def mean_squared_error(self, output: Array, target: Array) -> tuple[float, Array]:
        """Σ (y - t)² / (N·out); its gradient is 2 (y - t) / (N·out)."""
        error = output.astype(np.float64) - target
        return float((error**2).mean()), (2 / error.size * error).astype(output.dtype)

    @_quiet
    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[float, Array]:
        """Mean of log Σ exp(z) - z[label]; its gradient is (softmax(z) - onehot(label)) / N; over labels from 0 on."""
        learnt = labels >= 0
        if not learnt.all():
            gradient = np.zeros_like(logits)
            if not learnt.any():
                return 0.0, gradient
            value, gradient[learnt] = self.softmax_cross_entropy(logits[learnt], labels[learnt])
            return value, gradient
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        weights, rows = np.exp(shifted), np.arange(len(labels))
        total = weights.sum(axis=1, keepdims=True)
        gradient = weights / total
        gradient[rows, labels] -= 1
        loss = (np.log(total[:, 0]) - shifted[rows, labels]).mean()
        return float(loss), (gradient / len(labels)).astype(logits.dtype)

    @_quiet
    def binary_cross_entropy(self, logits: Array, target: Array) -> tuple[float, Array]:
        """Mean of log(1 + exp(z)) - z t; its gradient is (sigmoid(z) - t) / (N·out)."""
        z, t = logits.astype(np.float64), target.astype(np.float64)
        small = np.exp(-abs(z))
        value = np.maximum(z, 0) - z * t + np.log1p(small)
        sigmoid = np.where(z >= 0, 1, small) / (1 + small)
        return float(value.mean()), ((sigmoid - t) / z.size).astype(logits.dtype)
