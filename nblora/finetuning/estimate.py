"""`--dry-run`: memory and time that a run would take, from a few updates that are made and taken back."""

import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nblora.training import AdamW, evaluate, fit
from nblora.training.snapshot import Snapshot

from .rates import OTHERS, UPDATES
from .settings import AUTO
from .task import Task, as_fit

_ENOUGH = 5.0
"""Seconds of updates that are timed, at least one and at most _MOST of them."""
_MOST = 8


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes
    ----------
    updates : int
    tokens : int
        Of all epochs, those to learn from.
    tokens_per_second : float
        Measured, after compiling.
    seconds : float
        For training, for trying rates and for validation, without compiling, reading and writing.
    memory : int
        Bytes: the largest that this process had while an update of the longest texts was made, with what a run keeps
        beside it; or with the model that is loaded again at the end, if that is more.
    trainable, parameters : int
    measured : int
        Updates that were timed.
    """

    updates: int
    tokens: int
    tokens_per_second: float
    seconds: float
    memory: int
    trainable: int
    parameters: int
    measured: int

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)


def estimate(task: Task) -> Estimate:
    """Make a few updates, time them, and take them back."""
    settings, examples = task.settings, task.examples["train"]
    size = settings.batch_size * settings.accumulate
    per_epoch = -(-len(examples) // size)
    updates = settings.iters or settings.epochs * per_epoch
    loaded, model = _peak_memory(), sum(named.array.nbytes for named in task.model._parameters())
    before = Snapshot(task.model)
    kept = sum(array.nbytes for array in before.arrays.values())

    def train(places: Any) -> float:
        began = time.perf_counter()
        fit(
            task.model, *as_fit(examples.part(places)), optimizer=AdamW(1e-5), delta_lr=1e-6, epochs=1,
            batch_size=settings.batch_size, accumulate=settings.accumulate, shuffle=False, progress=False,
        )  # fmt: skip
        return time.perf_counter() - began

    try:
        lengths = np.array([len(ids) for ids in examples.ids])
        train(np.argsort(-lengths, kind="stable")[:size])  # compiles, and needs the most memory
        order = np.random.default_rng(settings.seed).permutation(len(examples))
        seconds, tokens, measured = 0.0, 0, 0
        while measured < _MOST and (seconds < _ENOUGH or not measured):
            places = np.roll(order, -measured * size)[:size]
            seconds += train(places)
            tokens += int(lengths[places].sum())
            measured += 1
        validation = _validation_seconds(task)
    finally:
        before.restore()
    rate = tokens / seconds
    total = round(examples.tokens * updates / per_epoch)
    spent = total / rate
    if settings.lr == AUTO:
        spent += spent / updates * len(OTHERS) * min(UPDATES, per_epoch)
    evaluations = max(1, updates // (settings.eval_every or per_epoch))
    best = kept if "valid" in task.examples else 0
    # `fit` kept three copies of what is trained beside this one's; the best parameters are one more.
    memory = max(_peak_memory() - kept + best, loaded + model)
    return Estimate(
        updates, total, rate, spent + evaluations * validation, memory, task.model.parameter_count,
        sum(int(np.prod(named.shape)) for named in task.model._parameters() if not named.parameter.state), measured,
    )  # fmt: skip


def _validation_seconds(task: Task) -> float:
    """Of one evaluation of all records held out, from a part of them."""
    held_out = task.examples.get("valid")
    if held_out is None:
        return 0.0
    part = held_out.part(np.random.default_rng(task.settings.seed).permutation(len(held_out))[:32])
    evaluate(task.model, *as_fit(part.part([0])))
    began = time.perf_counter()
    evaluate(task.model, *as_fit(part))
    return (time.perf_counter() - began) / part.tokens * held_out.tokens


def _peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
