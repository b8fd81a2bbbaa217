"""`fit`: train a model on arrays."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.errors import NonFiniteError
from nblora.layers import Layer

from .callbacks import Callback, check_callbacks
from .checkpoint import RunState, read_run, write_run
from .data import Samples, check_samples
from .history import History, Row
from .losses import Loss, as_loss
from .optimizers import as_optimizer
from .progress import Progress
from .schedules import Schedule, as_schedule
from .snapshot import Snapshot
from .step import Step, first_fault

EVALUATION_BATCH = 256  # without a backward to feed, larger batches only save calls


def fit(
    model: Layer,
    x: Any,
    y: Any,
    *,
    loss: Any,
    optimizer: Any = "adamw",
    epochs: int = 10,
    batch_size: int = 32,
    validation: tuple[Any, Any] | None = None,
    callbacks: Any = (),
    schedule: Any = None,
    clip_norm: float | None = None,
    delta_lr: float | None = None,
    shuffle: bool = True,
    seed: int | np.random.Generator | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> History:
    """Train the trainable parameters of a model, in place.

    Parameters
    ----------
    model : Layer
        A layer, an adapter or a `Sequential`. It trains in training mode and is evaluated in evaluation mode; at the
        end it is in the mode it came in.
    x : array_like of real numbers, shape (samples, ..., in_features)
        Batches are cast to the model's dtype as they are cut, so float16 and integers take no more memory than they do.
    y : array_like
        What the loss compares with: outputs for "mse", integer labels for "cross_entropy", 0 and 1 for
        "binary_cross_entropy".
    loss : {"mse", "cross_entropy", "binary_cross_entropy"} or Loss
    optimizer : {"adamw", "sgd"} or Optimizer
        A name takes the optimiser's defaults; `AdamW(lr=3e-4)` and the like set them.
    epochs : int
        Passes over the data, those before `resume` included.
    batch_size : int
        Samples of a step; the last batch of an epoch may be smaller.
    validation : tuple (x, y), optional
        Evaluated after each epoch.
    callbacks : list of Callback
        `EarlyStopping` and your own.
    schedule : {"constant", "cosine"} or Schedule, optional
        Factor on all learning rates, the delta's included, at each step.
    clip_norm : float, optional
        Scale the gradient of each step, the delta's included, so that its global norm is at most this. A norm must be
        known before the update, so this takes the unfused path, which holds dense gradients.
    delta_lr : float, optional
        Learning rate of deltas; default: the optimiser's. A delta keeps its own momentum rule, whatever the optimiser:
        V = m V + (1 - m) dD, D -= delta_lr V. Its gradient carries the factor c (`delta_scaling`) and so does its
        effect on the layer, so a step moves the layer's weight by c² delta_lr times the gradient: with c = 0.1 by a
        hundredth of what plain descent would, while AdamW's steps do not depend on the gradient's size at all. The
        learning rate that suits AdamW therefore rarely suits the delta; 1/c² times that of plain descent is a start.
    shuffle : bool
        Draw a new order of the samples for each epoch.
    seed : int or Generator, optional
        Of that order. The dropout's random state belongs to the adapters.
    progress : bool, optional
        Show a bar with the loss and samples/s; default: where standard error is a terminal.
    checkpoint : path, optional
        After each epoch, write the whole model, its frozen base included, and the run's state to this file,
        atomically. `nblora.load` reads the model from it.
    resume : path, optional
        Go on from such a file: model, optimiser, callbacks, schedule's position and random states are brought to where
        they were, and the run then equals an uninterrupted one bit for bit, given the same data and arguments. Where
        the file's run has `epochs` epochs already, nothing more is trained.

    Returns
    -------
    History
        One row an epoch.

    Raises
    ------
    NonFiniteError
        When the loss, a gradient or a parameter is not finite; the message names layer and step.
    FormatError
        For a file to resume from that is broken or of another model or optimiser.
    TypeError, ValueError
        For arguments of the wrong kind or out of range; nothing has been changed.

    Notes
    -----
    When training ends with an error or is interrupted (Ctrl-C), parameters, velocities and random states are brought
    back to the end of the last whole epoch. This takes a copy of the trained parameters and velocities: memory for
    them once more.

    Layers take the fused sweep, which never holds a dense gradient, unless `clip_norm` is set or the optimiser needs
    the dense gradient of a trained weight: AdamW, and SGD with momentum, for a layer whose own weight is trained.

    Examples
    --------
    >>> import numpy as np, nblora
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(64, 4)).astype("float32")
    >>> adapter = nblora.LoRAAdapter(nblora.Dense.random(4, 3, seed=0), rank=2, seed=0)
    >>> history = nblora.fit(adapter, x, x[:, :3], loss="mse", epochs=5, seed=0)
    >>> history["loss"][-1] < history["loss"][0]
    True
    """
    check_model(model)
    objective = as_loss(loss)
    rates = as_optimizer(optimizer)
    run = Run(
        model,
        check_samples(("x", "y"), x, y, model, objective),
        _check_validation(validation, model, objective),
        Step(
            model,
            objective,
            rates,
            None if delta_lr is None else checks.check_not_negative("delta_lr", delta_lr),
            None if clip_norm is None else checks.check_positive("clip_norm", clip_norm),
        ),
        as_schedule(schedule),
        epochs=checks.check_integer("epochs", epochs, 1),
        batch_size=checks.check_integer("batch_size", batch_size, 1),
        rng=_generator(seed) if checks.check_flag("shuffle", shuffle) else None,
        checkpoint=None if checkpoint is None else _check_target(checkpoint),
    )
    run.callbacks = check_callbacks(callbacks, run.columns())
    shown = None if progress is None else checks.check_flag("progress", progress)
    source = None if resume is None else _check_path("resume", resume)
    model._check_trainable_memory()
    return run.start(source, shown)


def evaluate(model: Layer, x: Any, y: Any, *, loss: Any, batch_size: int = EVALUATION_BATCH) -> dict[str, float]:
    """Compute a model's mean loss, and the accuracy of a classification loss, in evaluation mode.

    Parameters
    ----------
    model, x, y, loss
        As in `fit`.
    batch_size : int
        Samples computed together.

    Returns
    -------
    dict
        `{"loss": ...}` or `{"loss": ..., "accuracy": ...}`. The model's mode is left as it was.
    """
    check_model(model)
    objective = as_loss(loss)
    samples = check_samples(("x", "y"), x, y, model, objective)
    size = checks.check_integer("batch_size", batch_size, 1)
    modes = _modes(model)
    model.eval()
    try:
        return _evaluate(model, samples, objective, size)
    finally:
        _restore_modes(model, modes)


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
    ) -> None:
        self.model, self.samples, self.held_out = model, samples, held_out
        self.step, self.schedule = step, schedule
        self.epochs, self.batch_size, self.rng, self.checkpoint = epochs, batch_size, rng, checkpoint
        self.callbacks: list[Callback] = []
        self.history = History()
        self.epoch = 0

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
        if resume is not None:
            self._resume(resume)
        modes, safe = _modes(self.model), Snapshot(self.model)
        bar = Progress(shown, self.epochs, len(self.samples.x), self.epoch)
        try:
            # Overflow is looked for where it matters; NumPy's warnings would tell of it without layer or step.
            with np.errstate(over="ignore", invalid="ignore"):
                self.step.enter_training()
                self._train(safe, bar)
            for callback in self.callbacks:
                callback.on_train_end()
        except NonFiniteError as error:
            safe.restore()
            raise NonFiniteError(self._explain(error)) from error
        except BaseException:
            safe.restore()
            raise
        finally:
            bar.close()
            self.model._forget_forward()
            self.model._forget_gradients()
            _restore_modes(self.model, modes)
        return self.history

    def _resume(self, path: Path) -> None:
        state = read_run(path, self.model, self.step, self.callbacks)
        self.epoch = state.epoch
        self.history = History(state.rows)
        if self.rng is not None and state.shuffle is not None:
            self.rng.bit_generator.state = state.shuffle

    def _train(self, safe: Snapshot, bar: Progress) -> None:
        while self.epoch < self.epochs and not any(callback.stop for callback in self.callbacks):
            row = self._epoch(bar)
            safe.take()
            self.epoch += 1
            self.history.rows.append(row)
            for callback in self.callbacks:
                callback.on_epoch_end(self.epoch, row)
            if self.checkpoint is not None:
                self._write(self.checkpoint)

    def _epoch(self, bar: Progress) -> Row:
        """Train one pass over the samples, validate, and return the epoch's row."""
        count = len(self.samples.x)
        order = None if self.rng is None else self.rng.permutation(count)
        per_epoch = -(-count // self.batch_size)
        total = {"loss": 0.0, **dict.fromkeys(self.step.loss.metrics, 0.0)}
        norms, factor = 0.0, 1.0
        started = time.perf_counter()
        for x, y in self.samples.batches(self.batch_size, order):
            factor = self.schedule.factor(self.step.count, self.epochs * per_epoch)
            checks.check_not_negative("the schedule's factor", factor)
            result = self.step(x, y, factor)
            figures = {"loss": result.loss, **self.step.loss.measure(result.output, y)}
            for name, value in figures.items():
                total[name] += value * len(x)
            norms += result.grad_norm or 0.0
            for callback in self.callbacks:
                callback.on_step_end(self.step.count, figures)
            bar.advance(self.epoch + 1, len(x), result.loss)
        seconds = time.perf_counter() - started
        self.step.check_parameters()
        row: Row = {"epoch": self.epoch + 1, "step": self.step.count}
        row.update({name: value / count for name, value in total.items()})
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
        figures = _evaluate(self.model, self.held_out, self.step.loss, size)
        if not np.isfinite(figures["loss"]):
            raise NonFiniteError(
                f"the validation loss is {figures['loss']} after step {self.step.count}, "
                f"first from {self._fault(self.held_out, size)}"
            )
        self.step.enter_training()
        return {f"val_{name}": value for name, value in figures.items()}

    def _fault(self, samples: Samples, batch_size: int) -> str:
        batches = [x for x, _ in samples.batches(batch_size)]
        faulty = (x for x in batches if not np.isfinite(self.model.forward(x)).all())
        return first_fault(self.model, next(faulty, batches[0]))

    def _write(self, path: Path) -> None:
        shuffle = None if self.rng is None else dict(self.rng.bit_generator.state)
        state = RunState(self.epoch, self.step.count, shuffle, self.history.rows)
        write_run(path, self.model, self.step, self.callbacks, state)

    def _explain(self, error: NonFiniteError) -> str:
        where = f"the end of epoch {self.epoch}" if self.epoch else "where it was before training"
        return (
            f"{error} (epoch {self.epoch + 1}); the model is back at {where}. Lower the learning rate or delta_lr, "
            "warm up, or set clip_norm"
        )


def check_model(model: Any) -> None:
    """TypeError for what is no layer, RuntimeError for a closed one."""
    if not isinstance(model, Layer):
        got = "None" if model is None else f"an object of type {type(model).__name__}"
        raise TypeError(f"model must be a layer, an adapter or a Sequential, got {got}")
    model._require_open()


def _check_validation(validation: Any, model: Layer, loss: Loss) -> Samples | None:
    if validation is None:
        return None
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise TypeError(f"validation must be a pair (x, y), got an object of type {type(validation).__name__}")
    x, y = validation
    return check_samples(("validation x", "validation y"), x, y, model, loss)


def _generator(seed: Any) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):  # a child of known kind, whose state a checkpoint can hold
        return np.random.default_rng(int(seed.integers(2**63)))
    if seed is not None:
        seed = checks.check_integer("seed", seed, 0)
    return np.random.default_rng(seed)


def _check_path(name: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {path!r}")
    return Path(os.fspath(path))


def _check_target(path: Any) -> Path:
    target = _check_path("checkpoint", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"checkpoint: the folder {str(target.parent)!r} does not exist")
    return target


def _evaluate(model: Layer, samples: Samples, loss: Loss, batch_size: int) -> dict[str, float]:
    total = {"loss": 0.0, **dict.fromkeys(loss.metrics, 0.0)}
    for x, y in samples.batches(batch_size):
        output = model.forward(x)
        total["loss"] += len(x) * loss.value_and_gradient(output, y, model._backend)[0]
        for name, value in loss.measure(output, y).items():
            total[name] += len(x) * value
    return {name: value / len(samples.x) for name, value in total.items()}


def _modes(model: Layer) -> list[tuple[Layer, bool]]:
    return [(model, model.training), *((layer, layer.training) for _, layer in model._sequence())]


def _restore_modes(model: Layer, modes: list[tuple[Layer, bool]]) -> None:
    for layer, training in modes:
        layer.train() if training else layer.eval()
