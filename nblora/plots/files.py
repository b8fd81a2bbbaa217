"""From a result file to its figure: which panels each kind gets, and what they show."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nblora.errors import FormatError
from nblora.layers import tree
from nblora.layers.projection import Projection
from nblora.results import ResultFile, read_result_file, understood

from .bars import benchmark_bars, difference_intervals
from .curves import accuracy_against_parameters, learning_curves, singular_values
from .maps import matrix_heat_map, sweep_heat_map
from .style import require_matplotlib, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (5.8, 4.2)  # inches
COLUMNS = 2  # panels side by side
MANY_CASES = 16  # of a benchmark in one figure; beyond, those with goals come first
ASKED_FIRST = ("rank", "delta_scaling", "alpha", "lr")
MANY_SPECTRA = 7  # lines in one panel, as many as there are styles
MANY_MODULES = 60  # bars in one panel
LONG_NAME = 60  # characters
WIDE = 30  # a factor between times from which the axis is logarithmic
Panel = Callable[["Axes"], object]


def draw_file(path: str | os.PathLike[str], *, metric: str | None = None) -> "Figure":
    """Draw the figure of one of nblora's result files.

    Parameters
    ----------
    path : path
        What `nblora sweep`, `compare`, `demo`, `bench` or `History.to_csv` wrote, or a saved adapter or model.
    metric : str, optional
        Of a sweep: "val_accuracy", "test_loss", ...; by default the accuracy, else the loss.

    Returns
    -------
    matplotlib.figure.Figure
        Not known to pyplot; `savefig` writes it as PNG, SVG or PDF.

    Raises
    ------
    FormatError
        For a file that is not one of them, or has nothing to draw.
    MissingExtraError
        Without matplotlib.
    """
    require_matplotlib()
    result = read_result_file(path)
    with understood(result.kind, os.fspath(path)):
        panels, title = _PANELS[result.kind](result, metric)
        return _figure(panels, f"{title} ({os.path.basename(os.fspath(path))})")


def _figure(panels: Sequence[Panel], title: str) -> "Figure":
    from matplotlib.figure import Figure

    with style():
        rows = -(-len(panels) // COLUMNS)
        columns = min(len(panels), COLUMNS)
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        figure.suptitle(title, fontsize=11)
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, draw in zip(places, panels, strict=False):
            draw(ax)
        for empty in places[len(panels) :]:
            empty.remove()
    return figure


# --- sweeps ----------------------------------------------------------------------------------------------------------


def _sweep(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    from nblora.sweep.summary import best_of_each_method, default_metric, over_seeds

    records = result.content
    try:
        chosen = metric or default_metric(records)
    except ValueError as error:
        raise FormatError(str(error)) from error
    groups = over_seeds(records, chosen)
    if not groups:
        raise FormatError(f"no run of this sweep has a result called {chosen!r}")
    best = best_of_each_method(records, chosen, chosen)
    points = _points(records, groups, chosen)
    looks = {name: place for place, name in enumerate(dict.fromkeys([*map(_size, best.values()), *points]))}
    panels: list[Panel] = [lambda ax: _curves_of_best(ax, records, best, chosen, looks)]
    if len({parameters for parameters, _ in points.values()}) > 1:
        panels.append(
            lambda ax: accuracy_against_parameters(
                points, y_label=_metric_label(chosen), title="Best setting of each size", looks=looks, ax=ax
            )
        )
    maps = [_sweep_map(method, [group for group in groups if group[0]["method"] == method], chosen) for method in best]
    panels += [panel for panel in maps if panel is not None]
    return panels, f"Sweep of {len(records)} runs"


def _curves_of_best(ax: "Axes", records: Any, best: Mapping[str, Any], metric: str, looks: Mapping[str, int]) -> None:
    column = f"val_{metric.partition('_')[2]}"
    curves = {}
    for settings, values in best.values():
        rows = [
            record["history"][column]
            for record in records
            if record["status"] == "done" and {k: v for k, v in record["settings"].items() if k != "seed"} == settings
        ]
        if len({len(row) for row in rows}) == 1:
            curves[_size((settings, values))] = rows
    learning_curves(curves, y_label=_metric_label(column), title="Best setting of each method", looks=looks, ax=ax)


def _size(group: tuple[Mapping[str, Any], Any]) -> str:
    """The method of a group of runs, and its rank: runs of one size."""
    settings, _ = group
    rank = settings.get("rank")
    return settings["method"] if rank is None else f"{settings['method']}, rank {rank}"


def _points(records: Any, groups: Any, metric: str) -> dict[str, tuple[int, list[float]]]:
    """The best setting of each method and number of parameters: those of a method get one name and many sizes."""
    sizes = {
        (record["settings"]["method"], record["settings"].get("rank")): record["trainable_parameters"]
        for record in records
        if record["status"] == "done"
    }
    points: dict[str, tuple[int, list[float]]] = {}
    for settings, values in groups:  # the best come first
        size = sizes[settings["method"], settings.get("rank")]
        points.setdefault(_size((settings, values)), (size, list(values.values())))
    return dict(sorted(points.items(), key=lambda point: point[1][0]))


def _sweep_map(method: str, groups: Any, metric: str) -> Panel | None:
    """Mean over seeds against the two settings that take the most values; None where fewer than two vary."""
    names = dict.fromkeys(name for settings, _ in groups for name in settings if name != "method")
    values = {
        name: sorted({settings[name] for settings, _ in groups if name in settings}, key=_order) for name in names
    }
    order = [*ASKED_FIRST, *names]  # among settings with as many values
    varied = sorted((n for n in names if len(values[n]) > 1), key=lambda n: (-len(values[n]), order.index(n)))
    if len(varied) < 2:
        return None
    down, across = varied[:2]
    table = np.full((len(values[down]), len(values[across])), np.nan)
    for settings, by_seed in groups:  # the best come first: where more settings vary, a cell shows its best
        cell = values[down].index(settings[down]), values[across].index(settings[across])
        if np.isnan(table[cell]):
            table[cell] = np.mean(list(by_seed.values()))
    others = f", best over {', '.join(varied[2:])}" if len(varied) > 2 else ""
    return lambda ax: sweep_heat_map(
        table,
        values[down],
        values[across],
        x_label=_setting_label(across),
        y_label=_setting_label(down),
        value_label=f"mean {_metric_label(metric).partition(' (')[0]}",
        title=f"{method}{others}",
        ax=ax,
    )


# --- the others ------------------------------------------------------------------------------------------------------


def _demo(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    content = result.content
    curves = {
        row["method"]: [[epoch["val_accuracy"] for epoch in curve] for curve in row["curves"]]
        for row in content["methods"]
    }
    points = {row["method"]: (row["trainable_parameters"], row["test_accuracy"]) for row in content["methods"]}
    label = "accuracy (fraction of images)"
    panels: list[Panel] = [
        lambda ax: learning_curves(curves, y_label=label, title="Validation split", ax=ax),
        lambda ax: accuracy_against_parameters(points, y_label=label, title="Test split", ax=ax),
    ]
    return panels, "Digits turned by 90° with noise, adapted in several ways"


def _table(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    columns = [name.removesuffix("_mean") for name in result.content[0] if name.endswith("accuracy_mean")]
    if metric is not None:
        if metric not in columns:
            raise FormatError(f"no column {metric!r}; there are {', '.join(columns)}")
        columns = [metric]
    panels: list[Panel] = []
    for column in columns:
        bars = {}
        for row in result.content:
            mean = _number(row[f"{column}_mean"])
            spread = _number(row[f"{column}_std"] or "0")
            bars[row["method"]] = {column: (mean, mean - spread, mean + spread)}
        label = f"{column.replace('_', ' ')} (fraction of images, mean ± 1 s.d.)"
        panels.append(lambda ax, b=bars, t=label: benchmark_bars(b, x_label=t, ax=ax))  # type: ignore[misc]  # the defaults bind the loop's values
    return panels, "Digits turned by 90° with noise, adapted in several ways"


def _curves(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    columns = [name for name in result.content[0] if name not in ("method", "seed", "epoch")]
    if metric is not None:
        if metric not in columns:
            raise FormatError(f"no column {metric!r}; there are {', '.join(columns)}")
        columns = [metric]
    panels: list[Panel] = []
    for column in columns:
        curves = _by_method(result.content, column)
        panels.append(lambda ax, c=curves, n=column: learning_curves(c, y_label=_metric_label(n), ax=ax))  # type: ignore[misc]  # the defaults bind the loop's values
    return panels, "Learning curves"


def _by_method(rows: list[dict[str, str]], column: str) -> dict[str, np.ndarray]:
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["seed"], []).append(_number(row[column]))
    length = max(len(values) for seeds in found.values() for values in seeds.values())
    return {
        method: np.array([values + [np.nan] * (length - len(values)) for values in seeds.values()])
        for method, seeds in found.items()
    }


def _history(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    rows = result.content
    steps = [_number(row["epoch"]) for row in rows]
    panels: list[Panel] = []
    for name in ("loss", "accuracy"):
        curves = {
            text: [_number(row[column]) for row in rows]
            for column, text in ((name, "training"), (f"val_{name}", "validation"))
            if column in rows[0]
        }
        if curves and metric in (None, name, f"val_{name}"):
            panels.append(lambda ax, c=curves, n=name: learning_curves(c, steps=steps, y_label=_metric_label(n), ax=ax))  # type: ignore[misc]  # the defaults bind the loop's values
    if not panels:
        raise FormatError(f"this history has no column {metric!r}")
    return panels, "Training"


def _bench(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    groups = [group for group in result.content["groups"] if group["results"]]
    if sum(len(group["results"]) for group in groups) > MANY_CASES:
        groups = [group for group in groups if group["goals"]] or groups
    panels: list[Panel] = []
    for group in groups:
        times = {}
        for row in group["results"]:
            spreads = {name: peer.get("seconds") for name, peer in row["peers"].items()}
            times[_case(row["case"])] = {
                name: tuple(1000 * spread[key] for key in ("median", "q1", "q3"))
                for name, spread in spreads.items()
                if spread
            }
        times = {case: found for case, found in times.items() if found}
        if times:
            panels.append(lambda ax, t=times, n=group["name"]: _bars(ax, t, n))  # type: ignore[misc]  # the defaults bind the loop's values
    if not panels:
        raise FormatError("this benchmark has no timed case to draw")
    return panels, f"Benchmark suite {result.content['suite']}: medians with quartiles"


def _bars(ax: "Axes", times: dict[str, dict[str, Any]], name: str) -> None:
    medians = [triple[0] for case in times.values() for triple in case.values()]
    wide = max(medians) > WIDE * min(medians)
    _make_room(ax, 1.4, sum(len(case) for case in times.values()))
    label = f"median time a call (ms{', logarithmic' if wide else ''})"
    benchmark_bars(times, x_label=label, title=name, logarithmic=wide, ax=ax)


def _make_room(ax: "Axes", widths: float, bars: int) -> None:
    """Make the figure wide enough for long names and its row high enough for its bars."""
    figure = ax.figure.get_figure(root=True)
    place = ax.get_subplotspec()
    if figure is not None and place is not None:
        rows, columns = place.get_gridspec().get_geometry()
        figure.set_size_inches(widths * PANEL[0] * columns, rows * max(PANEL[1], 1.8 + 0.22 * bars))


def _comparison(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    content = result.content
    name = content.get("metric", "value")
    found = {
        f"{row['first']} − {row['second']}": (row["difference"], row["low"], row["high"], row["decided"])
        for row in content["differences"]
        if row["low"] is not None
    }
    if not found:
        raise FormatError("this comparison has no interval: a single seed says nothing about the noise")
    text = (
        f"{_metric_label(name)}, difference\nwith its {100 * content['level']:g} % interval; hollow: within the noise"
    )
    panel: Panel = lambda ax: difference_intervals(found, x_label=text, ax=ax)  # noqa: E731 - like the other panels
    return [panel], "Differences between methods, paired by seed"


def _inspection(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    modules = [module for module in result.content["modules"] if any(module["singular_values"])]
    if not modules:
        raise FormatError("this adapter has no module that changes anything, so there is no change to draw")
    largest = sorted(modules, key=lambda module: -module["norm"])[:MANY_SPECTRA]
    names = dict(zip((module["name"] for module in modules), _shortened(m["name"] for m in modules), strict=True))
    spectra = {names[module["name"]]: module["singular_values"] for module in modules if module in largest}
    ranks = {names[module["name"]]: {"stable rank": module["stable_rank"]} for module in modules[:MANY_MODULES]}
    among = f" ({len(spectra)} largest of {len(modules)} modules)" if len(spectra) < len(modules) else ""
    panels: list[Panel] = [
        lambda ax: singular_values(spectra, title=f"Singular values of each change{among}", ax=ax),
        lambda ax: _stable_ranks(ax, ranks),
    ]
    return panels, "What the adapter has learned"


def _stable_ranks(ax: "Axes", ranks: dict[str, dict[str, Any]]) -> None:
    _make_room(ax, 1.1, len(ranks) + 6)  # room for the legend of the spectra beside it
    benchmark_bars(ranks, x_label="stable rank ‖M‖²_F / ‖M‖²₂ (no unit)", title="Directions that carry it", ax=ax)


def _layer(result: ResultFile, metric: str | None) -> tuple[list[Panel], str]:
    changes = {name or type(layer).__name__: layer for name, layer in tree.units(result.content)}
    found = {name: (_change(layer), type(layer).__name__) for name, layer in changes.items()}
    found = {name: pair for name, pair in found.items() if np.any(pair[0])}
    if not found:
        raise FormatError("this model holds no adapter that has changed anything, so there is no change to draw")
    found = dict(zip(_shortened(found), found.values(), strict=True))
    names = sorted(found, key=lambda name: -np.linalg.norm(found[name][0]))
    first, shown = names[0], [name for name in found if name in names[:MANY_SPECTRA]]
    spectra = {name: found[name][0] for name in shown}
    among = f" ({len(shown)} largest of {len(found)} layers)" if len(shown) < len(found) else ""
    panels: list[Panel] = [
        lambda ax: matrix_heat_map(
            found[first][0],
            title=f"Change of {first}" if len(first) > 20 else f"Change of {first} ({found[first][1]})",
            value_label="s A B + c D (weight units)",
            ax=ax,
        ),
        lambda ax: _spectra(ax, spectra, f"Singular values of each change{among}"),
    ]
    return panels, "What the adapters have learned"


def _spectra(ax: "Axes", spectra: Mapping[str, Any], title: str) -> None:
    _make_room(ax, 1, len(spectra) + 12)  # for the legend
    singular_values(spectra, title=title, ax=ax)


def _change(layer: Any) -> np.ndarray:
    """What an adapter or a low-rank layer changes of a weight, (in, out), in float64; zero for any other layer."""
    change = layer._change(layer._operands()) if isinstance(layer, Projection) else None
    return np.zeros((1, 1)) if change is None else change


# --- words -----------------------------------------------------------------------------------------------------------


def _shortened(names: Iterable[str]) -> list[str]:
    """Names of layers, of those that are long with the middle left out, and numbered where they are the same then."""
    found: dict[str, None] = {}
    for name in names:
        short = name if len(name) <= LONG_NAME else f"{name[: LONG_NAME // 2 - 1]}…{name[-LONG_NAME // 2 :]}"
        found[short if short not in found else f"{short} ({len(found) + 1})"] = None
    return list(found)


def _metric_label(metric: str) -> str:
    split, _, name = metric.rpartition("_")
    where = {"val": "validation ", "test": "test ", "": ""}.get(split, f"{split} ")
    unit = {"accuracy": " (fraction of samples)", "loss": " (mean over samples)"}.get(name, "")
    return f"{where}{name}{unit}"


def _setting_label(name: str) -> str:
    units = {"rank": "rank (count)", "batch_size": "batch size (samples)", "epochs": "epochs (count)"}
    return units.get(name, f"{name.replace('_', ' ')} (no unit)")


def _case(case: Mapping[str, Any]) -> str:
    return (
        f"{case['kind']} {case['in_features']}×{case['out_features']}, n {case['n']}\n"
        f"rank {case['rank']}, {case['dtype']}, {case['threads']} threads"
    )


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _order(value: Any) -> tuple[str, Any]:
    numeric = isinstance(value, int | float)
    return ("", value) if numeric else (type(value).__name__, str(value))


_PANELS: dict[str, Callable[[ResultFile, str | None], tuple[list[Panel], str]]] = {
    "sweep": _sweep,
    "demo": _demo,
    "table": _table,
    "curves": _curves,
    "history": _history,
    "bench": _bench,
    "comparison": _comparison,
    "layer": _layer,
    "inspection": _inspection,
}
