"""The report's tables, as Markdown: what nblora loses stands beside what it wins."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from .cases import Case
from .peers import BASELINE
from .report import Report
from .suites import LIMIT, Group
from .summary import CaseResult, Spread

NOTHING = "–"
DOUBLING_GOAL, DOUBLING_FROM = 2.2, 64
NEIGHBOUR_GOALS = "Goals: nblora at most 2.5 times slower, and no ratio to a peer more than 10 % lower."
SIZES = {"N": "n", "in": "in_features", "out": "out_features", "rank": "rank"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds with three digits."""
    if seconds is None:
        return NOTHING
    value = 1e3 * seconds
    digits = next((digits for digits, least in ((0, 100), (1, 10), (2, 1)) if value >= least), 3)
    return f"{value:.{digits}f}"


def times(ratio: float) -> str:
    """A ratio; in bold where the peer is faster."""
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def _with_quartiles(ratio: Spread | None) -> str:
    return NOTHING if ratio is None else f"{times(ratio.median)} ({ratio.q1:.2f}–{ratio.q3:.2f})"


def machine_text(report: Report) -> str:
    """What was run where, and how."""
    about, settings = report.machine, report.settings
    versions: dict[str, str] = {}
    for found in report.versions.values():
        versions |= found
    limits = "; ".join(
        f"{dtype}, {threads} thread{'s' if threads > 1 else ''}: P = {m.flops / 1e9:.0f} GFLOP/s ({m.flops_by}), "
        f"BW = {m.bandwidth / 1e9:.1f} GB/s"
        for (dtype, threads), m in report.machines.items()
    )
    lines = [
        f"- {about['processor']}, {about['cores']} cores, {about['vectors'] or 'no'} vectors, "
        f"{about['memory_gib']} GiB, {about['system']}; load before the run {about.get('load_before', NOTHING)}.",
        f"- nblora {about['nblora']}; "
        + ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
        + ".",
        f'- Suite "{report.suite}": {settings["rounds"]} rounds, bursts of {settings["burst"]} s, peers in turn.',
    ]
    if about.get("device"):
        lines.append(f"- Device: {about['device']}.")
    if report.busy:
        lines.append(f"- **{report.busy[0].upper()}{report.busy[1:]}.**")
    if limits:
        lines.append(f"- Measured limits: {limits}.")
    lines += [f"- Not compared: {name}, {why}." for name, why in report.skipped.items()]
    return "\n".join(lines)


def _peers_in(report: Report, results: Iterable[CaseResult]) -> list[str]:
    seen = {name for result in results for name in (*result.seconds, *result.faults)}
    return [name for name in report.peers if name in seen and name != BASELINE]


def group_table(report: Report, group: Group, results: list[CaseResult], quartiles: bool) -> str:
    """One row a case: nblora's time, its fraction of the limit, and how much longer each peer takes."""
    peers = _peers_in(report, results)
    rows = []
    for result in results:
        case, own = result.case, result.time()
        fraction = result.fraction(report.limit(case))
        row = [
            group.label(case),
            milliseconds(own.median if own else None),
            NOTHING if fraction is None else f"{fraction:.2f}",
        ]
        for name in peers:
            ratio = result.ratio(name)
            if name in result.faults:
                row.append("wrong" if result.faults[name].startswith("wrong") else "failed")
            elif quartiles:
                row.append(_with_quartiles(ratio))
            else:
                row.append(NOTHING if ratio is None else times(ratio.median))
        rows.append(row)
    header = ["N × in × out, rank", "nblora, ms", "of the limit", *(f"{name} takes" for name in peers)]
    return f"**{group.name}**\n\n{table(header, rows)}"


