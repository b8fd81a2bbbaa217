"""A dry run: what would be measured, with which peers, and every step of it once on small cases. Nothing is reported
as a time.

A peer that cannot use the device is rehearsed on the CPU, where it can: its formulas, its process and its clock then
work, and only the device is left to be seen.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .cases import Case
from .process import DeviceMissingError, PeerError, PeerMissingError
from .runner import SETTLE, Bench, Effort
from .suites import Group

LITTLE = Effort(rounds=1, burst=0.001, warm=0.001, rates=0.001)
SMALL = (5, 12, 10, 2)  # N, in, out, rank


@dataclass
class Rehearsed:
    """What came of one peer: where it ran ("" for nowhere), how many small cases were right, and what was wrong."""

    device: str = ""
    checked: int = 0
    right: int = 0
    notes: list[str] = field(default_factory=list)
    failed: bool = False


def small_cases(groups: Iterable[Group], kinds: tuple[str, ...]) -> list[Case]:
    """One small case for each of the kinds that the groups hold and a peer knows."""
    n, n_in, n_out, rank = SMALL
    known = {case.kind: case for group in groups for case in reversed(group.cases) if case.kind in kinds}
    return [replace(case, n=n, in_features=n_in, out_features=n_out, rank=rank) for case in known.values()]


def rehearse(bench: Bench, groups: list[Group]) -> dict[str, Rehearsed]:
    """Start every peer, check its small cases and time them; on the CPU where the device is out of its reach."""
    found = {}
    for name, spec in bench.peers.items():
        outcome = found[name] = Rehearsed()
        for device in dict.fromkeys([bench.device, *({"cpu"} & {*spec.devices})]):
            try:
                _perform(bench, name, small_cases(groups, spec.kinds), device, outcome)
                break
            except PeerError as error:
                outcome.notes.append(f"{device}: {error}")
                outcome.failed = not isinstance(error, PeerMissingError)
                if not isinstance(error, DeviceMissingError):
                    break
    return found


def _perform(bench: Bench, name: str, cases: list[Case], device: str, outcome: Rehearsed) -> None:
    spec = bench.peers[name]
    trial = replace(bench, peers={name: spec}, effort=LITTLE, say=lambda line: None, device=device, skipped={})
    with trial.crew(1) as crew:
        crew.worker(name)
        bench.device_description = trial.device_description
        outcome.device = device
        for case in cases:
            result = crew.run(replace(case, threads=1, device=device))
            outcome.checked += 1
            outcome.right += name in result.seconds
            outcome.notes += [f"{case.kind}: {fault}" for fault in result.faults.values()]
    outcome.failed = outcome.right < outcome.checked


def bytes_of(case: Case) -> int:
    """Bytes of the case's own arrays: x, g, y, the gradient of x, W, and D and V where there are."""
    weights = 1 if case.kind == "lora-step" else 3
    samples = 2 * case.n * (case.in_features + case.out_features)
    return case.itemsize * (weights * case.in_features * case.out_features + samples)


def least_seconds(bench: Bench, groups: list[Group], names: list[str]) -> float:
    """Seconds that bursts, pauses and warm-ups take of all cases; setting up, comparing and compiling come on top."""
    effort = bench.effort
    each = effort.rounds * (effort.burst + SETTLE) + effort.warm
    pairs = sum(case.kind in bench.peers[name].kinds for name in names for group in groups for case in group.cases)
    return pairs * each


def dry_run_text(
    bench: Bench, groups: list[Group], sections: Iterable[str], problem: str | None, found: dict[str, Rehearsed]
) -> str:
    """What a dry run has to say."""
    ready = [name for name, outcome in found.items() if outcome.device and not outcome.failed]
    cases = [case for group in groups for case in group.cases]
    largest = max(cases, key=bytes_of)
    state = f"not available here: {problem}" if problem else bench.device_description or "available"
    whose = f"of {', '.join(ready)}" if ready else "of nobody: no peer is here"
    lines = [
        "Dry run: nothing below was measured.",
        f"Device {bench.device}: {state}",
        "Peers:",
        *(f"  {name}: {_peer_text(bench, name, outcome)}" for name, outcome in found.items()),
        f"Cases: {len(cases)}; the largest, {largest.shape}, {largest.dtype}, has {bytes_of(largest) / 1e6:.0f} MB",
        *(f"  {group.name}: {len(group.cases)}" for group in groups),
        f"Parts: {', '.join(sections)}",
        f"Timing the cases {whose}: {math.ceil(least_seconds(bench, groups, ready) / 60)} minutes at least",
    ]
    return "\n".join(lines)


def _peer_text(bench: Bench, name: str, outcome: Rehearsed) -> str:
    notes = "; ".join(note.splitlines()[-1] for note in outcome.notes)
    if not outcome.device:
        return f"left out: {notes}"
    versions = ", ".join(f"{package} {number}" for package, number in bench.versions[name].items())
    text = f"{outcome.right} of {outcome.checked} small cases right on {outcome.device} ({versions})"
    return f"{text}; {notes}" if notes else text
