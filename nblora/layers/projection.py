"""`Projection`: y = act(x M + b), the one step that plain layers, low-rank layers and adapters share."""

from nblora import checks
from nblora.backends.protocol import Array, Gradients, Operands

from .base import Layer
from .parameters import Parameter
from .run import Kept, Run

Targets = tuple[tuple[str, Parameter], ...]


class Projection(Layer, abstract=True):
    """A layer whose arithmetic is one call of the backend: any of base, low-rank factors and delta (`Operands`)."""

    _computes = True

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

    def _parts(self) -> dict[str, Layer]:
        return {}  # what it holds takes part in its product

    def _dropout_mask(self, rows: Array) -> Array | None:
        """The mask of this forward, None without dropout."""
        return None

    def _forward(self, x: Array, run: Run) -> Array:
        rows = checks.as_rows(x)
        operands = self._operands()
        if run.frozen and operands.train_base:
            operands = operands._replace(train_base=False)
        trained = self.trainable and not run.frozen and (operands.train_base or operands.low_rank is not None)
        keep = run.training and (run.live or trained)
        y, saved = run.backend.forward(rows, operands, self._dropout_mask(rows) if run.training else None, keep)
        if run.training:
            run.keep(self, Kept(saved, x.shape, operands, run.live, trained) if saved is not None else None)
            run.live = run.live or trained
        run.passed(self, y)
        return y if rows is x else y.reshape((*x.shape[:-1], self.out_features))

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept: Kept | None = run.recall(self)
        if kept is None:
            return None
        grad_input = run.sink.project(self, checks.as_rows(grad), kept, run)
        return grad_input if grad_input is None or len(kept.shape) == 2 else grad_input.reshape(kept.shape)
