"""Means, deviations and paired bootstrap intervals: whether one method beats another, or only its noise."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nblora import checks

RESAMPLES = 20_000
LEVEL = 0.95
FEWEST_SEEDS = 5  # with n seeds a difference without any cause has one sign throughout with probability 2 / 2**n


@dataclass(frozen=True)
class Summary:
    """One method: how often it was run, and the mean and sample standard deviation of what it reached.

    `std` is None for one seed: nothing is known about the noise then.
    """

    name: str
    seeds: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """`first` minus `second`, over the seeds that both were run with.

    `low` and `high` bound the interval, None for one seed; `decided` tells whether it leaves out zero and rests on
    enough seeds for that to mean something.
    """

    first: str
    second: str
    seeds: int
    difference: float
    low: float | None
    high: float | None
    decided: bool


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `level` is that of every single interval."""

    methods: list[Summary]
    differences: list[Difference]
    level: float

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it, with the field "format" by which `nblora plot` knows it."""
        return {"format": "nblora.comparison", **asdict(self)}


def compare(
    results: Mapping[str, Mapping[Any, float]],
    *,
    baseline: str | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare methods over seeds.

    Runs with the same seed share their data and their start, so methods are compared within each seed: the interval
    is that of the mean of the paired differences, by the studentised bootstrap over seeds, which holds its level for
    few seeds too: of 1500 intervals for 5 normal differences 95 % held the truth, of percentile intervals 83 %.

    Parameters
    ----------
    results : mapping of method names to mappings of seeds to values
        Such as `{"lora": {0: 0.91, 1: 0.93}, "delta": {0: 0.92, 1: 0.95}}`.
    baseline : str, optional
        Compare the others with this method alone; without it every pair.
    level : float
        Of each interval, in (0, 1). Of twenty comparisons at 0.95, one errs by chance: ask few questions.
    resamples : int
        Bootstrap resamples.
    seed : int
        Of the resampling; the same seed gives the same intervals.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        For values that are not finite, an unknown baseline, a method without values, two methods without a common seed.
    """
    level = checks.check_positive("level", level)
    if level >= 1:
        raise ValueError(f"level must be below 1, got {level}: 0.95 is customary")
    resamples = checks.check_integer("resamples", resamples, 100)
    values = {name: _finite(name, by_seed) for name, by_seed in results.items()}
    pairs = _pairs(list(values), baseline)
    found = [_difference(values, first, second, level, resamples, seed) for first, second in pairs]
    return Comparison([_summary(name, by_seed) for name, by_seed in values.items()], found, level)


def _finite(name: str, by_seed: Mapping[Any, float]) -> dict[Any, float]:
    if not by_seed:
        raise ValueError(f"results[{name!r}] must hold at least one seed's value, got none")
    for seed, value in by_seed.items():
        if not math.isfinite(value):
            raise ValueError(f"results[{name!r}][{seed!r}] must be finite, got {value}: leave out runs that diverged")
    return dict(by_seed)


def _pairs(names: list[str], baseline: str | None) -> list[tuple[str, str]]:
    if baseline is None:
        return [(second, first) for place, first in enumerate(names) for second in names[place + 1 :]]
    if baseline not in names:
        raise ValueError(f"baseline must be one of {', '.join(map(repr, names))}, got {baseline!r}")
    return [(name, baseline) for name in names if name != baseline]


def _summary(name: str, by_seed: Mapping[Any, float]) -> Summary:
    values = np.array(list(by_seed.values()), np.float64)
    return Summary(name, len(values), float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None)


def _difference(
    values: Mapping[str, Mapping[Any, float]], first: str, second: str, level: float, resamples: int, seed: int
) -> Difference:
    shared = [key for key in values[first] if key in values[second]]
    if not shared:
        raise ValueError(f"{first!r} and {second!r} have no seed in common: run both with the same seeds")
    paired = np.array([values[first][key] - values[second][key] for key in shared], np.float64)
    mean = float(paired.mean())
    if len(paired) == 1:
        return Difference(first, second, 1, mean, None, None, False)
    low, high = bootstrap_interval(paired, level, resamples, seed)
    decided = len(paired) >= FEWEST_SEEDS and not low <= 0 <= high
    return Difference(first, second, len(paired), mean, low, high, decided)


def bootstrap_interval(
    sample: np.ndarray, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the studentised bootstrap interval of the mean of `sample`, shape (n,), n of at least 2.

    [m - q(1 - a) se, m - q(a) se], a = (1 - level) / 2, where q are quantiles of (m* - m) / se* over the resamples
    (Efron and Tibshirani, 1993, chapter 12.5). Resamples without any spread, for which that is not defined, are left
    out; a sample without any is an interval without length.
    """
    rng = np.random.default_rng(seed)
    count, mean = len(sample), float(sample.mean())
    error = float(sample.std(ddof=1)) / math.sqrt(count)
    block = max(1, 2_000_000 // count)  # bounds the memory of the drawn samples
    ratios = []
    for start in range(0, resamples, block):
        drawn = sample[rng.integers(count, size=(min(block, resamples - start), count))]
        drawn = drawn[np.any(drawn != drawn[:, :1], axis=1)]
        ratios.append((drawn.mean(1) - mean) / (drawn.std(1, ddof=1) / math.sqrt(count)))
    found = np.concatenate(ratios)
    if not found.size:
        return mean, mean
    below, above = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return mean - float(above) * error, mean - float(below) * error


def text_report(comparison: Comparison, metric: str = "value") -> str:
    """Return the comparison as text for a terminal: a table of the methods, and a line for every difference."""
    width = max(len(summary.name) for summary in comparison.methods)
    lines = [f"{'method':<{width}}  seeds  {metric}, mean ± std"]
    for summary in comparison.methods:
        spread = "(one seed)" if summary.std is None else f"± {summary.std:.4f}"
        lines.append(f"{summary.name:<{width}}  {summary.seeds:>5}  {summary.mean:.4f} {spread}")
    if comparison.differences:
        percent = f"{100 * comparison.level:g} %"
        lines += ["", f"Differences of {metric}, paired by seed, with {percent} bootstrap intervals:"]
        lines += [f"  {_difference_text(difference)}" for difference in comparison.differences]
    if len(comparison.differences) > 3:
        lines.append(f"  Each interval stands for itself: with {len(comparison.differences)}, some err by chance.")
    return "\n".join(lines)


def _difference_text(difference: Difference) -> str:
    names = f"{difference.first} - {difference.second}: {difference.difference:+.4f}"
    if difference.low is None or difference.high is None:
        return f"{names}, undecided: one common seed says nothing about the noise"
    interval = f"{names} [{difference.low:+.4f}, {difference.high:+.4f}]"
    if difference.decided:
        return (
            f"{interval}, {difference.first if difference.difference > 0 else difference.second} has the larger value"
        )
    if difference.seeds < FEWEST_SEEDS:
        return f"{interval}, undecided: {difference.seeds} seeds, at least {FEWEST_SEEDS} are needed"
    return f"{interval}, within the noise"
