"""The report as pictures: ratios to the peers with the fraction of the limit, and growth. Readable in grey."""

from pathlib import Path
from typing import Any

from nblora.plots import learning_curves
from nblora.plots.style import bar_style, label_axes, line_style, require_matplotlib, style

from .peers import BASELINE
from .report import Report
from .summary import CaseResult
from .tables import SIZES

MANY = 80  # cases in one picture; a longer report shows the groups with goals
TICKS = (0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)


def draw_cases(report: Report, path: Path) -> bool:
    """Draw each case's ratios on the left and fractions of the limit on the right; False where there is nothing."""
    groups = [(group, [r for r in results if r.time()]) for group, results in report.measured_groups()]
    if sum(len(results) for _, results in groups) > MANY:
        groups = [(group, results) for group, results in groups if group.goals]
    lines: list[tuple[str, CaseResult | None]] = []  # from the top: a group's name, then its cases
    for group, results in groups:
        lines += [(group.name, None), *((group.label(result.case), result) for result in results)] if results else []
    rows = [(y, result) for y, (_, result) in enumerate(lines) if result]
    if not rows:
        return False
    figure, (left, right) = _figure(1, 2, (11, 2.2 + 0.21 * len(lines)), sharey=True, width_ratios=(3, 2))
    with style():
        _ratios(left, rows, report.peers_in(report.results))
        _fractions(right, report, rows)
        left.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=7)
        for label, (_, result) in zip(left.get_yticklabels(), lines, strict=True):
            label.set_fontweight("normal" if result else "bold")
        left.set_ylim(len(lines), -1)
        figure.legend(loc="outside upper center", ncols=4, fontsize=8)
        figure.savefig(path)
    return True


def _figure(rows: int, columns: int, size: tuple[float, float], **settings: Any) -> tuple[Any, Any]:
    """A figure that no window system knows of, and its axes."""
    require_matplotlib()
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns, **settings)


def _ratios(axes: Any, rows: list[tuple[int, CaseResult]], peers: list[str]) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=1)
    for place, name in enumerate(peers):
        look = line_style(place) | {"linestyle": "none"}
        for lost in (False, True):  # hollow where the peer is faster
            found = [(ratio, y) for y, r in rows if (ratio := r.ratio(name)) and (ratio.median < 1) == lost]
            median = [ratio.median for ratio, _ in found]
            errors = [[r.median - r.q1 for r, _ in found], [r.q3 - r.median for r, _ in found]]
            face = "white" if lost else look["color"]
            label = None if lost else name
            axes.errorbar(median, [y for _, y in found], xerr=errors, label=label, markerfacecolor=face, **look)
    low, high = min(axes.get_xlim()[0], 0.8), max(axes.get_xlim()[1], 2.5)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvspan(low, 1, color="0.9", zorder=0, label="peer faster (hollow)")
    axes.set_xlim(low, high)
    label_axes(axes, None, "peer's time / nblora's time (quartiles as lines)", "")


def _fractions(axes: Any, report: Report, rows: list[tuple[int, CaseResult]]) -> None:
    own = [(fraction, y) for y, r in rows if (fraction := report.fraction(r)) is not None]
    best = [
        (max(others), y)
        for y, r in rows
        if (others := [f for name in r.seconds if name != BASELINE and (f := report.fraction(r, name))])
    ]
    axes.barh([y for _, y in own], [f for f, _ in own], 0.7, label="nblora, of the limit", **bar_style(3))
    axes.plot([f for f, _ in best], [y for _, y in best], "|", ms=8, color="black", label="best peer, of the limit")
    axes.axvline(1, color="black", lw=1)
    axes.tick_params(labelleft=False)
    label_axes(axes, None, "fraction of the machine's limit", "")


def draw_growth(report: Report, path: Path) -> bool:
    """Draw nblora's step against each size, with the limit; False where there is nothing."""
    curves = {name: [r for r in results if r.time()] for name, results in report.growth.items()}
    curves = {name: results for name, results in curves.items() if len(results) > 1}
    if not curves:
        return False
    figure, grid = _figure(1, len(curves), (2.6 * len(curves) + 0.6, 3.0), squeeze=False, sharey=True)
    with style():
        for axes, (name, results) in zip(grid[0], curves.items(), strict=True):
            sizes = [getattr(result.case, SIZES[name]) for result in results]
            taken = [1e3 * spread.median for result in results if (spread := result.time())]
            limits = [ms * (report.fraction(result) or float("nan")) for ms, result in zip(taken, results, strict=True)]
            curves_of = {"nblora": taken, "limit": limits}
            learning_curves(curves_of, steps=sizes, x_label=name, y_label="milliseconds a step", ax=axes)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.label_outer()
            axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=6, rotation=60)
        figure.savefig(path)
    return True
