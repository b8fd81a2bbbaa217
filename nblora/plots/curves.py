"""Lines: learning curves, accuracy against parameters, spectra, stable rank."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import label_axes, legend_below, line_style, new_axes, style, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_POINTS = 25  # lines of more get their markers thinned out


def learning_curves(
    curves: Mapping[str, Any],
    *,
    steps: Sequence[float] | None = None,
    x_label: str = "epochs",
    y_label: str = "accuracy (fraction of samples)",
    title: str | None = None,
    looks: Mapping[str, int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the mean over seeds of each curve, with a band of one standard deviation.

    Parameters
    ----------
    curves : mapping of names to array_like, shape (seeds, steps) or (steps,)
        One row a seed. NaN marks a value that is missing.
    steps : sequence of float, optional
        Places on the horizontal axis, shared by all curves; 1, 2, ... without it.
    x_label, y_label, title : str
        What stands at the figure's edges; labels carry their unit.
    looks : mapping of names to int, optional
        The number of each name's colour and marker, the same in figures side by side; without it they are counted.
    ax : Axes, optional
        Where to draw; a new figure without it.

    Returns
    -------
    Axes
    """
    if not curves:
        raise ValueError("curves must not be empty: give at least one name with its values")
    ax = ax if ax is not None else new_axes()
    seeds = set()
    with style():
        for place, (name, values) in enumerate(curves.items()):
            rows = np.atleast_2d(np.asarray(values, np.float64))
            x = np.arange(1, rows.shape[1] + 1) if steps is None else np.asarray(steps)[: rows.shape[1]]
            mean, spread = _mean_and_spread(rows)
            look = line_style((looks or {}).get(name, place))
            ax.plot(x, mean, label=name, markevery=max(1, len(x) // MANY_POINTS), **look)
            if len(rows) > 1:
                ax.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.18, linewidth=0)
            seeds.add(len(rows))
        several = max(seeds) > 1
        count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        legend_below(ax, f"mean ± 1 s.d. over {count} seeds" if several else None, curves)
    whole_numbers(ax.xaxis)
    label_axes(ax, title, x_label, y_label)
    return ax


def accuracy_against_parameters(
    points: Mapping[str, tuple[float, Any]],
    *,
    x_label: str = "trainable parameters (count, logarithmic)",
    y_label: str = "accuracy (fraction of samples)",
    title: str | None = None,
    looks: Mapping[str, int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw what each method reached against what it had to train.

    Parameters
    ----------
    points : mapping of names to pairs (parameter count, accuracies over seeds)
        The accuracies may be one number.
    x_label, y_label, title, looks, ax
        As in `learning_curves`.

    Returns
    -------
    Axes
    """
    if not points:
        raise ValueError("points must not be empty: give at least one name with its parameters and accuracies")
    ax = ax if ax is not None else new_axes()
    with style():
        for place, (name, (parameters, accuracies)) in enumerate(points.items()):
            values = np.atleast_1d(np.asarray(accuracies, np.float64))
            mean, spread = _mean_and_spread(values[:, None])
            look = line_style((looks or {}).get(name, place)) | {"linestyle": "none", "markersize": 8}
            ax.errorbar([parameters], mean, yerr=spread if len(values) > 1 else None, capsize=4, label=name, **look)
        several = any(np.size(accuracies) > 1 for _, accuracies in points.values())
        ax.set_xscale("log")
        _plain_logarithmic_ticks(ax)
        ax.margins(x=0.15, y=0.15)
        legend_below(ax, "mean ± 1 s.d. over seeds" if several else None, points)
    label_axes(ax, title, x_label, y_label)
    return ax


def singular_values(
    spectra: Mapping[str, Any],
    *,
    x_label: str = "index of the singular value (largest first)",
    y_label: str = "singular value (weight units, logarithmic)",
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the singular values of one or more matrices, or of one matrix through training.

    Parameters
    ----------
    spectra : mapping of names to array_like
        One-dimensional values are singular values; a matrix has its own computed.
    x_label, y_label, title, ax
        As in `learning_curves`.

    Returns
    -------
    Axes
    """
    if not spectra:
        raise ValueError("spectra must not be empty: give at least one name with its values")
    ax = ax if ax is not None else new_axes()
    with style():
        for place, (name, values) in enumerate(spectra.items()):
            array = np.asarray(values, np.float64)
            spectrum = np.linalg.svd(array, compute_uv=False) if array.ndim == 2 else np.sort(array)[::-1]
            visible = np.where(spectrum > _rounding(spectrum), spectrum, np.nan)  # rounding is no singular value
            x = np.arange(1, len(visible) + 1)
            ax.plot(x, visible, label=name, markevery=max(1, len(x) // MANY_POINTS), **line_style(place))
        ax.set_yscale("log")
        legend_below(ax, None, spectra)
    whole_numbers(ax.xaxis)
    label_axes(ax, title, x_label, y_label)
    return ax


def stable_rank_curves(
    ranks: Mapping[str, Any],
    *,
    steps: Sequence[float] | None = None,
    x_label: str = "epochs",
    y_label: str = "stable rank ‖M‖²_F / ‖M‖²₂ (no unit)",
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the stable rank of each layer's change through training.

    Parameters
    ----------
    ranks : mapping of names to array_like, shape (seeds, steps) or (steps,)
        As `nblora`'s `diagnostics()["stable_rank"]` gives them.
    steps, x_label, y_label, title, ax
        As in `learning_curves`.

    Returns
    -------
    Axes
    """
    ax = learning_curves(ranks, steps=steps, x_label=x_label, y_label=y_label, title=title, ax=ax)
    ax.set_ylim(bottom=0)
    return ax


def _mean_and_spread(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis, NaN where nothing is there; one row spreads by 0."""
    there = np.isfinite(rows)
    count = there.sum(0)
    filled = np.where(there, rows, 0.0)
    mean = np.where(count > 0, filled.sum(0) / np.maximum(count, 1), np.nan)
    squares = np.where(there, (rows - mean) ** 2, 0.0).sum(0)
    return mean, np.sqrt(squares / np.maximum(count - 1, 1))


def _rounding(spectrum: np.ndarray) -> float:
    """Below this a singular value of a float32 matrix is an accident of rounding."""
    return float(np.max(spectrum, initial=0.0)) * len(spectrum) * float(np.finfo(np.float32).eps) / 2


def _plain_logarithmic_ticks(ax: "Axes") -> None:
    """1, 2 and 5 of each power of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
