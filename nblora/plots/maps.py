"""Heat maps: matrices, and two settings of a sweep against each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import COLOUR_MAP, label_axes, new_axes, style, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_CELLS = 200  # maps of more carry no numbers: they would overlap


def matrix_heat_map(
    matrix: Any,
    *,
    x_label: str = "output feature (index)",
    y_label: str = "input feature (index)",
    value_label: str = "value (weight units)",
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a matrix, such as a delta D or a low-rank product A B, with zero in the middle of the colours.

    Parameters
    ----------
    matrix : array_like, shape (in_features, out_features)
        Values that are not finite stay white.
    value_label : str
        What the colours mean, with the unit.
    x_label, y_label, title, ax
        As in `learning_curves`.

    Returns
    -------
    Axes
    """
    values = np.asarray(matrix, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"matrix must have two axes and not be empty, got shape {values.shape}")
    ax = ax if ax is not None else new_axes((5.6, 4.6))
    limit = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0)) or 1.0
    with style():
        image = ax.imshow(values, cmap=COLOUR_MAP, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        ax.grid(False)
        ax.figure.colorbar(image, ax=ax, label=value_label)
    whole_numbers(ax.xaxis, ax.yaxis)
    label_axes(ax, title, x_label, y_label)
    return ax


def sweep_heat_map(
    values: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    x_label: str,
    y_label: str,
    value_label: str = "accuracy (fraction of samples)",
    title: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a table of results: one setting down, another across, each cell with its number.

    Parameters
    ----------
    values : array_like, shape (len(rows), len(columns))
        NaN marks a combination that was not run; it stays white.
    rows, columns : sequence
        The values of the settings.
    x_label, y_label : str
        The settings' names.
    value_label : str
        What the numbers are, with the unit.
    title, ax
        As in `learning_curves`.

    Returns
    -------
    Axes
    """
    table = np.asarray(values, np.float64)
    if table.shape != (len(rows), len(columns)) or not table.size:
        raise ValueError(f"values must have shape ({len(rows)}, {len(columns)}) and not be empty, got {table.shape}")
    ax = ax if ax is not None else new_axes((1.8 + 0.9 * max(4, len(columns)), 1.6 + 0.5 * max(4, len(rows))))
    with style():
        image = ax.imshow(np.ma.masked_invalid(table), cmap=COLOUR_MAP, aspect="auto", interpolation="nearest")
        ax.grid(False)
        ax.set_xticks(range(len(columns)), [_text(value) for value in columns])
        ax.set_yticks(range(len(rows)), [_text(value) for value in rows])
        ax.figure.colorbar(image, ax=ax, label=value_label)
        if table.size <= MANY_CELLS:
            _write_numbers(ax, table, image)
    label_axes(ax, title, x_label, y_label)
    return ax


def _write_numbers(ax: "Axes", table: np.ndarray, image: Any) -> None:
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            colour = "black" if image.norm(value) > 0.5 else "white"  # the map is light at its upper end
            ax.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