def goals_table(report: Report) -> str:
    """Each group's goals, beside the worst case of the group."""
    rows = []
    for group, results in report.measured_groups():
        for against, goal in group.goals.items():
            found = []
            for result in results:
                value = _reached(report, result, against)
                if value is not None:
                    found.append((value, group.label(result.case)))
            if found:
                worst, where = min(found)
                reached = sum(value >= goal for value, _ in found)
                label = "fraction of the limit" if against == LIMIT else against
                rows.append([group.name, label, f"{goal:.2f}", f"{worst:.2f}", where, f"{reached} of {len(found)}"])
    header = ["cases", "against", "goal", "worst", "at", "reached in"]
    return table(header, rows) if rows else ""


def _reached(report: Report, result: CaseResult, against: str) -> float | None:
    if against == LIMIT:
        return result.fraction(report.limit(result.case))
    ratio = result.ratio(against)
    return ratio.median if ratio else None


def overview_table(report: Report) -> str:
    """One row a group: the range of its medians, for a README."""
    peers = _peers_in(report, report.results)
    rows = []
    for group, results in report.measured_groups():
        row = [f"{group.name} ({len(results)})"]
        fractions = [f for result in results if (f := result.fraction(report.limit(result.case))) is not None]
        row.append(_span(fractions, lambda value: f"{value:.2f}"))
        for name in peers:
            row.append(_span([ratio.median for result in results if (ratio := result.ratio(name))], times))
        rows.append(row)
    return table(["cases (how many)", "of the limit", *(f"{name} takes" for name in peers)], rows)


def _span(values: Sequence[float], show: Any) -> str:
    if not values:
        return NOTHING
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} – {high}"


def comparison_table(report: Report) -> str:
    """Pairs of cases that should cost the same, or a known part: odd shapes, the other layout, one thread."""
    known = {result.case: result.time() for result in report.results}
    rows = []
    for case, own in known.items():
        if case.kind != "step" or own is None:
            continue
        for label, twin, goal in _twins(case, report):
            other = known.get(twin)
            if other is not None:
                elements = case.in_features * case.out_features / (twin.in_features * twin.out_features)
                rows.append([f"{label}, {case.shape}", f"{own.median / other.median / elements:.2f}", goal])
    return table(["nblora's step, for each element of the weight", "takes", "goal"], rows) if rows else ""


def _twins(case: Case, report: Report) -> list[tuple[str, Case, str]]:
    twins = []
    if case.layout == "fullyconnected":
        twins.append(("FullyConnected against Dense", replace(case, layout="dense"), "≤ 1.10"))
    if (case.in_features, case.out_features) == (1000, 997):
        twins.append(("out = 997 against 1000", replace(case, out_features=1000), "≤ 1.10"))
        twins.append(("1000 × 997 against 1024 × 1024", replace(case, in_features=1024, out_features=1024), "≤ 1.10"))
    most = max(result.case.threads for result in report.results)
    if case.threads == 1 < most:
        goal = "≥ 1.70" if case.n >= 256 else ""
        twins.append((f"one thread against {most}", replace(case, threads=most), goal))
    return twins


def startup_table(report: Report) -> str:
    """Seconds to the end of the first step, and its parts."""
    rows = []
    for row in report.startup:
        name = f"{row['peer']}, {row['cache']} cache"
        if "fault" in row:
            rows.append([name, "failed", "", "", ""])
            continue
        first, steady = row["first"]["median"], row["steady"]["median"]
        parts = [row["seconds"]["median"], row["import"]["median"], row["set_up"]["median"], max(0.0, first - steady)]
        rows.append([name, *(f"{part:.2f}" for part in parts)])
    header = ["seconds", "process start to end of first step", "import", "set-up", "compiling and loading"]
    return table(header, rows) if rows else ""


