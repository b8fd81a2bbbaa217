"""The learning rates of deltas that are left to `fit`: how far the first batches would move each layer decides.

A step of a delta moves its layer's weight by c·lr·V, and V, an average of the gradients dD, comes near dD after
1 / (1 - m) steps. The rate is chosen so that c·lr·x dD, what the step of the grown V does to the layer's output, is a
fixed share of x W, divided by the number of deltas, since layers that move together add up. (A bound for every layer's
relative change: Bernstein et al., 2020, "On the distance between two neural networks and the stability of learning";
of outputs and not of norms: Yang, Simon and Bernstein, 2023, "A spectral condition for feature learning". A batch's
gradient has few directions, and a share of the weight's norm, which is spread over all, moves a wide layer's output by
many times that share.) Over many steps the way is c·lr·Σ dD, whatever m is: were the first step, (1 - m)·c·lr·dD,
held to the share instead, m = 0.95 would train twenty times as fast as m = 0. The loss's scale, c and the inputs' size
are in dD, and so cancel.

Behind a new head gradients are small until the head has grown, so a rate that suits them at first may be far too large
soon. What a step promises, Σ lr·|V|² over all deltas, is the decrease of the loss to first order: no step may promise a
larger share of the loss than the first did (Loizou et al., 2021, "Stochastic Polyak step-size for SGD", where the whole
loss bounds it), and a rate that falls for that reason stays there (Orvieto et al., 2022, "Dynamics of SGD with
stochastic Polyak stepsizes").
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array, Base, Number, Operands, Product
from nblora.layers import Layer, tree
from nblora.layers.parameters import Parameter
from nblora.layers.run import Kept, Run
from nblora.layers.sinks import Sweep

from .losses import Loss

AUTO = "auto"
SHARE = 0.1  # of all layers' outputs; docs/training.md has the measurements that chose it
PROMISES = 0.1, 1.0  # of the loss: what any step may promise, and what none may
MEMORY = 0.9  # of the mean of the steps' losses
BATCHES = 8  # enough that one odd batch decides nothing, and a small part of an epoch


def check_delta_lr(name: str, value: Any) -> float | str | None:
    """A learning rate of deltas: a number, None for the optimiser's, or `AUTO`."""
    if isinstance(value, str) and value != AUTO:
        raise ValueError(f"{name} must be {AUTO!r}, a number, or None for the optimiser's learning rate, got {value!r}")
    return value if value is None or isinstance(value, str) else checks.check_not_negative(name, value)


class Bound(NamedTuple):
    """What the steps of deltas may promise: `share` of `loss`, a mean of the steps' losses, recent ones most."""

    loss: float
    share: float

    def after(self, loss: float) -> "Bound":
        """With the loss of one more step."""
        return self._replace(loss=MEMORY * self.loss + (1 - MEMORY) * loss)

    def factor(self, promised: float) -> float:
        """What to multiply rates with whose steps promise so much: at least a half, for one odd batch decides little.

        A loss that is not positive bounds nothing.
        """
        most = max(PROMISES[0], self.share) * self.loss
        return max(0.5, most / promised) if 0 < most < promised < math.inf else 1.0


class Calibration(NamedTuple):
    """The rate of each delta, the batches' mean loss, and the share of it that a step with these rates promises."""

    rates: dict[Parameter, float]
    loss: float
    promise: float


def calibrate(
    model: Layer,
    loss: Loss,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    deltas: Iterable[Parameter],
    count: int,
    clip_norm: float | None,
) -> Calibration:
    """Choose the learning rate of each of the `deltas` that has a gradient on these batches; nothing is changed.

    `count` deltas move together. With `clip_norm` the gradients count as they are after clipping, and those of all
    parameters make the norm.
    """
    states = {generator: generator.bit_generator.state for generator in tree.generators(model).values()}
    measure = _Measure(model)
    found: dict[Parameter, list[_Move]] = {delta: [] for delta in deltas}
    losses = []
    for x, y in batches:
        value, squares, moves = measure(loss, x, y)
        total = math.sqrt(sum(squares.values()))
        if math.isfinite(total) and math.isfinite(value):  # what is not finite is the first step's to report
            losses.append(value)
            factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (total + 1e-6))
            for delta, kept in found.items():
                if delta in moves:
                    kept.append(moves[delta].times(factor * factor))
    for generator, state in states.items():
        generator.bit_generator.state = state
    totals = {
        delta: _Move(*(sum(column) for column in zip(*kept, strict=True))) for delta, kept in found.items() if kept
    }
    rates = {delta: SHARE / count * rate for delta, move in totals.items() if math.isfinite(rate := move.reach())}
    mean = sum(losses) / max(1, len(losses))
    promised = sum(rate * totals[delta].gradient for delta, rate in rates.items()) / max(1, len(losses))
    if promised > PROMISES[1] * mean > 0:
        factor = PROMISES[1] * mean / promised
        rates, promised = {delta: factor * rate for delta, rate in rates.items()}, factor * promised
    return Calibration(rates, mean, promised / mean if mean > 0 else 0.0)


