"""Callbacks: what looks on while a model trains, and may end it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from nblora import checks
from nblora.layers import Layer

from .snapshot import Snapshot


class Callback:
    """Base of callbacks; override what you need.

    Attributes
    ----------
    model : Layer
        The model in training, set before the first call.
    stop : bool
        Set it to True to end training after the present epoch (the present `eval_every` updates).
    """

    model: Layer
    stop: bool = False

    def monitored(self) -> tuple[str, ...]:
        """Names of the history's columns that the callback needs; `fit` refuses to start without them."""
        return ()

    def on_train_begin(self) -> None:
        """Act before the first epoch, and before a checkpoint's state is loaded."""

    def on_step_end(self, step: int, logs: dict[str, float]) -> None:
        """Act after an update; `step` counts from 1 over the run, `logs` holds the batch's loss."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Act after an epoch, counted from 1; `logs` is its row of the history.

        With `fit(eval_every=...)` it is called after each so many updates, counted from 1 too.
        """

    def on_train_end(self) -> None:
        """Act after the last epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep: JSON values, and arrays."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; KeyError, TypeError or ValueError for anything else."""


class EarlyStopping(Callback):
    """End training when a figure has stopped getting better.

    Parameters
    ----------
    monitor : str
        A column of the history.
    patience : int or None
        Epochs without improvement after which training ends; at least 1. None never ends it, and keeps the best.
    min_delta : float
        What counts as an improvement: more than this.
    mode : {"auto", "min", "max"}
        Whether less or more is better; "auto" takes "max" for accuracies, else "min".
    restore_best : bool
        Bring the model back to the parameters of its best epoch when training ends, early or not. They are copied at
        every improvement, which takes the memory of the trained parameters once more.

    Attributes
    ----------
    best : float or None
        Best value so far.
    best_epoch : int
        Its epoch, counted from 1; 0 before the first.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        patience: int | None = 3,
        min_delta: float = 0.0,
        mode: str = "auto",
        restore_best: bool = False,
    ) -> None:
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a column of the history, got {monitor!r}")
        self.monitor = monitor
        self.patience = math.inf if patience is None else checks.check_integer("patience", patience, 1)
        self.min_delta = checks.check_not_negative("min_delta", min_delta)
        self.mode = checks.check_choice("mode", mode, ("auto", "min", "max"))
        self.restore_best = checks.check_flag("restore_best", restore_best)
        self._sign = 1 if self.mode == "max" or (self.mode == "auto" and "accuracy" in monitor) else -1
        self._forget()

    def _forget(self) -> None:
        self.stop, self.best, self.best_epoch, self.waited = False, None, 0, 0
        self._snapshot: Snapshot | None = None

    best: float | None
    waited: int

    def monitored(self) -> tuple[str, ...]:
        return (self.monitor,)

    def on_train_begin(self) -> None:
        self._forget()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        value = logs[self.monitor]
        if self.best is None or self._sign * (value - self.best) > self.min_delta:
            self.best, self.best_epoch, self.waited = value, epoch, 0
            if self.restore_best:
                self._snapshot = Snapshot(self.model)
        else:
            self.waited += 1
        self.stop = self.waited >= self.patience

    def on_train_end(self) -> None:
        if self._snapshot is not None:
            self._snapshot.restore_arrays()
            self._snapshot = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"best": self.best, "best_epoch": self.best_epoch, "waited": self.waited}
        if self._snapshot is not None:
            fetch = self.model._backend.to_host
            state.update({f"best.{name}": fetch(array) for name, array in self._snapshot.arrays.items()})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best = state["best"]
        if best is not None and not math.isfinite(checks.check_number("best", best)):
            raise ValueError(f"best must be finite, got {best}")
        best_epoch = checks.check_integer("best_epoch", state["best_epoch"], 0)
        waited = checks.check_integer("waited", state["waited"], 0)
        snapshot = None
        if self.restore_best and best is not None:
            snapshot = Snapshot(self.model)
            for name, array in snapshot.arrays.items():
                kept = state[f"best.{name}"]
                if not isinstance(kept, np.ndarray) or (kept.shape, kept.dtype) != (array.shape, array.dtype):
                    raise ValueError(f"best.{name} must be {array.dtype} of shape {array.shape}")
                array[...] = kept
        self.best, self.best_epoch, self.waited, self._snapshot = best, best_epoch, waited, snapshot
        self.stop = waited >= self.patience


def check_callbacks(callbacks: Any, columns: list[str]) -> list[Callback]:
    """Return the callbacks as a list, once they are known to find what they monitor among `columns`."""
    if isinstance(callbacks, Callback):
        callbacks = (callbacks,)
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks must be a list of Callback objects, got {callbacks!r}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks must hold Callback objects such as EarlyStopping(), got {callback!r}")
        for name in callback.monitored():
            if name not in columns:
                remedy = ": give fit validation=(x, y)" if name.startswith("val_") else ""
                raise ValueError(
                    f"{type(callback).__name__} monitors {name!r}, but this run records {', '.join(columns)}{remedy}"
                )
    return list(callbacks)