def memory_table(report: Report) -> str:
    """MiB beyond the arrays."""
    rows = []
    for row in report.memory:
        label = f"{row['peer']}, {row['kind']}"
        if "fault" in row:
            rows.append([label, "failed", ""])
        else:
            rows.append([label, f"{row['bytes'] / 2**20:.1f}", f"{row['arrays'] / 2**20:.1f}"])
    if not rows:
        return ""
    sizes = next((" × ".join(map(str, row["sizes"])) for row in report.memory if "sizes" in row), "")
    return table([f"peak of three steps, {sizes}", "MiB beyond the arrays", "MiB of arrays"], rows)


def _growth_factor(factor: float, n: int) -> str:
    return f"**{factor:.2f}**" if factor > DOUBLING_GOAL and n >= 2 * DOUBLING_FROM else f"{factor:.2f}"


def growth_tables(report: Report) -> str:
    """Time against one size, and the factor of each doubling."""
    parts = []
    for name, results in report.growth.items():
        rows, before = [], None
        for result in results:
            taken, case = result.time(), result.case
            if taken is None:
                continue
            factor = NOTHING if before is None else _growth_factor(taken.median / before, case.n)
            fraction = result.fraction(report.limit(case))
            size = case.threads if name == "threads" else getattr(case, SIZES[name])
            rows.append(
                [str(size), milliseconds(taken.median), factor, NOTHING if fraction is None else f"{fraction:.2f}"]
            )
            before = taken.median
        if rows:
            fixed = results[0].case
            others = f"step at {fixed.shape}, {fixed.dtype}, and on"
            parts.append(f"Against {name} ({others}):\n\n" + table([name, "ms", "factor", "of the limit"], rows))
    if parts:
        parts.append(
            f"Goal: a doubling costs at most {DOUBLING_GOAL} times, from N = {DOUBLING_FROM} on; more is in bold."
        )
    return "\n\n".join(parts)


def neighbour_table(report: Report) -> str:
    """The step alone and with a busy core: how much slower, and what becomes of the ratios."""
    if set(report.neighbour) != {"quiet", "busy"}:
        return ""
    quiet, busy = report.neighbour["quiet"], report.neighbour["busy"]
    rows = []
    for name in [BASELINE, *_peers_in(report, [quiet, busy])]:
        alone, beside = quiet.time(name), busy.time(name)
        if alone is None or beside is None:
            rows.append([name, "failed", "failed", "", "", ""])
            continue
        ratios = [_ratio_text(result.ratio(name)) if name != BASELINE else "" for result in (quiet, busy)]
        slowdown = f"{beside.median / alone.median:.2f}"
        rows.append([name, milliseconds(alone.median), milliseconds(beside.median), slowdown, *ratios])
    header = [
        f"step, {quiet.case.shape}",
        "quiet, ms",
        "busy, ms",
        "slower by",
        "takes, quiet",
        "takes, busy",
    ]
    return f"{table(header, rows)}\n\n{NEIGHBOUR_GOALS}"


def _ratio_text(ratio: Spread | None) -> str:
    return NOTHING if ratio is None else times(ratio.median)


SECTIONS = (
    ("Goals and the worst case of each group", goals_table),
    ("Pairs of cases", comparison_table),
    ("Start-up", startup_table),
    ("Memory", memory_table),
    ("Growth", growth_tables),
    ("A busy neighbour", neighbour_table),
)
LEGEND = (
    "\"takes\": the peer's time over nblora's, the median of the rounds' pairs; in bold where the peer is faster. "
    '"of the limit": the least time that the measured P and BW allow, over nblora\'s.'
)


def full_text(report: Report, quartiles: bool = True, heading: str = "##") -> str:
    """Every table, as the docs show them."""
    parts = [machine_text(report), LEGEND]
    parts += [group_table(report, group, results, quartiles) for group, results in report.measured_groups()]
    for title, make in SECTIONS:
        content = make(report)
        if content:
            parts += [f"{heading} {title}", content]
    return "\n\n".join(parts) + "\n"


def readme_text(report: Report) -> str:
    """The short table, with the machine's description."""
    return "\n\n".join([overview_table(report), LEGEND, machine_text(report)])
