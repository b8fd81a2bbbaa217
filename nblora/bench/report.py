"""A whole run's findings, as JSON, as CSV, and between the markers of a Markdown file."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nblora.storage.atomic import replace_whole

from .limits import Machine
from .machine import busy_with
from .peers import BASELINE
from .runner import Bench
from .suites import LIMIT, Group
from .summary import CaseResult

# A table of each processor stands between markers of its own; one without a name waits for its first table.
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BLOCK = re.compile(
    r"<!-- bench:begin(?: (?P<processor>[^\n]+))? -->\n(?:(?!<!-- bench:).)*<!-- bench:end -->", re.DOTALL
)


@dataclass
class Report:
    """Everything that a run found; parts that were not measured are empty."""

    suite: str
    bench: Bench
    machine: dict[str, Any]
    groups: list[Group]
    sections: Sequence[str] = ()
    results: list[CaseResult] = field(default_factory=list)
    startup: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    growth: dict[str, list[CaseResult]] = field(default_factory=dict)
    neighbour: dict[str, CaseResult] = field(default_factory=dict)

    @property
    def busy(self) -> str:
        """What to say of a machine that had other work; empty where it had none."""
        return busy_with(self.machine)

    def fraction(self, result: CaseResult, peer: str = BASELINE) -> float | None:
        """Fraction of the machine's limit that a peer reached, where the limit of the case's kind was measured."""
        return result.fraction(self._limit(result), peer)

    def _limit(self, result: CaseResult) -> Machine | None:
        return self.bench.machines.get((result.case.dtype, result.case.threads))

    def reached(self, result: CaseResult, against: str) -> float | None:
        """What a goal is about: nblora's fraction of the limit, or the median of a peer's ratio."""
        ratio = result.ratio(against)
        return self.fraction(result) if against == LIMIT else ratio and ratio.median

    def peers_in(self, results: Iterable[CaseResult]) -> list[str]:
        """The peers that were timed, or failed, beside nblora."""
        seen = {name for result in results for name in (*result.seconds, *result.faults)}
        return [name for name in self.bench.peers if name in seen and name != BASELINE]

    def measured_groups(self) -> Iterator[tuple[Group, list[CaseResult]]]:
        """Each group with the results there are for it."""
        known = {result.case: result for result in self.results}
        for group in self.groups:
            found = [known[case] for case in group.cases if case in known]
            if found:
                yield group, found

    def to_json(self) -> str:
        """Return everything, raw rounds included."""

        def settings(results: Iterable[CaseResult]) -> list[dict[str, Any]]:
            return [result.settings(self._limit(result)) for result in results]

        content = {
            "suite": self.suite,
            "machine": self.machine,
            "settings": {**asdict(self.bench.effort), "sections": list(self.sections)},
            "versions": self.bench.versions,
            "skipped": self.bench.skipped,
            "limits": [
                {"dtype": dtype, "threads": threads, **machine._asdict()}
                for (dtype, threads), machine in self.bench.machines.items()
            ],
            "groups": [
                {"name": group.name, "goals": group.goals, "results": settings(results)}
                for group, results in self.measured_groups()
            ],
            "startup": self.startup,
            "memory": self.memory,
            "growth": {name: settings(results) for name, results in self.growth.items()},
            "neighbour": {state: settings([result])[0] for state, result in self.neighbour.items()},
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """Return one row for each case and peer: median and quartiles of seconds and ratio, fraction of the limit."""
        rows = [
            {"group": group.name, **asdict(result.case), "peer": peer, **self._figures(result, peer)}
            for group, results in self.measured_groups()
            for result in results
            for peer in [*result.seconds, *result.faults]
        ]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]) if rows else ["group", "peer"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()

    def _figures(self, result: CaseResult, peer: str) -> dict[str, str]:
        spreads = {"seconds": result.time(peer), "ratio": result.ratio(peer)}
        figures = {
            f"{name}{part}": "" if spread is None else f"{value:.6g}"
            for name, spread in spreads.items()
            for part, value in zip(("", "_q1", "_q3"), spread or ("", "", ""), strict=True)
        }
        fraction = self.fraction(result, peer)
        shown = "" if fraction is None else f"{fraction:.4f}"
        return figures | {"fraction_of_limit": shown, "fault": result.faults.get(peer, "")}


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none."""
    with replace_whole(path) as file:
        file.write(text.encode())


def check_markers(path: str | os.PathLike[str]) -> list[re.Match[str]]:
    """Find the tables between markers; ValueError where there is none, or a marker without its fellow."""
    text = Path(path).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    if not found or text.count("<!-- bench:") != 2 * len(found):
        raise ValueError(f"{os.fspath(path)} must hold {BEGIN} and after it {END}: the table goes between")
    return found


def replace_between_markers(path: str | os.PathLike[str], processor: str, content: str) -> None:
    """Put `content` in the place of this processor's table in a Markdown file, or after those of others.

    Raises
    ------
    ValueError
        Where the markers are missing; the file is left as it is.
    """
    blocks = check_markers(path)
    text = blocks[0].string
    own = next((block for block in blocks if block["processor"] in (processor, None)), None)
    begin, end = own.span() if own else (blocks[-1].end(),) * 2
    gap = "" if own else "\n\n"
    block = f"{BEGIN.replace(' -->', f' {processor} -->')}\n{content.strip()}\n{END}"
    write_text(Path(path), text[:begin] + gap + block + text[end:])
