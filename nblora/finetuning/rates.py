"""`lr="auto"`: a short run at each of four rates, and which of them learnt most."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from nblora.errors import NonFiniteError
from nblora.training import AdamW, evaluate, fit
from nblora.training.snapshot import Snapshot

from .task import Task, as_fit

RATES = {"full": (1e-5, 3e-5, 1e-4, 3e-4)}
"""What is tried, by the method."""
OTHERS = (1e-4, 3e-4, 1e-3, 3e-3)
UPDATES = 30
"""Of each short run, or one epoch if that is shorter."""
MOST = 128
"""Examples that a rate is judged by, of those held out, or else of those that it was not trained on."""


class Trial(NamedTuple):
    """A short run: its rate, and the loss after it; infinite where it did not stay finite."""

    lr: float
    loss: float


def choose_rate(task: Task) -> tuple[float, list[Trial], str]:
    """Train a little at each rate, from the same start, and judge by the loss afterwards; the model is unchanged.

    Returns
    -------
    tuple of float, list of Trial and str
        The rate, what was tried, and a sentence that says why.

    Raises
    ------
    NonFiniteError
        Where no rate leaves the model finite.
    """
    settings, examples = task.settings, task.examples["train"]
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(examples))
    wanted = UPDATES * settings.batch_size * settings.accumulate
    held_out = task.examples.get("valid")
    judged_by = "the records held out" if held_out is not None else "records that it was not trained on"
    if held_out is not None:
        chosen, judged = (
            order[:wanted],
            held_out.part(np.random.default_rng(settings.seed).permutation(len(held_out))[:MOST]),
        )
    else:
        cut = min(wanted, max(1, len(order) * 4 // 5))
        chosen, judged = order[:cut], examples.part(order[cut : cut + MOST] if len(order) > cut else order)
        judged_by = judged_by if len(order) > cut else "the records that it was trained on"
    trained = examples.part(chosen)
    trials = [_trial(task, trained, judged, rate) for rate in RATES.get(settings.method, OTHERS)]
    best = min(trials, key=lambda trial: trial.loss)
    if not math.isfinite(best.loss):
        raise NonFiniteError("lr 'auto': no rate of those tried leaves the model finite: give one, lower than these")
    tried = ", ".join(f"{trial.loss:.4g} at {trial.lr:g}" for trial in trials)
    count = -(-len(chosen) // (settings.batch_size * settings.accumulate))
    return best.lr, trials, f"lr {best.lr:g}: after {count} updates the loss of {judged_by} was {tried}"


def _trial(task: Task, trained: Any, judged: Any, rate: float) -> Trial:
    settings, before = task.settings, Snapshot(task.model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fit(
                task.model, *as_fit(trained), optimizer=AdamW(rate), epochs=1, batch_size=settings.batch_size,
                accumulate=settings.accumulate, length_grouping=True, seed=settings.seed, progress=False,
            )  # fmt: skip
        loss = evaluate(task.model, *as_fit(judged), batch_size=settings.batch_size)["loss"]
    except NonFiniteError:
        loss = math.inf
    finally:
        before.restore()
    return Trial(rate, loss if math.isfinite(loss) else math.inf)
