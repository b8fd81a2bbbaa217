"""The learning rates of deltas that are left to `fit`: how far the first batches would move each layer decides.

A step of a delta moves its layer's weight by c·lr·V, and V, an average of the gradients dD, comes near dD after
1 / (1 - m) steps. The rate is chosen so that c·lr·dD, the step of the grown V, is a fixed share of the weight's norm
(LARS: You, Gitman and Ginsburg, 2017). Over many steps the way is c·lr·Σ dD, whatever m is: were the first, smaller
step, (1 - m)·c·lr·dD, held to the share instead, m = 0.95 would train twenty times as fast as m = 0. The loss's scale,
c and the inputs' size are in dD, and so cancel.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array, Base, Number
from nblora.layers import Layer, tree
from nblora.layers.parameters import Parameter
from nblora.layers.run import Kept, Run
from nblora.layers.sinks import Sweep

from .losses import Loss

AUTO = "auto"
SHARE = 0.01  # of the weight's norm; docs/training.md has the measurements that chose it
BATCHES = 8  # enough that one odd batch decides nothing, and a small part of an epoch


def check_delta_lr(name: str, value: Any) -> float | str | None:
    """A learning rate of deltas: a number, None for the optimiser's, or `AUTO`."""
    if isinstance(value, str) and value != AUTO:
        raise ValueError(f"{name} must be {AUTO!r}, a number, or None for the optimiser's learning rate, got {value!r}")
    return value if value is None or isinstance(value, str) else checks.check_not_negative(name, value)


def calibrate(
    model: Layer,
    loss: Loss,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    deltas: Iterable[Parameter],
    clip_norm: float | None,
) -> dict[Parameter, float]:
    """Choose the learning rate of each of the `deltas` that has a gradient on these batches; nothing is changed.

    With `clip_norm` the gradients count as they are after clipping, and those of all parameters make the norm.
    """
    states = {generator: generator.bit_generator.state for generator in tree.generators(model).values()}
    measure = _Measure(model)
    found: dict[Parameter, list[float]] = {delta: [] for delta in deltas}
    for x, y in batches:
        squares = measure(loss, x, y)
        total = math.sqrt(sum(squares.values()))
        if math.isfinite(total):  # what is not finite is the first step's to report
            factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (total + 1e-6))
            for delta, kept in found.items():
                kept.append(factor * factor * squares.get(delta, 0.0))
    for generator, state in states.items():
        generator.bit_generator.state = state
    norms = {delta: math.sqrt(sum(kept) / len(kept)) for delta, kept in found.items() if any(kept)}
    rates = {delta: SHARE * measure.reach(delta) / norm for delta, norm in norms.items()}
    return {delta: rate for delta, rate in rates.items() if math.isfinite(rate)}


class _Measure(Sweep):
    """Takes the norms of a backward's gradients; no layer's dense gradient outlives the layer's own backward."""

    def __init__(self, model: Layer) -> None:
        super().__init__(0.0, 0.0)
        self._model = model
        self._trained = {parameter for _, parameter, _ in tree.trainable(model)}
        self._squares: dict[Parameter, Number] = {}
        self._seen: dict[Parameter, tuple[Base, float]] = {}

    def __call__(self, loss: Loss, x: np.ndarray, y: np.ndarray) -> dict[Parameter, float]:
        """Go forward and back by one batch; return Σ g² of every trained parameter that has a gradient."""
        model, backend = self._model, self._model._backend
        run = Run(backend, training=True, live=False)
        run.sink = self
        self._squares.clear()
        _, grad, _ = model._learn(x, y, loss, run)
        model._backward(grad, run.back(self))
        self._settle(backend, list(self.pending))
        return dict(zip(self._squares, backend.read(list(self._squares.values())), strict=True))

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
            self._seen.update((parameter, (base, delta.scaling)) for parameter in own if parameter.velocity is not None)
        if not run.repeats(layer):
            self._settle(run.backend, own)
        return found

    def _settle(self, backend: Any, parameters: list[Parameter]) -> None:
        gradients = [self.pending.pop(parameter) for parameter in parameters]
        self._squares.update(zip(parameters, backend.sums_of_squares(gradients), strict=True))

    def reach(self, delta: Parameter) -> float:
        """The norm of the layer's weight over c: that of a D as large as the weight.

        A new layer's weight, uniform in ±1/√in, stands in for one that is zero and for a base that is no single layer.
        """
        base, scaling = self._seen[delta]
        usual = math.sqrt(math.prod(delta.shape[1:]) / 3)
        return (math.sqrt(self._model._backend.sum_of_squares(base.weight)) or usual) / scaling
