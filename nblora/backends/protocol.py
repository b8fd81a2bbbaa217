"""What a backend offers: the only door between classes, which own arrays, and kernels, which own arithmetic.

Shapes: N samples, `in` and `out` features, `rank`. Arrays are C-contiguous, aligned, and of one dtype, float32 or
float64. "Stored" arrays have the layout of the base weight: (in, out), or (out, in) where it is transposed.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from nblora.kernels.patches.window import Slide, Window

Array = Any  # numpy.ndarray on the CPU, a device array on a GPU
Number = (
    Any  # float on the CPU; on a GPU what `read` makes floats of, many in one copy; times a float, or added: one more
)


class Base(NamedTuple):
    """The pretrained layer: `weight` stored, `bias` (out,) or None, `transposed` where `weight` is (out, in)."""

    weight: Array
    bias: Array | None
    transposed: bool


class LowRank(NamedTuple):
    """The factors `A` (in, rank) and `B` (rank, out), and the scaling s."""

    A: Array
    B: Array
    scaling: float


class Delta(NamedTuple):
    """The dense change `delta` and its `velocity`, stored like the base weight; scaling c and momentum m."""

    delta: Array
    velocity: Array
    scaling: float
    momentum: float


class Rows(NamedTuple):
    """Which samples took which row of a table: `order` (N,) the samples sorted by their row, in which those of row i
    are order[starts[i]] to order[starts[i + 1] - 1]; both int64."""

    order: Array
    starts: Array


class Operands(NamedTuple):
    """What one layer computes with. None where it has no such part; `activation` is a code of `elementwise`."""

    base: Base | None
    low_rank: LowRank | None
    delta: Delta | None
    activation: int
    train_base: bool


class Saved(NamedTuple):
    """What backward needs of a forward: `x` (N, in), None where nothing is trained that multiplies it; `low` =
    s (mask∘x) A (N, rank); pre-activation `z` (N, out), None for the identity; `mask` (N, in) of 0 and 1/(1-p), None
    without dropout."""

    x: Array | None
    low: Array | None
    z: Array | None
    mask: Array | None


class Gradients(NamedTuple):
    """Gradients of one backward, None where there is no such parameter, it is frozen, it was consumed, or, for `x`, it
    was not asked for."""

    x: Array | None
    A: Array | None
    B: Array | None
    delta: Array | None
    weight: Array | None
    bias: Array | None


def keeps_input(operands: Operands) -> bool:
    """Whether backward reads the input: a frozen base alone does not."""
    return operands.train_base or operands.low_rank is not None or operands.delta is not None


class Product(Protocol):
    """The step of one layer: what its input is multiplied with, forward and back. A backend's own is that of rows."""

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Any]:
        """y = act(x (W + c D) + s (mask∘x) A B + b), (N, out), and what backward needs where `keep`: a `Saved` of a
        backend, of other products what they like, with the input as `x`."""
        ...

    def backward(self, grad_output: Array, saved: Any, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient, from the values as they are; `delta` and `weight` stored. Without `input_gradient` that of x
        is neither computed nor held."""
        ...

    def backward_update(
        self,
        grad_output: Array,
        saved: Any,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward in one sweep that never holds dD or dW: V = m V + (1-m) dD, D -= delta_lr V, and W -= lr dW where
        the base is trained, in place. The gradients of A, B and the bias are handed back, theirs is the caller's."""
        ...


class Backend(Product, Protocol):
    """Operations on arrays of one device. Nothing here checks its arguments."""

    device: str
    precision: str
    breadth: int
    """How many times as much as suits a CPU's caches is made at once: of logits, of patches."""
    simulated: bool
    """Whether it only stands for a GPU."""

    def adopt(self, value: Any) -> Array | None:
        """The array itself, or a view of it, where `value` is on this backend's GPU; None for what is on the host."""
        ...

    def from_host(self, array: np.ndarray) -> Array:
        """Bring a NumPy array to the device; the CPU hands the same array back."""
        ...

    def base_from_host(self, array: np.ndarray) -> Array:
        """Bring the weight of a frozen base to the device, in the precision asked for."""
        ...

    def to_host(self, array: Array) -> np.ndarray:
        """Bring an array to NumPy; the CPU hands the same array back."""
        ...

    def release(self) -> None:
        """Free memory that nothing refers to any more."""
        ...

    def lending(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, new arrays may take the memory of others that are gone."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array whose values are undefined, C-contiguous."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array of zeros, C-contiguous."""
        ...

    def zeros_like(self, array: Array) -> Array:
        """A new array of zeros, same shape and dtype, C-contiguous."""
        ...

    def dropout_mask(self, rng: np.random.Generator, shape: tuple[int, ...], share: float, dtype: np.dtype) -> Array:
        """A new array of 0 for the `share` that is dropped, drawn by `rng`, and 1 / (1 - share) for the rest. A GPU
        takes a key from `rng` and draws numbers of its own, so its masks are not the CPU's."""
        ...

    def convolution(self, slide: Slide) -> Product:
        """The product of patches: x (N, channels, height, width), y (N, out, H', W'), and `in` the numbers of a patch.
        Patches are made in pieces of at most `PIECE` bytes."""
        ...

    def embedding(self) -> Product:
        """The product of rows that integers name: x (N,) of them, in [0, in), stands for as many rows with a single 1.
        It has no gradient, and no mask."""
        ...

    def unfold(self, images: Array, window: Window, start: int, stop: int) -> Array:
        """Patches [start, stop) of images (N, channels, height, width), counted through all images, as rows."""
        ...

    def fold(self, rows: Array, window: Window, start: int, images: Array, add: bool) -> None:
        """The transpose of `unfold`: patches from `start` on added to the images they come from, in place, or written
        there, where each place is met once."""
        ...

    def take_rows(
        self, tables: Sequence[Array], factors: Sequence[float], indices: Array, target: Array, add: bool
    ) -> None:
        """target[n] (+)= Σ factor·table[indices[n]] over one or two tables, in place; indices (N,) int64."""
        ...

    def sum_rows(self, gradient: Array, rows: Rows, factor: float, target: Array) -> None:
        """target[i] = factor·Σ gradient[n] over the samples of row i, in place; zero for a row without."""
        ...

    def descend_rows(self, gradient: Array, rows: Rows, lr: float, target: Array) -> None:
        """target[i] -= lr·Σ gradient[n] over the samples of row i, in place."""
        ...

    def follow_rows(self, gradient: Array, rows: Rows, delta: Delta, lr: float) -> None:
        """V = m V + (1 - m) dD, D -= lr V, in place, for all rows; dD[i] = c·Σ gradient[n] over row i's samples."""
        ...

    def merge(self, operands: Operands) -> Array:
        """W + s A B + c D as a new stored array."""
        ...

    def sgd_update(self, parameter: Array, gradient: Array, lr: float) -> None:
        """parameter -= lr gradient, in place."""
        ...

    def momentum_update(self, delta: Array, velocity: Array, gradient: Array, momentum: float, lr: float) -> None:
        """V = m V + (1-m) gradient; D -= lr V, in place."""
        ...

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
        ...

    def add(self, target: Array, source: Array) -> None:
        """target += source, in place."""
        ...

    def scale(self, target: Array, factor: float) -> None:
        """target *= factor, in place."""
        ...

    def sum_of_squares(self, array: Array) -> float:
        """Σ a², accumulated in float64."""
        ...

    def sums_of_squares(self, arrays: Sequence[Array]) -> list[Number]:
        """Σ a² of each array, as `sum_of_squares`, to be read together with other numbers."""
        ...

    def read(self, numbers: Sequence[Number]) -> list[float]:
        """Numbers that this backend computed, and floats among them, as floats: on a GPU in one copy to the host."""
        ...

    def mean_squared_error(self, output: Array, target: Array) -> tuple[Number, Array]:
        """Σ (y - t)² / (N·out) and its gradient by `output`; both (N, out)."""
        ...

    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[Number, Array]:
        """Mean over the learnt samples of log Σ exp(z) - z[label] and its gradient; logits (N, out), labels (N,) int64
        below out, negative where nothing is learnt: no loss, no gradient, not counted. 0 where no label is learnt."""
        ...

    def binary_cross_entropy(self, logits: Array, target: Array) -> tuple[Number, Array]:
        """Mean over all of log(1 + exp(z)) - z t and its gradient; both (N, out)."""
        ...
