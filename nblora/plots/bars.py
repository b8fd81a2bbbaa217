"""Bars and intervals: benchmark times side by side, differences between methods."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import SIZE, bar_style, label_axes, legend_below, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FEW_CASES = 3  # bars of fewer are no thicker than of so many


def benchmark_bars(
    times: Mapping[str, Mapping[str, Any]],
    *,
    x_label: str = "median time a call (ms, shorter is better)",
    title: str | None = None,
    logarithmic: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how long each contender took for each case, as horizontal bars.

    Parameters
    ----------
    times : mapping of cases to mappings of contenders to numbers
        The number is a median, or a triple (median, low, high), whose spread is drawn as a whisker. A contender may be
        missing from a case.
    x_label, title, ax
        As in `learning_curves`; `x_label` names the unit.
    logarithmic : bool
        For times that differ by more than a factor of 30 or so.

    Returns
    -------
    Axes
    """
    contenders = list(dict.fromkeys(name for case in times.values() for name in case))
    if not contenders:
        raise ValueError("times must not be empty: give at least one case with one contender")
    count = sum(len(case) for case in times.values())
    ax = ax if ax is not None else new_axes((SIZE[0], 1.4 + 0.24 * count + 0.16 * len(times)))
    thickness = 0.8 / len(contenders)
    ends: list[tuple[float, float, float]] = []
    with style():
        for place, name in enumerate(contenders):
            there = [row for row, case in enumerate(times.values()) if name in case]
            triples = np.array([_triple(case[name]) for case in times.values() if name in case])
            y = np.array(there) + (place - (len(contenders) - 1) / 2) * thickness
            median, low, high = triples.T
            ax.barh(y, median, thickness, label=name, **bar_style(place))
            ax.errorbar(
                median, y, xerr=[median - low, high - median], fmt="none", ecolor="black", capsize=2, elinewidth=0.8
            )
            ends.extend(zip(high, y, median, strict=True))
        for end, height, value in ends:
            ax.annotate(
                f"{value:.3g}", (end, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        ax.set_yticks(range(len(times)), list(times))
        ax.invert_yaxis()
        if len(times) < FEW_CASES:  # no bar is a wall
            ax.set_ylim((len(times) + FEW_CASES) / 2 - 0.5, (len(times) - FEW_CASES) / 2 - 0.5)
        ax.grid(False, axis="y")
        ax.margins(x=0.12)
        if logarithmic:
            ax.set_xscale("log")
        if len(contenders) > 1:
            legend_below(ax, None, contenders)
    label_axes(ax, title, x_label, "")
    return ax


def difference_intervals(
    differences: Mapping[str, Sequence[float]],
    *,
    x_label: str = "difference of accuracy (fraction of samples)",
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw differences between methods with their intervals, beside a line at zero.

    Parameters
    ----------
    differences : mapping of names to (difference, low, high) or (difference, low, high, decided)
        What is undecided is drawn hollow; without the fourth that is an interval that holds zero.
    x_label, title, ax
        As in `learning_curves`.

    Returns
    -------
    Axes
    """
    if not differences:
        raise ValueError("differences must not be empty: give at least one name with its difference, low and high")
    ax = ax if ax is not None else new_axes((SIZE[0], 1.4 + 0.36 * max(2, len(differences))))
    with style():
        ax.axvline(0, color="black", linewidth=1, linestyle="--")
        for place, (middle, low, high, *decided) in enumerate(differences.values()):
            hollow = not decided[0] if decided else low <= 0 <= high
            errors = [[middle - low], [high - middle]]
            face = "white" if hollow else "black"
            ax.errorbar([middle], [place], xerr=errors, fmt="o", color="black", markerfacecolor=face, capsize=4)
        ax.set_yticks(range(len(differences)), list(differences))
        ax.set_ylim(len(differences) - 0.5, -0.5)
        ax.grid(False, axis="y")
    label_axes(ax, title, x_label, "")
    return ax


def _triple(value: Any) -> tuple[float, float, float]:
    if np.ndim(value) == 0:
        return float(value), float(value), float(value)
    median, low, high = (float(number) for number in value)
    return median, low, high
