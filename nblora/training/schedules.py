"""Schedules: the factor on every learning rate at each step of a run."""

import math
from typing import Any

from nblora import checks


class Schedule:
    """A factor on the learning rates, the delta's included. A schedule of your own overrides `factor`."""

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor at `step`, counted from 0; `total_steps` are the run's, over all its epochs."""
        raise NotImplementedError


class Constant(Schedule):
    """Factor 1 throughout. Its name in `fit`: "constant"."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0

    def __repr__(self) -> str:
        return "Constant()"


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine from 1 down (Loshchilov and Hutter, 2017). Its name in `fit`: "cosine".

    During warm-up the factor of step k is (k + 1) / warm-up steps, so that the first step is not lost.

    Parameters
    ----------
    warmup : int or float
        An int counts steps; a float in [0, 1) is a share of all steps.
    final : float
        Factor at the end, in [0, 1].
    total_steps : int, optional
        Length of the whole schedule; the factor stays at `final` after it. Default: the run's own, which changes with
        `epochs`: give it where you will go on with `resume` and more epochs.
    """

    def __init__(self, warmup: int | float = 0, final: float = 0.0, total_steps: int | None = None) -> None:
        if isinstance(warmup, float):
            self.warmup: int | float = checks.check_fraction("warmup", warmup)
        else:
            self.warmup = checks.check_integer("warmup", warmup, 0, remedy="a share of all steps is a float")
        self.final = checks.check_not_negative("final", final)
        if self.final > 1:
            raise ValueError(f"final must be between 0 and 1, got {final}")
        self.total_steps = None if total_steps is None else checks.check_integer("total_steps", total_steps, 1)

    def factor(self, step: int, total_steps: int) -> float:
        total = self.total_steps or total_steps
        warmup = round(self.warmup * total) if isinstance(self.warmup, float) else self.warmup
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))

    def __repr__(self) -> str:
        return f"WarmupCosine(warmup={self.warmup!r}, final={self.final!r}, total_steps={self.total_steps!r})"


SCHEDULES: dict[str, type[Constant] | type[WarmupCosine]] = {"constant": Constant, "cosine": WarmupCosine}


def as_schedule(schedule: Any) -> Schedule:
    """Return the schedule that None (constant), a name or an object stands for."""
    if schedule is None:
        return Constant()
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str):
        raise TypeError(
            f"schedule must be None, a name ({', '.join(map(repr, SCHEDULES))}) or a Schedule object such as "
            f"WarmupCosine(warmup=100), got {schedule!r}"
        )
    return SCHEDULES[checks.check_choice("schedule", schedule, tuple(SCHEDULES))]()
