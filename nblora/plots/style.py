"""One style for every figure of nblora: told apart by lightness, dashes, markers and hatches, so readable in grey."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from nblora.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's colours, which colour-blind readers tell apart, ordered so that neighbours differ in lightness;
# where two are close all the same, dashes and markers tell them apart.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#CC79A7", "#009E73")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo")
COLOUR_MAP = "cividis"  # its lightness rises from end to end, so the order of the values survives in grey
SIZE = (6.4, 4.0)  # inches
MAPPING = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 144,
    "font.size": 10,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "nblora",  # the same figure, the same file
}


def require_matplotlib() -> Any:
    """Return the matplotlib package; MissingExtraError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib: pip install 'nblora[plot]'") from error
    return matplotlib


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in nblora's style inside the `with` block; matplotlib's own settings return after it."""
    with require_matplotlib().rc_context(MAPPING):
        yield


def new_axes(size: tuple[float, float] = SIZE) -> "Axes":
    """Axes of a new figure in nblora's style."""
    require_matplotlib()
    from matplotlib import pyplot

    with style():
        axes: Axes = pyplot.subplots(figsize=size, layout="constrained")[1]
    return axes


def line_style(place: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line that is drawn as number `place`, counted from 0."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def bar_style(place: int) -> dict[str, Any]:
    """Colour and hatch of the bars that are drawn as number `place`, counted from 0."""
    light = ("#0072B2", "#F3CF80", "#7F7F7F", "#AADAF4", "#EA9F6F", "#4FBF9F", "#E5BCD3")
    return {
        "facecolor": light[place % len(light)],
        "hatch": HATCHES[place % len(HATCHES)],
        "edgecolor": "black",
        "linewidth": 0.6,
    }


def legend_below(ax: "Axes", title: str | None, names: Iterable[str]) -> None:
    """Write the legend below the label of the x axis: inside, it would hide curves, bars or their spread."""
    length = sum(map(len, names))
    columns = 4 if length <= 40 else 2 if length <= 240 else 1  # a wider legend would take its width from the axes
    ax.legend(
        title=title, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=4.5, ncols=columns, columnspacing=1,
        alignment="left",
    )  # fmt: skip


def whole_numbers(*axes: "Axis") -> None:
    """Write no ticks between whole numbers, which count or number something, on these axes."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def label_axes(ax: "Axes", title: str | None, x_label: str, y_label: str) -> None:
    """Write the title, where there is one, and the labels of both axes."""
    with style():
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        if title:
            ax.set_title(title)
