"""`Run`: the loop behind `fit`: epochs, in stretches from one evaluation, or saving, to the next."""

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
from nblora.errors import FormatError, NonFiniteError
from nblora.layers import Layer, tree
from nblora.layers.run import Run as LayerRun
from nblora.layers.saving import digests

from .calibration import BATCHES
from .callbacks import Callback
from .checkpoint import RunState, read_run, write_run
from .data import Samples, counted
from .faults import check_parameters, first_fault
from .history import History, Row, tally
from .losses import Loss
from .progress import Progress
from .schedules import Schedule
from .snapshot import AtEnd, Snapshot
from .step import Step

HALVINGS = 12  # of the deltas' rates, to a four-thousandth: a fault that is still there has another cause
GROWN = 100  # times its first loss is a run whose weights run away, and cannot be brought back from where they soon are
_TIMES = ("seconds", "samples_per_second", "tokens_per_second")
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
        steps: int | None = None,
        eval_every: int | None = None,
        save_every: int | None = None,
    ) -> None:
        self.model, self.samples, self.held_out = model, samples, held_out
        self.step, self.schedule = step, schedule
        self.batch_size, self.rng, self.checkpoint = batch_size, rng, checkpoint
        self.accumulate, self.grouped = accumulate, grouped
        self.eval_every, self.save_every = eval_every, save_every
        self.per_epoch = -(-len(samples.x) // (batch_size * accumulate))
        self.epochs = epochs if steps is None else -(-steps // self.per_epoch)
        self.steps = epochs * self.per_epoch if steps is None else steps
        self.limit = steps
        self.callbacks: list[Callback] = []
        self.history = History()
        self.epoch, self.within = 0, 0  # whole epochs, and updates of the one that is not whole
        self._order: np.ndarray | None = None
        self._drawn_from: dict[str, Any] | None = None
        self._sums: dict[str, float] = {}
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
        return [*names, *_TIMES[: 3 if self.samples.of_texts else 2]]

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
                contextlib.closing(Progress(shown, self._amount(self.steps), self.samples.unit)) as bar,
                np.errstate(over="ignore", invalid="ignore"),
            ):
                self.model.train()
                self._train(safe, bar)
                for callback in self.callbacks:
                    callback.on_train_end()
        except NonFiniteError as error:
            raise NonFiniteError(self._explain(error)) from error

    def _amount(self, steps: int) -> float:
        """Samples, or tokens, of so many updates: what the bar counts."""
        return self.samples.size / self.per_epoch * steps

    def _resume(self, path: Path) -> None:
        state = read_run(path, self.model, self.step, self.callbacks)
        self.epoch, self.within = state.epoch, state.within
        self._first_loss, self._sums = state.first_loss, dict(state.sums)
        columns = self.columns()  # in this order, which a file does not keep
        rows = [{name: row[name] for name in columns if name in row} | row for row in state.rows]
        self.history = History(rows, self.step.delta_rates)
        if self.rng is not None and state.shuffle is not None:
            self.rng.bit_generator.state = state.shuffle
        if self.within:
            if self.within >= self.per_epoch:
                raise FormatError(
                    f"{path}: the run has made {self.within} updates of an epoch, and here it has {self.per_epoch}: "
                    "go on with the same data and settings"
                )
            self._draw_order()

    def _is_over(self) -> bool:
        over = self.epoch >= self.epochs or (self.limit is not None and self.step.count >= self.limit)
        return over or any(callback.stop for callback in self.callbacks)

    def _train(self, safe: Snapshot, bar: Progress) -> None:
        bar.restart(self._amount(self.step.count))
        again = self._restart_point()
        while not self._is_over():
            if not self.within:
                self._draw_order()
                if self.step.calibrates:
                    batches = self.samples.batches(self.batch_size, self._order)
                    self.step.calibrate(itertools.islice(batches, BATCHES))
                    again.update(self._rates())
            row = self._whole_stretch(safe, bar, again)
            if self.within == self.per_epoch:
                self.epoch, self.within = self.epoch + 1, 0
            if not (self.within and self.step.calibrates):
                safe.take()
            self.history.delta_lr = self.step.delta_rates
            if row is not None:
                self._sums = {}
                self.history.rows.append(row)
                for callback in self.callbacks:
                    callback.on_epoch_end(len(self.history), row)
            if not (self.within and self.step.calibrates):
                again = self._restart_point()
            if self.checkpoint is not None and self._is_due(None if self.step.calibrates else self.save_every):
                self._write(self.checkpoint)

    def _restart_point(self) -> dict[str, Any]:
        """Where to start again from, beside the model's own state: the present point of the run."""
        states = [callback.state_dict() for callback in self.callbacks] if self.step.calibrates else []
        place = {"count": self.step.count, "within": self.within, "sums": dict(self._sums)}
        return {**place, **self._rates(), "rows": len(self.history), "callbacks": states}

    def _rates(self) -> dict[str, Any]:
        return {"rates": self.step.delta_rates, "bound": self.step.delta_bound}

    def _go_back(self, point: dict[str, Any], safe: Snapshot, bar: Progress) -> None:
        """Bring the run to this point, with half of the rates that were found for deltas."""
        safe.restore()
        self.step.count, self.within, self._sums = point["count"], point["within"], dict(point["sums"])
        self.step.take_delta_rates(point["rates"], point["bound"])
        self.step.halve_delta_rates()
        point.update(self._rates())
        del self.history.rows[point["rows"] :]
        for callback, state in zip(self.callbacks, point["callbacks"], strict=True):
            callback.load_state_dict(state)
        self.model.train()
        bar.restart(self._amount(self.step.count))

    def _draw_order(self) -> None:
        """The order of an epoch's samples."""
        self._drawn_from = None if self.rng is None else dict(self.rng.bit_generator.state)
        self._order = None if self.rng is None else self.rng.permutation(len(self.samples.x))
        if self.grouped:
            self._order = self.samples.by_length(self._order, self.batch_size, self.rng)

    def _stretch_end(self) -> int:
        """The updates of this epoch after which to evaluate, to save, or to end."""
        count, found = self.step.count, self.per_epoch - self.within
        if self.limit is not None:
            found = min(found, self.limit - count)
        for every in (self.eval_every, None if self.step.calibrates else self.save_every):
            if every is not None:
                found = min(found, every - count % every)
        return self.within + found

    def _is_due(self, every: int | None) -> bool:
        """Whether now, between two updates, is what comes after each epoch, or so many updates; at the end it is."""
        whole = self.within in (0, self.per_epoch)
        if self._is_over() or (whole and self.epoch + (self.within > 0) >= self.epochs):
            return True
        return whole if every is None else self.step.count % every == 0

    def _whole_stretch(self, safe: Snapshot, bar: Progress, again: dict[str, Any]) -> Row | None:
        """An epoch, or a part of it; one that runs away starts again with half of the rates that were found for deltas.

        Returns the row of the history that ends with it, if one does.
        """
        halvings, fault = 0, ""
        while True:
            try:
                row = self._stretch(bar)
            except NonFiniteError as error:
                # What comes before the first update is no fault of the rates, and would come again.
                found = self.step.calibrates and any(again["rates"].values())
                if not self._moved or halvings == HALVINGS or not found:
                    self.within = again["within"]
                    raise
                fault = str(error)
            else:
                self._tell(fault, halvings)
                return row
            halvings += 1
            if halvings == HALVINGS:
                self._first_loss = math.inf  # a loss that grows for another reason may do so, as in any run
            self._go_back(again, safe, bar)

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

    def _stretch(self, bar: Progress) -> Row | None:
        """Train to where the next row or file is due, and return the row, if it is one."""
        end, sums = self._stretch_end(), self._sums
        self._moved = self.within > 0
        started = time.perf_counter()
        first = self.within * self.accumulate * self.batch_size
        several = _several(self.samples.batches(self.batch_size, self._order, first), self.accumulate)
        for batches in itertools.islice(several, end - self.within):
            self._update(batches, sums, bar)
        sums["seconds"] = sums.get("seconds", 0.0) + time.perf_counter() - started
        self.within = end
        check_parameters(self.model, self.step.count)
        if self.step.calibrates:
            mean = sums["loss"] / max(1, sums["learnt"])
            self._check_growth(mean, Samples(*batches[-1]))
        return self._row(sums) if self._is_due(self.eval_every) else None

    def _update(self, batches: list[Any], sums: dict[str, float], bar: Progress) -> None:
        """One update, which counts among the sums of the row."""
        factor = self.schedule.factor(self.step.count, self.steps)
        checks.check_not_negative("the schedule's factor", factor)
        figures, norm = self.step(batches, factor)
        self._moved = True
        if math.isnan(self._first_loss):
            self._first_loss = figures["loss"] if figures["loss"] > 0 else math.inf
        counts = counted(batches, self.step.loss)
        tally(sums, figures, counts, norm or 0.0, factor)
        for callback in self.callbacks:
            callback.on_step_end(self.step.count, figures)
        where = f"epoch {self.epoch + 1}/{self.epochs}" if self.limit is None else f"{self.step.count}/{self.limit}"
        bar.advance(where, counts["size"], figures["loss"])

    def _row(self, sums: dict[str, float]) -> Row:
        row: Row = {"epoch": self.epoch + 1, "step": self.step.count}
        row.update({name: sums[name] / max(1, sums["learnt"]) for name in ("loss", *self.step.loss.metrics)})
        row.update(self._validate())
        row["lr"] = sums["factor"] * self.step.optimizer.lr
        if self.step.clip_norm is not None:
            row["grad_norm"] = sums["norms"] / sums["updates"]
        seconds = max(sums["seconds"], 1e-9)  # some clocks tick slower than a small epoch
        row.update(zip(_TIMES, (sums["seconds"], sums["samples"] / seconds), strict=False))
        if self.samples.of_texts:
            row["tokens_per_second"] = sums["size"] / seconds
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
        if self._frozen is None:
            self._frozen = digests(self.model)
        shuffle = None if self.rng is None else dict(self.rng.bit_generator.state)
        state = RunState(
            self.epoch,
            self.step.count,
            self._drawn_from if self.within else shuffle,
            self.history.rows,
            self._frozen,
            self._first_loss,
            self.within,
            self._sums,
        )
        write_run(path, self.model, self.step, self.callbacks, state)

    def _explain(self, error: NonFiniteError) -> str:
        where = f"the end of epoch {self.epoch}" if self.epoch else "where it was before training"
        if self.within:
            where = f"update {self.within} of epoch {self.epoch + 1}"
        return (
            f"{error} (epoch {self.epoch + 1}); the model is back at {where}. Lower the learning rate or delta_lr, "
            "warm up, or set clip_norm"
        )


def mean_figures(model: Layer, samples: Samples, loss: Loss, batch_size: int) -> dict[str, float]:
    """Mean loss and metrics over the samples, in the mode that the model is in."""
    total, learnt = {"loss": 0.0, **dict.fromkeys(loss.metrics, 0.0)}, 0
    for x, y in samples.batches(batch_size):
        value, _, figures = model._learn(x, y, loss, LayerRun(model._backend))
        count = loss._learnt(y)
        learnt += count
        for name, figure in zip(("loss", *figures), model._backend.read([value, *figures.values()]), strict=True):
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
