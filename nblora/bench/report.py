"""A whole run's findings, as JSON, as CSV, and between the markers of a Markdown file."""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nblora.storage.atomic import replace_whole

from .cases import Case
from .limits import Machine
from .suites import Group
from .summary import CaseResult

BUSY_LOAD = 0.5  # average of the last minute
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass
class Report:
    """Everything that a run found; parts that were not measured are empty."""

    suite: str
    machine: dict[str, object]
    settings: dict[str, object]
    peers: dict[str, str]
    groups: list[Group]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    machines: dict[tuple[str, int], Machine] = field(default_factory=dict)
    results: list[CaseResult] = field(default_factory=list)
    startup: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    growth: dict[str, list[CaseResult]] = field(default_factory=dict)
    neighbour: dict[str, CaseResult] = field(default_factory=dict)

    @property
    def busy(self) -> str:
        """What to say of a machine that had other work when the run began; empty where it had none."""
        load = self.machine.get("load_before")
        if not isinstance(load, float) or load <= BUSY_LOAD:
            return ""
        return f"the machine was busy with other work (load {load}): these figures do not hold for a quiet one"

    def limit(self, case: Case) -> Machine | None:
        """The machine's limits for the case's dtype and threads, where they were measured."""
        return self.machines.get((case.dtype, case.threads))

    def measured_groups(self) -> Iterator[tuple[Group, list[CaseResult]]]:
        """Each group with the results there are for it."""
        known = {result.case: result for result in self.results}
        for group in self.groups:
            found = [known[case] for case in group.cases if case in known]
            if found:
                yield group, found

    def settings_of(self, results: list[CaseResult]) -> list[dict[str, Any]]:
        """Results as JSON can carry them."""
        return [result.settings(self.limit(result.case)) for result in results]

    def to_json(self) -> str:
        """Return everything, raw rounds included."""
        content = {
            "suite": self.suite,
            "machine": self.machine,
            "settings": self.settings,
            "versions": self.versions,
            "skipped": self.skipped,
            "limits": [
                {"dtype": dtype, "threads": threads, **machine._asdict()}
                for (dtype, threads), machine in self.machines.items()
            ],
            "groups": [
                {"name": group.name, "goals": group.goals, "results": self.settings_of(results)}
                for group, results in self.measured_groups()
            ],
            "startup": self.startup,
            "memory": self.memory,
            "growth": {name: self.settings_of(results) for name, results in self.growth.items()},
            "neighbour": {state: self.settings_of([result])[0] for state, result in self.neighbour.items()},
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """Return one row for each case and peer: median and quartiles of seconds and ratio, fraction of the limit."""
        stream = io.StringIO()
        sizes = list(asdict(self.results[0].case)) if self.results else []
        figures = ["seconds", "seconds_q1", "seconds_q3", "ratio", "ratio_q1", "ratio_q3", "fraction_of_limit", "fault"]
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["group", *sizes, "peer", *figures])
        for group, results in self.measured_groups():
            for result in results:
                for peer in [*result.seconds, *result.faults]:
                    row = _figures(result, peer, self.limit(result.case))
                    writer.writerow([group.name, *asdict(result.case).values(), peer, *row])
        return stream.getvalue()


def _figures(result: CaseResult, peer: str, machine: Machine | None) -> list[object]:
    if peer in result.faults:
        return [*[""] * 7, result.faults[peer]]
    numbers: list[object] = []
    for spread in (result.time(peer), result.ratio(peer)):
        numbers += ["", "", ""] if spread is None else [f"{v:.6g}" for v in (spread.median, spread.q1, spread.q3)]
    fraction = result.fraction(machine, peer)
    return [*numbers, "" if fraction is None else f"{fraction:.4f}", ""]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none."""
    with replace_whole(path) as file:
        file.write(text.encode())


def check_markers(path: str | os.PathLike[str]) -> None:
    """ValueError where the file has not each marker once, the beginning first."""
    text = Path(path).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{os.fspath(path)} must hold {BEGIN} and after it {END}, once each: the table goes between")


def replace_between_markers(path: str | os.PathLike[str], content: str) -> None:
    """Put `content` between the markers of a Markdown file, in place of what is there.

    Raises
    ------
    ValueError
        Where the markers are missing; the file is left as it is.
    """
    check_markers(path)
    text = Path(path).read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(Path(path), f"{before}{BEGIN}\n{content.strip()}\n{END}{after}")
