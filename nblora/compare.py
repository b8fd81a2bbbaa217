"""Means, deviations and paired intervals of differences: whether one method beats another, or only its noise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nblora import checks

RESAMPLES = 20_000
LEVEL = 0.95
INTERVALS = ("t", "bootstrap")
FEWEST_SEEDS = {"t": 5, "bootstrap": 20}
"""Fewer decide nothing. The t interval holds its level for any number of normal differences, but that they are normal
nobody can see in four; of bootstrap intervals at 5 seeds, 83 of 100 hold the truth, at 20 seeds 93."""


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

    `low` and `high` bound the interval of this difference alone, `p` is the chance of a difference as large without
    any cause, corrected for the number of differences (Holm, 1979); all are None for one seed. `decided` tells whether
    `p` is below 1 - level and rests on enough seeds for that to mean something.
    """

    first: str
    second: str
    seeds: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    decided: bool


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `level` is that of every single interval, `interval` how it was computed."""

    methods: list[Summary]
    differences: list[Difference]
    level: float
    interval: str = "t"

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it, with the field "format" by which `nblora plot` knows it."""
        return {"format": "nblora.comparison", **asdict(self)}


def compare(
    results: Mapping[str, Mapping[Any, float]],
    *,
    baseline: str | None = None,
    level: float = LEVEL,
    interval: str = "t",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare methods over seeds.

    Runs with the same seed share their data and their start, so methods are compared within each seed: the interval
    is that of the mean of the paired differences. Where several differences are asked for at once, what is decided is
    corrected by Holm's rule, so that all of them together err as seldom as one at `level` would.

    Parameters
    ----------
    results : mapping of method names to mappings of seeds to values
        Such as `{"lora": {0: 0.91, 1: 0.93}, "delta": {0: 0.92, 1: 0.95}}`.
    baseline : str, optional
        Compare the others with this method alone; without it every pair.
    level : float
        Of each interval, in (0, 1).
    interval : {"t", "bootstrap"}
        Student's t for paired samples (`scipy.stats.ttest_rel`), or the percentile bootstrap over seeds
        (`scipy.stats.bootstrap`), for many seeds with differences that are far from normal.
    resamples : int
        Of the bootstrap.
    seed : int
        Of the bootstrap: the same seed gives the same intervals.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        For values that are not finite, an unknown baseline, a method without values, two methods without a common seed.

    Examples
    --------
    >>> from nblora.compare import compare
    >>> a, b = [0.90, 0.93, 0.91, 0.92, 0.94], [0.92, 0.94, 0.93, 0.95, 0.96]
    >>> found = compare({"a": dict(enumerate(a)), "b": dict(enumerate(b))}).differences[0]
    >>> round(found.low, 4), round(found.high, 4), found.decided
    (0.0112, 0.0288, True)
    """
    level = checks.check_positive("level", level)
    if level >= 1:
        raise ValueError(f"level must be below 1, got {level}: 0.95 is customary")
    interval = checks.check_choice("interval", interval, INTERVALS)
    resamples = checks.check_integer("resamples", resamples, 100)
    values = {name: _finite(name, by_seed) for name, by_seed in results.items()}
    found = []
    for first, second in _pairs(list(values), baseline):
        paired = _paired(values, first, second)
        bounds = _t_test(paired, level) if interval == "t" else _bootstrap(paired, level, resamples, seed)
        found.append(Difference(first, second, len(paired), float(paired.mean()), *bounds, False))
    summaries = [_summary(name, by_seed) for name, by_seed in values.items()]
    return Comparison(summaries, _decided(found, level, FEWEST_SEEDS[interval]), level, interval)


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


def _paired(values: Mapping[str, Mapping[Any, float]], first: str, second: str) -> np.ndarray:
    """The differences within each seed that both were run with."""
    shared = [key for key in values[first] if key in values[second]]
    if not shared:
        raise ValueError(f"{first!r} and {second!r} have no seed in common: run both with the same seeds")
    return np.array([values[first][key] - values[second][key] for key in shared], np.float64)


Bounds = tuple[float | None, float | None, float | None]


def _t_test(paired: np.ndarray, level: float) -> Bounds:
    """Interval and p of the mean by Student's t."""
    from scipy import stats

    if len(paired) == 1 or np.ptp(paired) == 0:
        return _without_spread(paired)
    found = stats.ttest_1samp(paired, 0.0)  # of paired differences: the same as ttest_rel of the two samples
    low, high = found.confidence_interval(level)
    return float(low), float(high), float(found.pvalue)


def _bootstrap(paired: np.ndarray, level: float, resamples: int, seed: int) -> Bounds:
    """Interval and p of the mean by the percentile bootstrap: p is where an interval of level 1 - p would end at 0."""
    from scipy import stats

    if len(paired) == 1 or np.ptp(paired) == 0:
        return _without_spread(paired)
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (paired,), np.mean, n_resamples=resamples, confidence_level=level, method="percentile", rng=rng
    )
    means = found.bootstrap_distribution
    p = 2 * min(np.mean(means <= 0), np.mean(means >= 0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high), min(1.0, float(p))


def _without_spread(paired: np.ndarray) -> Bounds:
    """One seed says nothing; seeds that all agree are an interval without length."""
    if len(paired) == 1:
        return None, None, None
    mean = float(paired.mean())
    return mean, mean, float(mean == 0)


def _decided(differences: Sequence[Difference], level: float, fewest: int) -> list[Difference]:
    """The differences with `p` corrected by Holm's step-down rule, and what that decides.

    The smallest p counts as often as there are differences, the next once less, and so on; none falls below a smaller
    one's. Differences without p, of one seed, are no tests.
    """
    found, corrected = list(differences), 0.0
    tested = sorted((d.p, place) for place, d in enumerate(differences) if d.p is not None)
    for rank, (p, place) in enumerate(tested):
        corrected = min(1.0, max(corrected, (len(tested) - rank) * p))
        enough = differences[place].seeds >= fewest
        found[place] = replace(differences[place], p=corrected, decided=enough and corrected < 1 - level)
    return found


def text_report(comparison: Comparison, metric: str = "value") -> str:
    """Return the comparison as text for a terminal: a table of the methods, and a line for every difference."""
    width = max(len(summary.name) for summary in comparison.methods)
    lines = [f"{'method':<{width}}  seeds  {metric}, mean ± std"]
    for summary in comparison.methods:
        spread = "(one seed)" if summary.std is None else f"± {summary.std:.4f}"
        lines.append(f"{summary.name:<{width}}  {summary.seeds:>5}  {summary.mean:.4f} {spread}")
    if comparison.differences:
        kind = f"{100 * comparison.level:g} % {comparison.interval} intervals"
        lines += ["", f"Differences of {metric}, paired by seed, with {kind}:"]
        fewest = FEWEST_SEEDS[comparison.interval]
        lines += [f"  {_difference_text(difference, fewest)}" for difference in comparison.differences]
    if len(comparison.differences) > 1:
        lines.append(
            f"  Each interval stands for itself; p is corrected for {len(comparison.differences)} differences (Holm)."
        )
    return "\n".join(lines)


def _difference_text(difference: Difference, fewest: int) -> str:
    names = f"{difference.first} - {difference.second}: {difference.difference:+.4f}"
    if difference.low is None or difference.high is None:
        return f"{names}, undecided: one common seed says nothing about the noise"
    interval = f"{names} [{difference.low:+.4f}, {difference.high:+.4f}], p = {difference.p:.2g}"
    if difference.decided:
        return (
            f"{interval}, {difference.first if difference.difference > 0 else difference.second} has the larger value"
        )
    if difference.seeds < fewest:
        return f"{interval}, undecided: {difference.seeds} seeds, at least {fewest} are needed"
    return f"{interval}, within the noise"
