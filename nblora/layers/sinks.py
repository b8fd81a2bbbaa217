"""Sinks: where the gradients of a backward go, held or used at once."""

from collections.abc import Iterable
from typing import Any

from nblora.backends.protocol import Array, Operands

from .parameters import Parameter
from .run import Kept, Run


class Sink:
    """Takes the gradients of one backward.

    Attributes
    ----------
    lr, delta_lr : float
        Learning rates of what a sweep over a layer's weights updates on its way: the weights, and deltas.
    swept : set of Parameter
        The deltas that were updated so.
    """

    lr = delta_lr = 0.0

    def __init__(self) -> None:
        self.swept: set[Parameter] = set()

    def project(self, layer: Any, grad: Array, kept: Kept, run: Run) -> Array | None:
        """Go back through a projection whose output has the gradient `grad`; return the input's, if wanted."""
        if not kept.trained:
            return kept.product.backward(grad, kept.saved, kept.operands).x
        fused = self.fuses(kept.operands) and not run.repeats(layer) and not (kept.operands.train_base and layer.shares)
        if fused:
            gradients = kept.product.backward_update(
                grad, kept.saved, kept.operands, self.lr, self.rate_of_delta(layer), input_gradient=kept.live
            )
        else:
            gradients = kept.product.backward(grad, kept.saved, kept.operands, input_gradient=kept.live)
        for parameter, gradient in layer._gradients_of(gradients):
            if gradient is not None:
                self.put(parameter, gradient, run)
            elif fused and parameter.velocity is not None and kept.operands.delta is not None:
                self.swept.add(parameter)
        return gradients.x

    def fuses(self, operands: Operands) -> bool:
        """Whether the sweep may update the dense parameters of these operands."""
        return False

    def rate_of_delta(self, layer: Any) -> float:
        """The learning rate of the delta that the sweep over this layer updates, if it has one."""
        return self.delta_lr

    def put(self, parameter: Parameter, gradient: Array, run: Run) -> None:
        """Take one gradient, added to what a parameter that was used twice has already."""
        raise NotImplementedError


class Held(Sink):
    """Holds every gradient beside its parameter, added to one that is there."""

    def put(self, parameter: Parameter, gradient: Array, run: Run) -> None:
        if parameter.gradient is None:
            parameter.gradient = gradient
        else:
            run.backend.add(parameter.gradient, gradient)


class Sweep(Sink):
    """Updates dense parameters while it sweeps over them, and what is small at the end."""

    def __init__(self, lr: float, delta_lr: float) -> None:
        super().__init__()
        self.lr, self.delta_lr = lr, delta_lr
        self.pending: dict[Parameter, Array] = {}

    def fuses(self, operands: Operands) -> bool:
        return True

    def put(self, parameter: Parameter, gradient: Array, run: Run) -> None:
        held = self.pending.setdefault(parameter, gradient)
        if held is not gradient:
            run.backend.add(held, gradient)

    def finish(self, backend: Any, trained: list[Parameter]) -> None:
        """Update what is left of the trained parameters; a delta that the forward passed by still follows its V."""
        for parameter in trained:
            gradient = self.pending.get(parameter)
            if gradient is None and parameter.velocity is not None and parameter not in self.swept:
                gradient = backend.zeros_like(parameter.array)
            if gradient is not None:
                descend(backend, parameter, gradient, self.lr, self.delta_lr)
        tell(trained)


def tell(parameters: Iterable[Parameter]) -> None:
    """Tell those that want to know it that all of them have been updated."""
    for parameter in parameters:
        if parameter.updated is not None:
            parameter.updated()


def descend(backend: Any, parameter: Parameter, gradient: Array, lr: float, delta_lr: float) -> None:
    """Move a parameter, in place, by its own rule: plain descent, or a delta's velocity."""
    if parameter.velocity is None:
        backend.sgd_update(parameter.array, gradient, lr)
    else:
        velocity, momentum = parameter.velocity.array, parameter.momentum
        backend.momentum_update(parameter.array, velocity, gradient, momentum, delta_lr)
