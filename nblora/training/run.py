"""`Run`: the loop of epochs behind `fit`."""

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.errors import NonFiniteError
from nblora.layers import Layer, tree
from nblora.layers.run import Run as LayerRun
from nblora.layers.saving import digests

from .calibration import BATCHES
from .callbacks import Callback
from .checkpoint import RunState, read_run, write_run
from .data import Samples
from .faults import check_parameters, first_fault
from .history import History, Row
from .losses import Loss
from .progress import Progress
from .schedules import Schedule
from .snapshot import AtEnd, Snapshot
from .step import Step

HALVINGS = 12  # of the deltas' rates, to a four-thousandth: a fault that is still there has another cause
GROWN = 100  # times its first loss is a run whose weights run away, and cannot be brought back from where they soon are
EVALUATION_BATCH = 256  # without a backward to feed, larger batches only save calls


class Run:
    """One run of `fit`, its arguments checked."""

    def __init__(
        self,
        model: Layer,
        samples: Samples,
        held_out: Samples | None,
        step: Step,
        schedule: Schedule,
        *,
        epochs: int,
        batch_size: int,
        rng: np.random.Generator | None,
        checkpoint: Path | None,
        accumulate: int = 1,
        grouped: bool = False,
    ) -> None:
        self.model, self.samples, self.held_out = model, samples, held_out
        self.step, self.schedule = step, schedule
        self.epochs, self.batch_size, self.rng, self.checkpoint = epochs, batch_size, rng, checkpoint
        self.accumulate, self.grouped = accumulate, grouped
        self.callbacks: list[Callback] = []
        self.history = History()
        self.epoch = 0
        self._frozen: dict[str, str] | None = None
        self._first_loss = math.nan
        self._moved = self._warned = False

    def columns(self) -> list[str]:
        """The history's columns, as they will be."""
        metrics = ["loss", *self.step.loss.metrics]
        names = ["epoch", "step", *metrics]
        if self.held_out is not None:
            names += [f"val_{name}" for name in metrics]
        names += ["lr"] if self.step.clip_norm is None else ["lr", "grad_norm"]
        return [*names, "seconds", "samples_per_second"]

    def start(self, resume: Path | None, shown: bool | None) -> History:
        """Train to the last epoch; whatever goes wrong, leave a whole model."""
        for callback in self.callbacks:
            callback.model, callback.stop = self.model, False
            callback.on_train_begin()
        # What the optimiser remembers is needed where an epoch may start again; elsewhere a fault ends the run.
        slots = [slot for trained in self.step.trained for slot in trained.slots] if self.step.calibrates else []
        modes, safe = tree.modes(self.model), Snapshot(self.model, slots)
        back = AtEnd(safe.restore, failed=True)
        tidy = AtEnd(self.model._forget_forward, lambda: restore_modes(modes))
        lending = self.model._backend.lending()
        with lending, tidy, tidy, back, back:  # twice each: see AtEnd
            if resume is not None:
                self._resume(resume)
                safe.take()
            self._train_reporting(safe, shown)
        return self.history

    def _train_reporting(self, safe: Snapshot, shown: bool | None) -> None:
        """Train with a bar, and say in a message of what is not finite where the model will be back."""
        try:
            # Overflow is looked for where it matters; NumPy's warnings would tell of it without layer or step.
            with (
                contextlib.closing(Progress(shown, self.epochs, len(self.samples.x), self.epoch)) as bar,
                np.errstate(over="ignore", invalid="ignore"),
            ):
                self.model.train()
                self._train(safe, bar)
                for callback in self.callbacks:
                    callback.on_train_end()
        except NonFiniteError as error:
            raise NonFiniteError(self._explain(error)) from error

    def _resume(self, path: Path) -> None:
        state = read_run(path, self.model, self.step, self.callbacks)
        self.epoch = state.epoch
        self._first_loss = state.first_loss
        self.history = History(state.rows, self.step.delta_rates)
        if self.rng is not None and state.shuffle is not None:
            self.rng.bit_generator.state = state.shuffle

    def _train(self, safe: Snapshot, bar: Progress) -> None:
        while self.epoch < self.epochs and not any(callback.stop for callback in self.callbacks):
            row = self._whole_epoch(safe, bar)
            safe.take()
            self.epoch += 1
            self.history.rows.append(row)
            self.history.delta_lr = self.step.delta_rates
            for callback in self.callbacks:
                callback.on_epoch_end(self.epoch, row)
            if self.checkpoint is not None:
                self._write(self.checkpoint)

    def _whole_epoch(self, safe: Snapshot, bar: Progress) -> Row:
        """An epoch; one that runs away starts again with half of the deltas' rates, where they were found."""
        begun, halvings, fault = self.step.count, 0, ""
        order = None if self.rng is None else self.rng.permutation(len(self.samples.x))
        if self.grouped:
            order = self.samples.by_length(order, self.batch_size, self.rng)
        if self.step.calibrates:
            self.step.calibrate(itertools.islice(self.samples.batches(self.batch_size, order), BATCHES))
        while True:
            try:
                row = self._epoch(order, bar)
            except NonFiniteError as error:
                # What comes before the epoch's first update is no fault of the rates, and would come again.
                if not self._moved or halvings == HALVINGS or not self.step.halve_delta_rates():
                    raise
                fault = str(error)
            else:
                self._tell(fault, halvings)
                return row
            halvings += 1
            if halvings == HALVINGS:
                self._first_loss = math.inf  # a loss that grows for another reason may do so, as in any run
            safe.restore()
            self.step.count = begun
            self.model.train()
            bar.restart(self.epoch)

    def _check_growth(self, mean: float, last: Samples) -> None:
        """NonFiniteError where the rates that were found let the run go: soon no epoch would bring it back.

        The last batch is looked at again, since nobody has yet seen what the last update did.
        """
        self.model.eval()
        after = mean_figures(self.model, last, self.step.loss, self.batch_size)["loss"]
        self.model.train()
        if not math.isfinite(after) or max(mean, after) > GROWN * self._first_loss:
            raise NonFiniteError(
                f"the loss has grown from {self._first_loss:.3g} to {max(mean, after):.3g} after step {self.step.count}"
            )

    def _tell(self, fault: str, halvings: int) -> None:
        if halvings and not self._warned:
            rates = ", ".join(f"{name} {rate:.3g}" for name, rate in self.step.delta_rates.items())
            warnings.warn(
                f"{fault} (epoch {self.epoch + 1}); the epoch was trained again with the deltas' learning rates "
                f"divided by {2**halvings}, to {rates}; from here on without a warning. delta_lr sets it by hand",
                RuntimeWarning,
                stacklevel=6,
            )
            self._warned = True

    def _epoch(self, order: np.ndarray | None, bar: Progress) -> Row:
        """Train one pass over the samples, validate, and return the epoch's row."""
        count, loss = len(self.samples.x), self.step.loss
        per_epoch = -(-count // (self.batch_size * self.accumulate))
        self._moved = False
        total = {"loss": 0.0, **dict.fromkeys(loss.metrics, 0.0)}
        norms, factor, learnt = 0.0, 1.0, 0
        started = time.perf_counter()
        for batches in _several(self.samples.batches(self.batch_size, order), self.accumulate):
            factor = self.schedule.factor(self.step.count, self.epochs * per_epoch)
            checks.check_not_negative("the schedule's factor", factor)
            figures, norm = self.step(batches, factor)
            self._moved = True
            if math.isnan(self._first_loss):
                self._first_loss = figures["loss"] if figures["loss"] > 0 else math.inf
            weight = sum(loss._learnt(y) for _, y in batches)
            for name, value in figures.items():
                total[name] += value * weight
            learnt += weight
            norms += norm or 0.0
            for callback in self.callbacks:
                callback.on_step_end(self.step.count, figures)
            bar.advance(self.epoch + 1, sum(len(x) for x, _ in batches), figures["loss"])
        seconds = time.perf_counter() - started
        check_parameters(self.model, self.step.count)
        if self.step.calibrates:
            self._check_growth(total["loss"] / max(1, learnt), Samples(*batches[-1]))
        row: Row = {"epoch": self.epoch + 1, "step": self.step.count}
        row.update({name: value / max(1, learnt) for name, value in total.items()})
        row.update(self._validate())
        row["lr"] = factor * self.step.optimizer.lr
        if self.step.clip_norm is not None:
            row["grad_norm"] = norms / per_epoch
        row["seconds"] = seconds
        row["samples_per_second"] = count / max(seconds, 1e-9)  # some clocks tick slower than a small epoch
        return row

    def _validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        self.model.eval()
        size = max(self.batch_size, EVALUATION_BATCH)
        figures = mean_figures(self.model, self.held_out, self.step.loss, size)
        if not np.isfinite(figures["loss"]):
            raise NonFiniteError(
                f"the validation loss is {figures['loss']} after step {self.step.count}, "
                f"first from {self._fault(self.held_out, size)}"
            )
        self.model.train()
        return {f"val_{name}": value for name, value in figures.items()}

    def _fault(self, samples: Samples, batch_size: int) -> str:
        batches = [x for x, _ in samples.batches(batch_size)]
        faulty = (x for x in batches if not np.isfinite(self.model.forward(x)).all())
        return first_fault(self.model, next(faulty, batches[0]))

    def _write(self, path: Path) -> None:
        shuffle = None if self.rng is None else dict(self.rng.bit_generator.state)
        if self._frozen is None:
            self._frozen = digests(self.model)
        state = RunState(self.epoch, self.step.count, shuffle, self.history.rows, self._frozen, self._first_loss)
        write_run(path, self.model, self.step, self.callbacks, state)

    def _explain(self, error: NonFiniteError) -> str:
        where = f"the end of epoch {self.epoch}" if self.epoch else "where it was before training"
        return (
            f"{error} (epoch {self.epoch + 1}); the model is back at {where}. Lower the learning rate or delta_lr, "
            "warm up, or set clip_norm"
        )


def mean_figures(model: Layer, samples: Samples, loss: Loss, batch_size: int) -> dict[str, float]:
    """Mean loss and metrics over the samples, in the mode that the model is in."""
    total, learnt = {"loss": 0.0, **dict.fromkeys(loss.metrics, 0.0)}, 0
    for x, y in samples.batches(batch_size):
        value, _, measure = model._learn(x, y, loss, LayerRun(model._backend))
        count = loss._learnt(y)
        learnt += count
        for name, figure in {"loss": model._backend.read([value])[0], **measure()}.items():
            total[name] += count * figure
    return {name: value / max(1, learnt) for name, value in total.items()}


def _several(batches: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Lists of so many batches; the last may be shorter."""
    remaining = iter(batches)
    while several := list(itertools.islice(remaining, count)):
        yield several


def restore_modes(modes: list[tuple[Layer, bool]]) -> None:
    """Bring back what `tree.modes` found."""
    for layer, training in modes:
        layer._training = training
