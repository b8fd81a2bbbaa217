"""What rounds of timings say: medians, quartiles, ratios, and the fraction of the machine's limit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .cases import Case
from .limits import Machine, limit_seconds
from .peers import BASELINE


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    q1: float
    q3: float


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Median and quartiles (interpolated between the sorted values) of a sample that is not empty."""
    return Spread(*np.percentile(values, (50, 25, 75)).tolist())


@dataclass
class CaseResult:
    """What one case gave: a peer's median seconds in every round, or why there are none."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def time(self, peer: str = BASELINE) -> Spread | None:
        """Median and quartiles of the peer's seconds."""
        return spread(self.seconds[peer]) if peer in self.seconds else None

    def ratio(self, peer: str) -> Spread | None:
        """Median and quartiles of the peer's time over nblora's; over 1, nblora is faster.

        Taken pair by pair, both of a pair from the same round: that cancels what slowed the machine for a whole round.
        """
        if peer not in self.seconds or BASELINE not in self.seconds:
            return None
        return spread(np.divide(self.seconds[peer], self.seconds[BASELINE]))

    def fraction(self, machine: Machine | None, peer: str = BASELINE) -> float | None:
        """Fraction of the machine's limit that the peer reached."""
        taken = self.time(peer)
        return None if taken is None or machine is None else limit_seconds(self.case, machine) / taken.median

    def settings(self, machine: Machine | None) -> dict[str, Any]:
        """As JSON can carry it."""
        peers: dict[str, Any] = {name: {"fault": why} for name, why in self.faults.items()}
        for name, rounds in self.seconds.items():
            ratio = self.ratio(name)
            peers[name] = {
                "seconds": spread(rounds)._asdict(),
                "ratio": ratio._asdict() if ratio else None,
                "fraction_of_limit": self.fraction(machine, name),
                "rounds": rounds,
            }
        limit = limit_seconds(self.case, machine) if machine else None
        return {"case": asdict(self.case), "limit_seconds": limit, "peers": peers}
