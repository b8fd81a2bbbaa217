"""One step of training: forward, loss, backward, update."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nblora.backends.protocol import Number
from nblora.errors import NonFiniteError
from nblora.layers import Layer
from nblora.layers.run import Run

from .calibration import Bound, calibrate
from .faults import first_fault
from .losses import Loss, Part
from .optimizers import Optimizer
from .sinks import Trained, Training


class StepResult(NamedTuple):
    """Figures of the batch, its mean loss among them, and the gradient's norm before clipping (None without)."""

    figures: dict[str, float]
    grad_norm: float | None


class Step:
    """Trains `model` by one batch a call, or by several; owns the optimiser's state.

    What lies below the first trained layer gets no backward, and no input gradient is computed that nobody reads.
    """

    def __init__(
        self,
        model: Layer,
        loss: Loss,
        optimizer: Optimizer,
        delta_lr: float | str | None,
        clip_norm: float | None,
        *,
        accumulates: bool = False,
        recompute: bool = False,
    ) -> None:
        self.model, self.loss, self.optimizer, self.clip_norm = model, loss, optimizer, clip_norm
        self.recompute, self.count = recompute, 0
        if not any(model._trainable()):
            raise ValueError(
                "model has no trainable parameters: wrap its layers in adapters (model.adapt), or set "
                "layer.trainable = True"
            )
        for _, parameter, _ in model._trainable():
            parameter.gradient = None
        self._sink = Training(model, optimizer, delta_lr, clip_norm, accumulates)

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
            found = calibrate(self.model, self.loss, batches, waiting, len(sink.calibrated), self.clip_norm)
            if found.rates:
                before = 0.0 if sink.bound is None else sink.bound.share
                sink.rates.update(found.rates)
                sink.bound = Bound(found.loss, before + found.promise)

    @property
    def delta_bound(self) -> Bound | None:
        """What holds the rates that were found."""
        return self._sink.bound

    def take_delta_rates(self, rates: Mapping[str, float], bound: Bound | None = None) -> None:
        """Go on with rates that were found before, and what holds them."""
        self._sink.take_rates(rates, bound)

    def halve_delta_rates(self) -> None:
        """Halve the rates that were found."""
        sink = self._sink
        sink.rates.update((delta, sink.rates[delta] / 2) for delta in sink.calibrated if delta in sink.rates)

    def __call__(self, batches: Sequence[tuple[Any, Any]], factor: float) -> StepResult:
        """Train by one batch, or by several whose gradients are added up, every learning rate multiplied by `factor`.

        Several count as one batch of all their samples, each by its share of what is learnt from.

        Raises
        ------
        NonFiniteError
            That names the layer and the step; the model may then be half updated.
        """
        self.count += 1
        self._sink.begin(factor)
        shares = self._shares(batches)
        gone = [self._back(x, y, share) for (x, y), share in zip(batches, shares, strict=True)]
        # A GPU's losses, figures and sums of squares come in one copy, for which the host waits once a step.
        numbers: list[Number] = []
        for figures in gone:
            numbers += figures.values()
        read = self.model._backend.read([*numbers, *self._sink.squares()])
        total: dict[str, float] = {}
        place = 0
        for (x, _), share, figures in zip(batches, shares, gone, strict=True):
            for name in figures:
                figure = read[place]
                place += 1
                if name == "loss":
                    self._require_finite(figure, x)
                total[name] = total.get(name, 0.0) + share * figure
        return StepResult(total, self._sink.apply(self.count, total["loss"], read[place:]))

    def _shares(self, batches: Sequence[tuple[Any, Any]]) -> list[float]:
        if len(batches) == 1:
            return [1.0]
        counts = [self.loss._learnt(y) for _, y in batches]
        return [count / max(1, sum(counts)) for count in counts]

    def _back(self, x: Any, y: Any, share: float) -> dict[str, Number]:
        """Forward and back by one batch that counts by `share`: its loss, and the loss's other figures."""
        model, backend = self.model, self.model._backend
        run = Run(backend, training=True, live=False)
        run.sink, run.recompute = self._sink, self.recompute
        # On a GPU the batch is brought there once: output and gradients stay, the host sees the loss.
        value, grad, figures = model._learn(x, y, self.loss if share == 1 else Part(self.loss, share), run)
        figures = {"loss": value, **figures}
        if isinstance(value, float):
            self._require_finite(value, x)
        elif self._sink.sweeps:
            figures = dict(zip(figures, backend.read([*figures.values()]), strict=True))
            self._require_finite(figures["loss"], x)
        model._backward(grad, run.back(self._sink))
        return figures

    def _require_finite(self, loss: float, x: Any) -> None:
        if not math.isfinite(loss):
            fault = first_fault(self.model, x)
            raise NonFiniteError(f"the loss is {loss} at step {self.count}, first from {fault}")
