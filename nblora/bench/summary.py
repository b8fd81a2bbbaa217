"""Medians, quartiles and ratios: what many rounds of timings say."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    q1: float
    q3: float

    def settings(self) -> dict[str, float]:
        """As JSON can carry it."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive method: interpolated between the sorted values) of a sample that is not empty."""
    if not values:
        raise ValueError("values must hold at least one number, got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


def ratios(peer: Sequence[float], own: Sequence[float]) -> list[float]:
    """The peer's time over nblora's, pair by pair: both values of a pair come from the same round.

    Over 1 nblora is faster. Pairing cancels what slowed the machine for a whole round.
    """
    return [theirs / ours for theirs, ours in zip(peer, own, strict=True)]
