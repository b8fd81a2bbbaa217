"""The report's tables, as Markdown: what nblora loses stands beside what it wins."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from .cases import Case
from .peers import BASELINE
from .report import Report
from .suites import LIMIT, Group
from .summary import CaseResult, Spread

NOTHING = "–"
DOUBLING_GOAL, DOUBLING_FROM = 2.2, 64
SIZES = {"N": "n", "in": "in_features", "out": "out_features", "rank": "rank", "threads": "threads"}
LEGEND = (
    "\"takes\": the peer's time over nblora's, the median of the rounds' pairs; in bold where the peer is faster. "
    '"of the limit": the least time that the measured P and BW allow, over nblora\'s.'
)


# --- cells -------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, "" without rows; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    rule = "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) if len(lines) > 1 else ""


def milliseconds(taken: Spread | None) -> str:
    """The median as milliseconds with three digits."""
    if taken is None:
        return NOTHING
    value = 1e3 * taken.median
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 0.1))))}f}"


def fraction(value: float | None) -> str:
    """A fraction of the limit."""
    return NOTHING if value is None else f"{value:.2f}"


def times(ratio: float) -> str:
    """A ratio; in bold where the peer is faster."""
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def takes(result: CaseResult, peer: str, quartiles: bool = False) -> str:
    """How much longer a peer takes, or that it failed."""
    if peer in result.faults:
        return "wrong" if result.faults[peer].startswith("wrong") else "failed"
    ratio = result.ratio(peer)
    if ratio is None:
        return NOTHING
    return times(ratio.median) + (f" ({ratio.q1:.2f}–{ratio.q3:.2f})" if quartiles else "")


def span(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The least and the largest."""
    return " – ".join(dict.fromkeys(show(pick(values)) for pick in (min, max))) if values else NOTHING


# --- tables ------------------------------------------------------------------------------------------------------