class _Move(NamedTuple):
    """Squares of norms: of dD, of c x dD, by which a step at rate 1 moves the layer's output, and of x W."""

    gradient: float
    moved: float
    output: float

    def times(self, factor: float) -> "_Move":
        """With the gradient's square multiplied."""
        return _Move(factor * self.gradient, factor * self.moved, self.output)

    def reach(self) -> float:
        """The rate at which a step moves the output by its own norm; infinite where there is nothing to move it."""
        return math.sqrt(self.output / self.moved) if self.moved > 0 else math.inf


class _Measure(Sweep):
    """Takes the norms of a backward's gradients; no layer's dense gradient outlives the layer's own backward."""

    def __init__(self, model: Layer) -> None:
        super().__init__(0.0, 0.0)
        self._model = model
        self._trained = {parameter for _, parameter, _ in tree.trainable(model)}
        self._squares: dict[Parameter, Number] = {}
        self._inputs: dict[Parameter, list[tuple[Product, Array]]] = {}
        self._weights: dict[Parameter, tuple[Base, float]] = {}
        self._moves: dict[Parameter, list[Number]] = {}
        self._zero: dict[Parameter, bool] = {}

    def __call__(
        self, loss: Loss, x: np.ndarray, y: np.ndarray
    ) -> tuple[float, dict[Parameter, float], dict[Parameter, _Move]]:
        """Go forward and back by one batch; return its loss, Σ g² of every trained parameter that has a gradient, and
        what the gradients of deltas would do."""
        model, backend = self._model, self._model._backend
        run = Run(backend, training=True, live=False)
        run.sink = self
        self._squares.clear()
        self._moves.clear()
        value, grad, _ = model._learn(x, y, loss, run)
        model._backward(grad, run.back(self))
        self._settle(backend, list(self.pending))
        numbers = iter(
            backend.read([value, *self._squares.values(), *(n for pair in self._moves.values() for n in pair)])
        )
        value = next(numbers)
        squares = {parameter: next(numbers) for parameter in self._squares}
        moved = {delta: (next(numbers), next(numbers)) for delta in self._moves}
        return value, squares, {delta: self._move(delta, squares[delta], *pair) for delta, pair in moved.items()}

    def fuses(self, operands: Any) -> bool:
        return False

    def put(self, parameter: Parameter, gradient: Array, run: Run) -> None:
        if parameter in self._trained:
            super().put(parameter, gradient, run)

    def project(self, layer: Any, grad: Array, kept: Kept, run: Run) -> Array | None:
        found = super().project(layer, grad, kept, run)
        own = [parameter for _, parameter in layer._targets() if parameter in self.pending]
        base, delta = kept.operands.base, kept.operands.delta
        if base is not None and delta is not None:
            for parameter in own:
                if parameter.velocity is not None:
                    self._weights[parameter] = base, delta.scaling
                    self._inputs.setdefault(parameter, []).append((layer._product(run.backend), kept.saved.x))
        if not run.repeats(layer):
            self._settle(run.backend, own)
        return found

    def _settle(self, backend: Any, parameters: list[Parameter]) -> None:
        gradients = [self.pending.pop(parameter) for parameter in parameters]
        self._squares.update(zip(parameters, backend.sums_of_squares(gradients), strict=True))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            for product, x in self._inputs.pop(parameter, ()):
                base = self._weights[parameter][0]._replace(bias=None)
                outputs = [
                    product.forward(x, Operands(part, None, None, 0, False), None, False)[0]
                    for part in (base._replace(weight=gradient), base)
                ]
                pair, before = backend.sums_of_squares(outputs), self._moves.get(parameter)
                self._moves[parameter] = pair if before is None else [a + b for a, b in zip(before, pair, strict=True)]

    def _move(self, delta: Parameter, gradient: float, moved: float, output: float) -> _Move:
        """What a delta's gradient does.

        Where the weight is zero, or the base is no single layer, that is told from the weights: by the norm of a new
        layer's, uniform in ±1/√in.
        """
        base, scaling = self._weights[delta]
        if delta not in self._zero:
            self._zero[delta] = self._model._backend.sum_of_squares(base.weight) == 0
        if self._zero[delta]:
            moved, output = gradient, math.prod(delta.shape[1:]) / 3
        return _Move(gradient, scaling * scaling * moved, output)
