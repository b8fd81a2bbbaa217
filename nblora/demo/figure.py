"""The demo's figure: learning curves with a band over the seeds, and a heat map of the learned delta."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nblora.errors import MissingExtraError
from nblora.storage.atomic import replace_whole

from .results import DemoResult, MethodResult, NetworkResult, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by line style, marker and lightness, so that a grey print can be read.
STYLES = {
    "Head only": {"color": "#7f7f7f", "linestyle": ":", "marker": "s"},
    "LoRA": {"color": "#e69f00", "linestyle": "--", "marker": "^"},
    "Delta-LoRA": {"color": "#0a3d7a", "linestyle": "-", "marker": "o"},
    "Full": {"color": "#b3404a", "linestyle": "-.", "marker": "D"},
}


def write_figure(result: DemoResult) -> Path:
    """Draw figure.png in the demo's folder and return its path.

    Raises
    ------
    MissingExtraError
        Where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "the figure needs matplotlib, which is not installed: pip install 'nblora[demo]'"
        ) from error
    networks = {"dense": result.dense}
    if result.convolutional is not None:
        networks["convolutional"] = result.convolutional
    figure = Figure(figsize=(6 + 6 * len(networks), 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's matplotlib is set to
    *curves, heat_map = figure.subplots(1, len(networks) + 1, width_ratios=(*[1.15] * len(networks), 1))
    for axes, (name, network) in zip(curves, networks.items(), strict=True):
        _draw_curves(axes, name, network)
    _draw_delta(figure, heat_map, result)
    path = result.settings.output / "figure.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    with replace_whole(path) as file:
        file.write(picture.getvalue())
    return path


def _draw_curves(axes: "Axes", name: str, result: NetworkResult) -> None:
    for row in result.methods:
        _draw_band(axes, row)
    start = 100 * mean(result.before.test_accuracy)
    axes.axhline(start, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    across = axes.get_yaxis_transform()  # x in fractions of the axes, y in data
    axes.text(0.98, start, f"not adapted, test: {start:.1f} %", transform=across, ha="right", va="bottom", fontsize=9)
    seeds = len(result.before.test_accuracy)
    axes.set_xlabel("epoch of adaptation")
    axes.set_ylabel("accuracy on the shifted validation split [%]")
    axes.set_title(f"The {name} network: mean and range over {seeds} seed{'' if seeds == 1 else 's'}")
    axes.set_ylim(0, 100)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.13), framealpha=0.9)


def _draw_band(axes: "Axes", row: MethodResult) -> None:
    accuracies = 100 * np.array([[epoch["val_accuracy"] for epoch in curve] for curve in row.curves])
    epochs = [epoch["epoch"] for epoch in row.curves[0]]
    style: dict[str, Any] = STYLES[row.method]
    axes.fill_between(epochs, accuracies.min(axis=0), accuracies.max(axis=0), color=style["color"], alpha=0.2, lw=0)
    label = f"{row.method}, {row.trainable_parameters:,} trainable"
    every = max(1, len(epochs) // 10)
    axes.plot(epochs, accuracies.mean(axis=0), label=label, markevery=every, markersize=5, linewidth=1.8, **style)


def _draw_delta(figure: "Figure", axes: "Axes", result: DemoResult) -> None:
    delta = result.learned_delta
    axes.set_title(f"Learned delta $c\\,D$ of the first dense hidden layer, seed {result.settings.seed}")
    axes.set_xlabel("output: hidden unit")
    axes.set_ylabel("input: pixel, row by row")
    # cividis rises evenly in lightness, so a grey print shows the same order of values.
    limit = float(np.max(np.abs(delta))) or 1.0
    image = axes.imshow(delta, aspect="auto", cmap="cividis", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_yticks(range(0, delta.shape[0], 8))
    figure.colorbar(image, ax=axes, label="change of the weight")