def machine_text(report: Report) -> str:
    """What was run where, and how."""
    about, bench = report.machine, report.bench
    versions = {name: number for found in bench.versions.values() for name, number in found.items()}
    limits = "; ".join(
        f"{dtype}, {threads} thread{'s' if threads > 1 else ''}: P = {m.flops / 1e9:.0f} GFLOP/s ({m.flops_by}), "
        f"BW = {m.bandwidth / 1e9:.1f} GB/s"
        for (dtype, threads), m in bench.machines.items()
    )
    lines = [
        f"{about['processor']}, {about['cores']} cores, {about['vectors'] or 'no'} vectors, {about['memory_gib']} GiB, "
        f"{about['system']}; load before the run {about.get('load_before', NOTHING)}.",
        f"nblora {about['nblora']}; {', '.join(f'{name} {number}' for name, number in sorted(versions.items()))}.",
        f'Suite "{report.suite}": {bench.effort.rounds} rounds, bursts of {bench.effort.burst} s, peers in turn.',
        f"Device: {bench.device_description}." if bench.device_description else "",
        f"**{report.busy}: these figures do not hold for a quiet one.**" if report.busy else "",
        f"Measured limits: {limits}." if limits else "",
        *(f"Not compared: {name}, {why}." for name, why in bench.skipped.items()),
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def group_tables(report: Report, quartiles: bool) -> Iterator[str]:
    """A table a group, a row a case: nblora's time, its fraction of the limit, how much longer each peer takes."""
    for group, results in report.measured_groups():
        peers = report.peers_in(results)
        rows = [
            [
                group.label(result.case),
                milliseconds(result.time()),
                fraction(report.fraction(result)),
                *(takes(result, peer, quartiles) for peer in peers),
            ]
            for result in results
        ]
        header = ["N × in × out, rank", "nblora, ms", "of the limit", *(f"{peer} takes" for peer in peers)]
        yield f"**{group.name}**\n\n{table(header, rows)}"


def goals_table(report: Report) -> str:
    """Each group's goals, beside the worst case of the group."""
    rows = []
    for group, results in report.measured_groups():
        for against, goal in group.goals.items():
            values = {group.label(result.case): report.reached(result, against) for result in results}
            found = {label: value for label, value in values.items() if value is not None}
            if found:
                worst = min(found, key=lambda label: found[label])
                label = "fraction of the limit" if against == LIMIT else against
                reached = f"{sum(value >= goal for value in found.values())} of {len(found)}"
                rows.append([group.name, label, f"{goal:.2f}", f"{found[worst]:.2f}", worst, reached])
    return table(["cases", "against", "goal", "worst", "at", "reached in"], rows)


def overview_table(report: Report) -> str:
    """One row a group: the range of its medians, for a README."""
    peers = report.peers_in(report.results)

    def ranges(group: Group, results: list[CaseResult]) -> list[str]:
        found = {of: [v for r in results if (v := report.reached(r, of)) is not None] for of in (LIMIT, *peers)}
        return [span(found.pop(LIMIT), fraction), *(span(ratios, times) for ratios in found.values())]

    rows = [[f"{group.name} ({len(found)})", *ranges(group, found)] for group, found in report.measured_groups()]
    return table(["cases (how many)", "of the limit", *(f"{name} takes" for name in peers)], rows)


def comparison_table(report: Report) -> str:
    """Pairs of cases that should cost the same, or a known part: odd shapes, the other layout, one thread."""
    known = {r.case: taken.median for r in report.results if r.case.kind == "step" and (taken := r.time())}
    most = max((case.threads for case in known), default=1)
    rows = []
    for case, seconds in known.items():
        for label, twin, goal in _twins(case, most):
            if twin in known and twin != case:
                elements = case.in_features * case.out_features / (twin.in_features * twin.out_features)
                rows.append([f"{label}, {case.shape}", f"{seconds / known[twin] / elements:.2f}", goal])
    return table(["nblora's step, for each element of the weight", "takes", "goal"], rows)


def _twins(case: Case, most: int) -> Iterator[tuple[str, Case, str]]:
    if (case.in_features, case.out_features) == (1000, 997):
        yield "out = 997 against 1000", replace(case, out_features=1000), "≤ 1.10"
        yield "1000 × 997 against 1024 × 1024", replace(case, in_features=1024, out_features=1024), "≤ 1.10"
    yield "FullyConnected against Dense", replace(case, layout="dense"), "≤ 1.10"
    if case.threads == 1:
        yield f"one thread against {most}", replace(case, threads=most), "≥ 1.70" if case.n >= 256 else ""


def startup_table(report: Report) -> str:
    """Seconds to the end of the first step, and its parts."""
    rows = []
    for row in report.startup:
        parts = ["failed", "", "", ""]
        if "fault" not in row:
            of = {part: row[part]["median"] for part in ("seconds", "import", "set_up", "first", "steady")}
            compiling = max(0.0, of["first"] - of["steady"])
            parts = [f"{part:.2f}" for part in (of["seconds"], of["import"], of["set_up"], compiling)]
        rows.append([f"{row['peer']}, {row['cache']} cache", *parts])
    header = ["seconds", "process start to end of first step", "import", "set-up", "compiling and loading"]
    return table(header, rows)


def memory_table(report: Report) -> str:
    """MiB beyond the arrays."""
    rows, sizes = [], ""
    for row in report.memory:
        sizes = " × ".join(map(str, row["sizes"]))
        parts = ["failed", ""] if "fault" in row else [f"{row[part] / 2**20:.1f}" for part in ("bytes", "arrays")]
        rows.append([f"{row['peer']}, {row['kind']}", *parts])
    return table([f"peak of three steps, {sizes}", "MiB beyond the arrays", "MiB of arrays"], rows)


def growth_tables(report: Report) -> str:
    """nblora's step as one size doubles: what each doubling costs."""
    parts = []
    for name, results in report.growth.items():
        rows, before = [], 0.0
        for result in results:
            taken, case = result.time(), result.case
            if taken is not None:
                factor = taken.median / before if before else 0.0
                beyond = factor > DOUBLING_GOAL and case.n >= 2 * DOUBLING_FROM
                shown = f"**{factor:.2f}**" if beyond else f"{factor:.2f}" if before else NOTHING
                size = str(getattr(case, SIZES[name]))
                rows.append([size, milliseconds(taken), shown, fraction(report.fraction(result))])
                before = taken.median
        if rows:
            fixed = results[0].case
            content = table([name, "ms", "factor", "of the limit"], rows)
            parts.append(f"Against {name} (step at {fixed.shape}, {fixed.dtype}, and on):\n\n{content}")
    if parts:
        goal = f"a doubling costs at most {DOUBLING_GOAL} times, from N = {DOUBLING_FROM} on"
        parts.append(f"Goal: {goal}; more is in bold.")
    return "\n\n".join(parts)


def neighbour_table(report: Report) -> str:
    """The step alone and with a busy core: how much slower, and what becomes of the ratios."""
    if set(report.neighbour) != {"quiet", "busy"}:
        return ""
    quiet, busy = both = report.neighbour["quiet"], report.neighbour["busy"]
    rows = []
    for name in [BASELINE, *report.peers_in(both)]:
        alone, beside = quiet.time(name), busy.time(name)
        parts = ["failed", "failed", "", "", ""]
        if alone is not None and beside is not None:
            ratios = [takes(result, name) if name != BASELINE else "" for result in both]
            parts = [milliseconds(alone), milliseconds(beside), f"{beside.median / alone.median:.2f}", *ratios]
        rows.append([name, *parts])
    header = [f"step, {quiet.case.shape}", "quiet, ms", "busy, ms", "slower by", "takes, quiet", "takes, busy"]
    goals = "Goals: nblora at most 2.5 times slower, and no ratio to a peer more than 10 % lower."
    return f"{table(header, rows)}\n\n{goals}"


SECTIONS = {
    "Goals and the worst case of each group": goals_table,
    "Pairs of cases": comparison_table,
    "Start-up": startup_table,
    "Memory": memory_table,
    "Growth": growth_tables,
    "A busy neighbour": neighbour_table,
}


def full_text(report: Report, quartiles: bool = True, heading: str = "##") -> str:
    """Every table, as the docs show them."""
    parts = [machine_text(report), LEGEND, *group_tables(report, quartiles)]
    parts += [f"{heading} {title}\n\n{content}" for title, make in SECTIONS.items() if (content := make(report))]
    return "\n\n".join(parts) + "\n"


def docs_text(report: Report) -> str:
    """Every table, under the processor's name."""
    return f"### {report.machine['processor']}\n\n{full_text(report, heading='####')}"


def readme_text(report: Report) -> str:
    """The short table, with the machine's description."""
    return "\n\n".join([f"**{report.machine['processor']}**", overview_table(report), LEGEND, machine_text(report)])
