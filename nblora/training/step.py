"""One step of training: forward, loss, backward, update."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from nblora.errors import NonFiniteError
from nblora.layers import Layer
from nblora.layers.run import Run

from .calibration import calibrate
from .faults import first_fault
from .losses import Loss
from .optimizers import Optimizer
from .sinks import Trained, Training


class StepResult(NamedTuple):
    """Mean loss of the batch, its outputs, and the gradient's norm before clipping (None without clipping)."""

    loss: float
    output: np.ndarray
    grad_norm: float | None


class Step:
    """Trains `model` by one batch a call; owns the optimiser's state.

    What lies below the first trained layer gets no backward, and no input gradient is computed that nobody reads.
    """

    def __init__(
        self, model: Layer, loss: Loss, optimizer: Optimizer, delta_lr: float | str | None, clip_norm: float | None
    ) -> None:
        self.model, self.loss, self.optimizer, self.clip_norm = model, loss, optimizer, clip_norm
        self.count = 0
        if not any(model._trainable()):
            raise ValueError(
                "model has no trainable parameters: wrap its layers in adapters (model.adapt), or set "
                "layer.trainable = True"
            )
        for _, parameter, _ in model._trainable():
            parameter.gradient = None
        self._sink = Training(model, optimizer, delta_lr, clip_norm)

    @property
    def trained(self) -> list[Trained]:
        """Every parameter that the optimiser updates, in the model's order."""
        return self._sink.trained

    @property
    def delta_rates(self) -> dict[str, float]:
        """The learning rate of each delta by its name, before a schedule's factor."""
        return self._sink.named_rates

    @property
    def calibrates(self) -> bool:
        """Whether the deltas' rates are found and not given."""
        return bool(self._sink.calibrated)

    def calibrate(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Find the rates that are still to be found, from how these batches would move the layers; train nothing."""
        sink = self._sink
        waiting = [delta for delta in sink.calibrated if delta not in sink.rates]
        if waiting:
            sink.rates.update(calibrate(self.model, self.loss, batches, waiting, self.clip_norm))

    def take_delta_rates(self, rates: Mapping[str, float]) -> None:
        """Go on with rates that were found before."""
        self._sink.take_rates(rates)

    def halve_delta_rates(self) -> bool:
        """Halve the rates that were found; False where none was."""
        sink = self._sink
        found = {delta: sink.rates[delta] / 2 for delta in sink.calibrated if sink.rates.get(delta)}
        sink.rates.update(found)
        return bool(found)

    def __call__(self, x: np.ndarray, y: np.ndarray, factor: float) -> StepResult:
        """Train by one batch, every learning rate multiplied by `factor`.

        Raises
        ------
        NonFiniteError
            That names the layer and the step; the model may then be half updated.
        """
        model, backend = self.model, self.model._backend
        run = Run(backend, training=True, live=False)
        # On a GPU the batch is brought there once: output and gradients stay, the host sees the loss.
        output = model._forward(model._enter("x", x, model._as_input)[0], run)
        value, grad = self.loss.value_and_gradient(output, y, backend)
        self.count += 1
        if self._sink.sweeps or isinstance(value, float):
            (value,) = backend.read([value])
            self._require_finite(value, x)
        self._sink.begin(factor)
        model._backward(grad, run.back(self._sink))
        # A GPU's loss and sums of squares come in one copy, for which the host waits once a step.
        value, *squares = backend.read([value, *self._sink.squares()])
        self._require_finite(value, x)
        norm = self._sink.apply(self.count, squares)
        return StepResult(value, backend.to_host(output) if self.loss.metrics else output, norm)

    def _require_finite(self, loss: float, x: np.ndarray) -> None:
        if not math.isfinite(loss):
            fault = first_fault(self.model, x)
            raise NonFiniteError(f"the loss is {loss} at step {self.count}, first from {fault}")
