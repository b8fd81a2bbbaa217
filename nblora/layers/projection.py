"""`Projection`: y = act(x M + b), the one step that plain layers, low-rank layers and adapters share."""

from typing import ClassVar

import numpy as np

from nblora import checks
from nblora.backends.normalized import Normalized
from nblora.backends.protocol import Array, Backend, Gradients, Operands, Product

from .base import Layer
from .parameters import Parameter
from .run import Kept, Run

Targets = tuple[tuple[str, Parameter], ...]


class Projection(Layer, abstract=True):
    """A layer whose arithmetic is one product of its input: with any of base, low-rank factors and delta (`Operands`).

    What it multiplies is a row of x as a rule. A layer that multiplies patches of images, or rows that integers name,
    says so by `_product`, and by `_batch` how x becomes what that product takes; around it an adapter does the same.
    """

    _computes = True
    _joins_norm: ClassVar[bool] = True  # whether its product computes a norm behind it, with operands scaled by it

    def _product(self, backend: Backend) -> Product:
        """What computes on `backend`: a backend multiplies rows."""
        return backend

    def _batch(self, x: Array) -> Array:
        """An input as the product takes it."""
        return checks.as_rows(x)

    def _grad_batch(self, grad: Array) -> Array:
        """A gradient of the output as the product takes it."""
        return checks.as_rows(grad)

    def _operands(self) -> Operands:
        """What the layer computes with, as it is now."""
        raise NotImplementedError

    def children(self) -> dict[str, Layer]:
        return {}

    def _targets(self) -> Targets:
        """The parameters that a backward has gradients of, each after its place in `Gradients`."""
        raise NotImplementedError

    def _gradients_of(self, gradients: Gradients) -> list[tuple[Parameter, Array | None]]:
        """Each parameter with its gradient, None where it has none; of parameters that no operand is, computed here."""
        return [(parameter, getattr(gradients, part)) for part, parameter in self._targets()]

    def _change(self, operands: Operands) -> np.ndarray | None:
        """What operands with low-rank factors change of the weight, s A B + c D, (in, out) in float64."""
        _, low_rank, delta, _, _ = operands
        if low_rank is None:
            return None
        fetch = self._backend.to_host
        change: np.ndarray = low_rank.scaling * (fetch(low_rank.A).astype(np.float64) @ fetch(low_rank.B))
        if delta is not None:
            dense = np.asarray(fetch(delta.delta), np.float64)
            change += delta.scaling * (dense.T if operands.base is not None and operands.base.transposed else dense)
        return change

    @property
    def shares(self) -> bool:
        """Whether one of its parameters is another layer's too."""
        return any(parameter.shared for _, parameter in self._targets())

    def _parts(self) -> dict[str, Layer]:
        return {}  # what it holds takes part in its product

    def _dropout_mask(self, batch: Array) -> Array | None:
        """The mask of this forward, None without dropout."""
        return None

    def _forward(self, x: Array, run: Run) -> Array:
        batch = self._batch(x)
        operands = self._operands()
        if run.frozen and operands.train_base:
            operands = operands._replace(train_base=False)
        trained = self.trainable and not run.frozen and (operands.train_base or operands.low_rank is not None)
        keep = run.training and (run.live or trained)
        product = self._product(run.backend)
        if run.epilogue is not None:
            product = Normalized(product, run.backend, *run.epilogue)
        y, saved = product.forward(batch, operands, self._dropout_mask(batch) if run.training else None, keep)
        if run.training:
            run.keep(self, Kept(saved, x.shape, operands, product, run.live, trained) if saved is not None else None)
            run.live = run.live or trained
        run.passed(self, y)
        return y if batch is x else y.reshape(self._output_shape("x", x.shape))

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept: Kept | None = run.recall(self)
        if kept is None:
            return None
        grad_input = run.sink.project(self, self._grad_batch(grad), kept, run)
        return None if grad_input is None else _shaped(grad_input, kept.shape)


def _shaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array itself where it has the shape: to ask costs less than another view."""
    return array if array.shape == shape else array.reshape(shape)
