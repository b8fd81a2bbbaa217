"""The report as pictures: ratios to the peers with the fraction of the limit, and growth. Readable in grey."""

from pathlib import Path
from typing import Any

from nblora.errors import MissingExtraError

from .peers import BASELINE
from .report import Report
from .suites import Group
from .summary import CaseResult
from .tables import SIZES

MARKERS = ("o", "s", "D", "^", "v", "P", "X")
MANY = 80  # cases in one picture; a longer report shows the groups with goals


def require_pyplot() -> Any:
    """Return matplotlib's figure class, without a window system; MissingExtraError where it is not installed."""
    try:
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise MissingExtraError("charts need matplotlib: pip install 'nblora[plot]'") from None
    return matplotlib


def _shown(report: Report) -> list[tuple[Group, list[CaseResult]]]:
    groups = [(group, [r for r in results if r.time() is not None]) for group, results in report.measured_groups()]
    if sum(len(results) for _, results in groups) > MANY:
        groups = [(group, results) for group, results in groups if group.goals]
    return [(group, results) for group, results in groups if results]


def draw_cases(report: Report, path: Path) -> bool:
    """Draw each case's ratios on the left and fractions of the limit on the right; False where there is nothing."""
    groups = _shown(report)
    if not groups:
        return False
    matplotlib = require_pyplot()
    peers = [name for name in report.peers if name != BASELINE]
    labels: list[str] = []
    heads: list[tuple[float, str]] = []
    rows: list[tuple[float, CaseResult]] = []
    y = 0.0
    for group, results in groups:
        heads.append((y, group.name))
        y += 1
        for result in results:
            rows.append((y, result))
            labels.append(group.label(result.case))
            y += 1
        y += 0.4
    figure = matplotlib.figure.Figure(figsize=(11, 2.2 + 0.21 * y), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _ratios(left, rows, peers)
    _fractions(right, report, rows)
    left.set_yticks([position for position, _ in [*rows, *heads]], [*labels, *(name for _, name in heads)], fontsize=7)
    for label in left.get_yticklabels()[len(rows) :]:
        label.set_fontweight("bold")
    left.set_ylim(y, -1)
    left.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    left.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    return True


def _ratios(axes: Any, rows: list[tuple[float, CaseResult]], peers: list[str]) -> None:
    axes.set_xscale("log")
    for index, name in enumerate(peers):
        grey = str(0.65 * index / max(1, len(peers) - 1))
        points = [(ratio, y) for y, result in rows if (ratio := result.ratio(name))]
        if not points:
            continue
        axes.hlines([y for _, y in points], [r.q1 for r, _ in points], [r.q3 for r, _ in points], color=grey, lw=1)
        for lost in (False, True):  # hollow where the peer is faster
            some = [(ratio.median, y) for ratio, y in points if (ratio.median < 1) == lost]
            if some:
                face = {"facecolors": "white", "edgecolors": grey} if lost else {"color": grey}
                axes.scatter(*zip(*some, strict=True), marker=MARKERS[index % len(MARKERS)], s=26, zorder=3, **face)
        axes.scatter([], [], marker=MARKERS[index % len(MARKERS)], color=grey, label=name)
    low, high = axes.get_xlim()
    low, high = min(low, 0.8), max(high, 2.5)
    axes.axvspan(low, 1, color="0.9", zorder=0, label="peer faster (hollow)")
    axes.axvline(1, color="black", lw=1)
    axes.set_xlim(low, high)
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= t <= high]
    axes.set_xticks(ticks)
    axes.grid(axis="x", color="0.85", lw=0.5)
    axes.set_xlabel("peer's time / nblora's time (quartiles as lines)")


def _fractions(axes: Any, report: Report, rows: list[tuple[float, CaseResult]]) -> None:
    bars = [(y, fraction) for y, r in rows if (fraction := r.fraction(report.limit(r.case))) is not None]
    axes.barh(
        [y for y, _ in bars], [fraction for _, fraction in bars], height=0.7, color="0.6", label="nblora, of the limit"
    )
    best = []
    for y, result in rows:
        others = [f for n in result.seconds if n != BASELINE and (f := result.fraction(report.limit(result.case), n))]
        if others:
            best.append((max(others), y))
    if best:
        axes.scatter(
            *zip(*best, strict=True), marker="|", s=60, color="black", label="best peer, of the limit", zorder=3
        )
    axes.axvline(1, color="black", lw=1)
    axes.set_xlabel("fraction of the machine's limit")
    axes.grid(axis="x", color="0.85", lw=0.5)
    axes.tick_params(labelleft=False)


def draw_growth(report: Report, path: Path) -> bool:
    """Draw nblora's step against each size, with the limit; False where there is nothing."""
    curves = {name: [r for r in results if r.time()] for name, results in report.growth.items()}
    curves = {name: results for name, results in curves.items() if len(results) > 1}
    if not curves:
        return False
    everything = [1e3 * spread.median for results in curves.values() for r in results if (spread := r.time())]
    matplotlib = require_pyplot()
    figure = matplotlib.figure.Figure(figsize=(2.6 * len(curves) + 0.6, 3.0), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for one, (name, results) in zip(axes, curves.items(), strict=True):
        sizes = [r.case.threads if name == "threads" else getattr(r.case, SIZES[name]) for r in results]
        taken = [spread.median for r in results if (spread := r.time())]
        one.loglog(sizes, [1e3 * seconds for seconds in taken], "o-", color="black", ms=4, label="nblora")
        fractions = [r.fraction(report.limit(r.case)) for r in results]
        if all(fractions):
            limits = [1e3 * s * f for s, f in zip(taken, fractions, strict=True) if f is not None]
            one.loglog(sizes, limits, "--", color="0.5", label="limit")
        one.set_xticks(sizes, [str(size) for size in sizes], fontsize=6, rotation=60)
        one.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        one.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        one.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        one.tick_params(axis="y", which="both", labelsize=6)
        one.set_ylim(min(everything) / 2, max(everything) * 2)
        one.set_xlabel(name)
        one.grid(color="0.85", lw=0.5)
    axes[0].set_ylabel("milliseconds a step")
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)
    return True
