"""`Training`: the sink of `fit`, which updates a model by one batch's gradients, all at once or on the way back."""

import math
from collections.abc import Mapping
from typing import Any

from nblora.backends.protocol import Array, Backend, Number, Operands
from nblora.layers import Layer, tree
from nblora.layers.parameters import Parameter
from nblora.layers.run import Run
from nblora.layers.sinks import Sweep, descend, tell

from .calibration import Bound
from .faults import faulty_gradient
from .optimizers import Optimizer


class Trained:
    """A parameter that the optimiser updates: its name, its state, and the ratio of its learning rate."""

    def __init__(self, name: str, parameter: Parameter, optimizer: Optimizer, backend: Backend) -> None:
        self.name, self.parameter = name, parameter
        self.slots = tuple(backend.zeros_like(parameter.array) for _ in optimizer.slots)
        self.ratio = (optimizer.lora_plus_ratio or 1.0) if parameter.plus else 1.0


class Training(Sweep):
    """Moves trained parameters by the optimiser's rule, deltas by their velocity.

    The sweep over a layer's weights updates them on its way, so that no dense gradient is ever held, unless the
    gradients' norm must be known first, those of several batches are added up, or the optimiser wants to see the
    gradient of a weight.

    Attributes
    ----------
    rates : dict of Parameter to float
        The learning rate of each delta, before a schedule's factor. One that is to be calibrated rests until then.
    calibrated : list of Parameter
        The deltas whose rate is found and not given.
    bound : Bound or None
        What holds their rates, once they are found.
    """

    bound: Bound | None = None

    def __init__(
        self,
        model: Layer,
        optimizer: Optimizer,
        delta_lr: float | str | None,
        clip_norm: float | None,
        accumulates: bool = False,
    ) -> None:
        super().__init__(optimizer.lr, 0.0)
        self._holds = accumulates or clip_norm is not None  # gradients, until all of them are known
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self._factor = 1.0
        self._model, self._backend = model, model._backend
        self._seen: list[Parameter] = []
        self._late = False  # whether velocities are yet to be moved after the backward
        self._names = {parameter: name for name, parameter, _ in tree.trainable(model)}
        deltas = [parameter for parameter in self._names if parameter.velocity is not None]
        self.calibrated = deltas if isinstance(delta_lr, str) else []
        self.rates: dict[Parameter, float] = {}
        if not isinstance(delta_lr, str):
            self.rates = dict.fromkeys(deltas, optimizer.lr if delta_lr is None else delta_lr)
        self.trained = [
            Trained(name, parameter, optimizer, model._backend)
            for parameter, name in self._names.items()
            if parameter.velocity is None
        ]

    def fuses(self, operands: Operands) -> bool:
        return not self._holds and (self.optimizer.plain or not operands.train_base)

    def put(self, parameter: Parameter, gradient: Array, run: Run) -> None:
        if parameter in self._names:  # not of factors whose own layer is not to be trained
            super().put(parameter, gradient, run)

    @property
    def named_rates(self) -> dict[str, float]:
        """`rates` by the deltas' names."""
        return {self._names[delta]: rate for delta, rate in self.rates.items()}

    def take_rates(self, rates: Mapping[str, float], bound: Bound | None) -> None:
        """Go on with rates that were found before, by the deltas' names, and what holds them."""
        self.bound = bound if self.calibrated else None
        self.rates.update((delta, rates[name]) for delta in self.calibrated if (name := self._names[delta]) in rates)

    def rate_of_delta(self, layer: Any) -> float:
        return next((self._rate(parameter) for _, parameter in layer._targets() if parameter.velocity is not None), 0.0)

    def _rate(self, delta: Parameter) -> float:
        return self._factor * self.rates.get(delta, 0.0)

    def begin(self, factor: float) -> None:
        """Before a backward: every learning rate times `factor`."""
        self._factor, self.lr = factor, factor * self.optimizer.lr
        self.pending.clear()

    @property
    def sweeps(self) -> bool:
        """Whether a backward changes parameters on its way, so that a fault must be known before it."""
        plain = self.optimizer.plain
        return not self._holds and any(p.velocity is not None or (plain and p.dense) for p in self._names)

    def squares(self) -> list[Number]:
        """After a backward: Σ g² of the gradients that are looked at, for `apply`, to be read with the loss.

        A dense weight's is looked at only for the norm: a fault in it shows in its low-rank part, its bias or the next
        loss, and looking through it costs as much as its update.
        """
        self._seen = [p for p in self.pending if self.clip_norm is not None or not (p.dense or p.velocity)]
        arrays = [self.pending[parameter] for parameter in self._seen]
        self._late = any(delta in self.pending for delta in self.rates)
        if self.bound is not None and not self._late:
            arrays += self._velocities()
        return self._backend.sums_of_squares(arrays)

    def _velocities(self) -> list[Array]:
        """Of the deltas whose rates were found, in the order of the rates."""
        return [delta.velocity.array for delta in self.rates if delta.velocity is not None]

    def apply(self, step: int, loss: float, squares: list[float]) -> float | None:
        """Clip the gradients that the backward left, use them, and return their norm before (None without clipping).

        Raises
        ------
        NonFiniteError
            For a gradient that is not finite.
        """
        for parameter, square in zip(self._seen, squares, strict=False):
            if not math.isfinite(square):
                raise faulty_gradient(self._model, self._names[parameter], step)
        seen = len(self._seen)
        norm = None if self.clip_norm is None else self._clip(math.sqrt(sum(squares[:seen])), self.clip_norm)
        for trained in self.trained:
            gradient = self.pending.get(trained.parameter)
            if gradient is not None:
                array, rate = trained.parameter.array, trained.ratio * self.lr
                self.optimizer.update(self._backend, array, gradient, trained.slots, rate, step)
        for parameter, gradient in self.pending.items():
            if parameter.velocity is not None:
                descend(self._backend, parameter, gradient, self.lr, self._rate(parameter))
        tell(self._names)
        if self.bound is not None:
            backend = self._backend
            moved = backend.read(backend.sums_of_squares(self._velocities())) if self._late else squares[seen:]
            self.bound = self._held_rates(self.bound.after(loss), moved)
        return norm

    def _held_rates(self, bound: Bound, squares: list[float]) -> Bound:
        """Lower all rates that were found where steps of velocities with these Σ V² promise too much."""
        promised = sum(self._rate(delta) * square for delta, square in zip(self.rates, squares, strict=True))
        factor = bound.factor(promised)
        if factor < 1:
            self.rates = {delta: factor * rate for delta, rate in self.rates.items()}
        return bound

    def _clip(self, norm: float, most: float) -> float:
        """Scale all gradients so that their global norm is at most `most`, as `torch.nn.utils.clip_grad_norm_`."""
        factor = most / (norm + 1e-6)
        if factor < 1:
            for gradient in self.pending.values():
                self._backend.scale(gradient, factor)
        return norm
