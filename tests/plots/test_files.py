"""`nblora plot` and `nblora compare` on each kind of result file."""

import json
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

import nblora
from nblora.cli import main
from nblora.errors import FormatError
from nblora.plots import draw_file
from nblora.results import KINDS, read_result_file, values_by_seed
from nblora.sweep import Sweep
from nblora.training import fit

DEMO_METHODS = {"Head only": 0.5, "LoRA": 0.7, "Delta-LoRA": 0.9}


def sweep_file(folder, rng, grid=None, fixed=None):
    x = rng.normal(size=(90, 5)).astype("float32")
    y = (x.sum(1) > 0).astype(int)
    data = {
        "x": x[:40],
        "y": y[:40],
        "x_validation": x[40:70],
        "y_validation": y[40:70],
        "x_test": x[70:],
        "y_test": y[70:],
    }
    grid = grid or {
        "method": ["lora", "delta", "full"],
        "rank": [1, 2],
        "delta_scaling": [0.1, 0.5],
        "lr": [0.01, 0.1],
        "seed": list(range(5)),
    }
    path = folder / "sweep.jsonl"
    Sweep.grid(data, grid, {"epochs": 2, **(fixed or {})}, hidden=(6,)).run(path, workers=1)
    return path


def demo_file(folder, rng):
    def row(method, level):
        curves = [[{"epoch": e + 1, "val_accuracy": level * (e + 1) / 3} for e in range(3)] for _ in range(5)]
        accuracy = (level + rng.uniform(0, 0.01, 5)).tolist()
        return {
            "method": method,
            "trainable_parameters": 1000 * len(method),
            "test_accuracy": accuracy,
            "curves": curves,
        }

    rows = [row(method, level) for method, level in DEMO_METHODS.items()]
    content = {"settings": {"seed": 7}, "not_adapted": rows[0], "methods": rows}
    return write_json(folder / "demo.json", content)


def table_file(folder, rng):
    lines = ["method,test_accuracy_mean,test_accuracy_std,upright_accuracy_mean,upright_accuracy_std,lr"]
    lines += [f"{method},{level},0.01,{1 - level},,0.1" for method, level in DEMO_METHODS.items()]
    path = folder / "results.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def bench_file(folder, rng):
    def result(place):
        case = {
            "kind": "step",
            "n": 2**place,
            "in_features": 64,
            "out_features": 32,
            "rank": 4,
            "dtype": "float32",
            "threads": 1,
        }
        peers = {
            "nblora": {"seconds": {"median": 0.001, "q1": 0.0009, "q3": 0.0012}},
            "numpy": {"seconds": {"median": 0.05, "q1": 0.04, "q3": 0.06}},
            "broken": {"fault": "out of memory"},
        }
        return {"case": case, "peers": peers}

    results = [result(place) for place in range(9)]
    groups = [
        {"name": "goal", "goals": {"x": 1}, "results": results},
        {"name": "more", "goals": {}, "results": results},
        {"name": "empty", "goals": {}, "results": []},
    ]
    return write_json(folder / "bench.json", {"suite": "quick", "groups": groups})


def comparison_file(folder, rng):
    path = folder / "comparison.json"
    result = CliRunner().invoke(main, ["compare", str(demo_file(folder, rng)), "--json", str(path)])
    assert result.exit_code == 0, result.output
    return path


def inspection_file(folder, rng):
    def module(name, scale):
        values = (scale * np.sort(rng.uniform(size=4))[::-1]).tolist()
        return {"name": name, "norm": scale, "singular_values": values, "stable_rank": 2.0}

    modules = [module(f"layer.{place}.query", 1.0 + place) for place in range(9)]
    return write_json(folder / "inspection.json", {"modules": modules, "config": {}})


def curves_file(folder, rng):
    lines = ["method,seed,epoch,loss,val_accuracy"]
    for method, level in DEMO_METHODS.items():
        lines += [
            f"{method},{seed},{epoch},{1 / epoch},{level * epoch / 3 + 0.01 * seed}"
            for seed in range(5)
            for epoch in range(1, 4 if seed else 3)  # one seed stopped early
        ]
    path = folder / "curves.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def history_file(folder, rng):
    x = rng.normal(size=(40, 5))
    y = (x.sum(1) > 0).astype(int)
    model = nblora.Dense.random(5, 2, seed=0)
    path = folder / "history.csv"
    fit(model, x, y, loss="cross_entropy", epochs=4, validation=(x, y), seed=0).to_csv(path)
    return path


def layer_file(folder, rng):
    model = nblora.Sequential(nblora.Dense.random(6, 5, seed=0), nblora.FullyConnected.random(5, 4, seed=1))
    model.adapt("*", "delta", rank=2, seed=2)
    for place in range(2):
        for name in ("lora_B", "delta"):
            model[place].set_parameter(name, rng.normal(size=model[place].parameter_shape(name)))
    path = folder / "model.safetensors"
    model.save(path)
    return path


MAKERS = {
    "sweep": (sweep_file, 5),  # curves, sizes, and a map for each method that two settings were varied of
    "demo": (demo_file, 2),
    "table": (table_file, 2),
    "bench": (bench_file, 1),
    "comparison": (comparison_file, 1),
    "inspection": (inspection_file, 2),
    "curves": (curves_file, 2),
    "history": (history_file, 2),
    "layer": (layer_file, 2),
}


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def test_every_kind_is_tried():
    assert set(MAKERS) == set(KINDS)


@pytest.mark.parametrize("kind", MAKERS)
def test_figure_of_each_kind(kind, tmp_path, rng):
    make, count = MAKERS[kind]
    path = make(tmp_path, rng)
    assert read_result_file(path).kind == kind
    figure = draw_file(path)
    found = panels(figure)
    assert len(found) == count - (kind == "sweep")  # full has one setting less to vary than a map needs
    assert path.name in figure.get_suptitle()
    for ax in found:
        assert ax.get_xlabel()
        assert ax.get_ylabel() or any(text.get_text() for text in ax.get_yticklabels())
        assert ax.has_data()


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_reaches_beyond_the_edge(kind, tmp_path, rng):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_file(MAKERS[kind][0](tmp_path, rng))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    tight = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    margin = 0.05
    assert tight.x0 > -margin
    assert tight.y0 > -margin
    assert tight.x1 < width + margin
    assert tight.y1 < height + margin


@pytest.mark.parametrize("kind", MAKERS)
def test_no_figure_is_a_strip_and_no_text_covers_another_thing(kind, tmp_path, rng):
    """Labels are no longer than the axis they name, and no legend lies over its axes, where curves and bars are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_file(MAKERS[kind][0](tmp_path, rng))
    renderer = FigureCanvasAgg(figure).get_renderer()
    FigureCanvasAgg(figure).draw()
    figure.draw(renderer)
    width, height = figure.get_size_inches()
    assert width / height < 3.2
    for ax in figure.axes:
        inside = ax.get_window_extent(renderer)
        y_label, x_label = (axis.label.get_window_extent(renderer) for axis in (ax.yaxis, ax.xaxis))
        assert y_label.height <= 1.05 * inside.height
        assert x_label.width <= 1.4 * inside.width  # it may reach below the labels of the other axis
        legend = ax.get_legend()
        if legend is not None:
            box = legend.get_window_extent(renderer)
            assert box.y1 <= inside.y0, "the legend covers what is drawn"
            assert box.width <= figure.bbox.width


def deep_model_file(folder, rng):
    """Two dozen layers with long names, the third of which has changed the most."""
    names = [
        f"transformer_blocks_{place}_attention_query_projection" + "_of_the_encoder" * (place % 2)
        for place in range(24)
    ]
    model = nblora.Sequential({name: nblora.Dense.random(6, 6, seed=place) for place, name in enumerate(names)})
    model.adapt("*", "lora", rank=2, seed=0)
    for place in range(24):
        model[place].set_parameter("lora_B", rng.normal(size=(2, 6)) * (10 if place == 2 else 1))
    model.save(folder / "deep.safetensors")
    return folder / "deep.safetensors"


def deep_inspection_file(folder, rng):
    model = nblora.load(deep_model_file(folder, rng))
    nblora.save_peft(model, folder / "adapter")
    return write_json(folder / "deep.json", nblora.inspect(folder / "adapter").as_dict())


@pytest.mark.parametrize("make", [deep_model_file, deep_inspection_file])
def test_many_layers_with_long_names(make, tmp_path, rng):
    """Seven spectra, each named, and titles beside one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_file(make(tmp_path, rng))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # a layout that does not work out is a warning
    renderer = canvas.get_renderer()
    left, right = panels(figure)
    spectra = next(ax for ax in (left, right) if "7 largest of 24" in ax.get_title(loc="left"))
    assert len({text.get_text() for text in spectra.get_legend().get_texts()}) == 7
    titles = [ax._left_title.get_window_extent(renderer) for ax in (left, right)]
    assert titles[0].x1 < titles[1].x0
    assert spectra.yaxis.label.get_window_extent(renderer).height <= 1.05 * spectra.get_window_extent(renderer).height
    if spectra is right:
        assert "transformer_blocks_2_" in left.get_title(loc="left")


def test_a_method_looks_the_same_in_both_panels(tmp_path, rng):
    curves, sizes = panels(draw_file(sweep_file(tmp_path, rng)))[:2]
    colours = {line.get_label(): line.get_color() for line in curves.get_lines()}
    assert len(colours) == 3
    points = {bars.get_label(): bars.lines[0].get_color() for bars in sizes.containers}
    assert colours.items() <= points.items()
    assert len(set(points.values())) == len(points) == 5


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_command_writes_the_same_file_again(suffix, tmp_path, rng):
    path, runner = demo_file(tmp_path, rng), CliRunner()
    contents = []
    for name in ("first", "second"):
        target = tmp_path / f"{name}.{suffix}"
        result = runner.invoke(main, ["plot", str(path), "-o", str(target)])
        assert result.exit_code == 0, result.output
        contents.append(target.read_bytes())
    assert contents[0] == contents[1]
    if suffix == "svg":
        assert xml.etree.ElementTree.fromstring(contents[0]).tag.endswith("svg")
        assert b"Delta-LoRA" in contents[0]
    else:
        assert contents[0].startswith(b"\x89PNG")


def test_command_names_the_figure_after_the_file(tmp_path, rng, monkeypatch):
    path = history_file(tmp_path, rng)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = CliRunner().invoke(main, ["plot", str(path)])
    assert result.output == "Written to history.png\n"
    assert (tmp_path / "here" / "history.png").exists()
    other = CliRunner().invoke(main, ["plot", str(path), "-o", "figure.gif"])
    assert other.exit_code == 2
    assert ".png or .svg" in other.output


def test_sweep_map_shows_the_best_over_what_else_varies(tmp_path, rng):
    path = sweep_file(tmp_path, rng)
    records = read_result_file(path).content
    figure = draw_file(path, metric="test_accuracy")
    ax = next(ax for ax in panels(figure) if ax.get_title(loc="left").startswith("delta"))
    shown = ax.get_images()[0].get_array()
    means = {}
    for record in records:
        settings = record["settings"]
        if settings["method"] == "delta":
            key = settings["rank"], settings["delta_scaling"], settings["lr"]
            means.setdefault(key, []).append(record["metrics"]["test_accuracy"])
    best = {}
    for (rank, scaling, _), values in means.items():
        best[rank, scaling] = max(best.get((rank, scaling), 0), np.mean(values))
    np.testing.assert_allclose(shown, [[best[rank, scaling] for scaling in (0.1, 0.5)] for rank in (1, 2)])
    assert ax.get_title(loc="left") == "delta, best over lr"


def test_metric_of_curves(tmp_path, rng):
    assert len(panels(draw_file(curves_file(tmp_path, rng), metric="val_accuracy"))) == 1
    assert len(panels(draw_file(history_file(tmp_path, rng), metric="accuracy"))) == 1
    assert len(panels(draw_file(table_file(tmp_path, rng), metric="test_accuracy"))) == 1
    for make in (curves_file, history_file, sweep_file, table_file):
        with pytest.raises(FormatError, match="speed"):
            draw_file(make(tmp_path, rng), metric="speed")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'{"a": 1}'),
        ("a.json", b"[1, 2]"),
        ("a.json", b"{"),
        ("a.csv", b"x,y\n1,2\n"),
        ("a.csv", b""),
        ("a.png", b"\x89PNG\xff\xfe"),
    ],
)
def test_other_files(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match="none of nblora's result files"):
        draw_file(path)
    result = CliRunner().invoke(main, ["plot", str(path)])
    assert result.exit_code == 2
    assert "nblora sweep" in result.stderr


def test_files_with_nothing_to_draw(tmp_path, rng):
    path = tmp_path / "base.safetensors"
    nblora.Dense.random(3, 2, seed=0).save(path)
    with pytest.raises(FormatError, match="no adapter that has changed anything"):
        draw_file(path)
    bench = write_json(tmp_path / "bench.json", {"suite": "quick", "groups": []})
    with pytest.raises(FormatError, match="no timed case"):
        draw_file(bench)
    one = {"format": "nblora.comparison", "level": 0.95, "methods": [], "differences": []}
    with pytest.raises(FormatError, match="no interval"):
        draw_file(write_json(tmp_path / "one.json", one))
    with pytest.raises(FormatError, match="no module that changes anything"):
        draw_file(write_json(tmp_path / "zero.json", {"modules": [], "config": {}}))
    with pytest.raises(FormatError, match="no run of this sweep has ended well"):
        draw_file(sweep_file(tmp_path, rng, {"lr": [1e30], "method": ["full"]}))


def test_files_that_lack_what_their_kind_has(tmp_path):
    path = write_json(tmp_path / "results.json", {"not_adapted": {}, "methods": [{"method": "LoRA", "curves": [[{}]]}]})
    with pytest.raises(FormatError, match=r"taken for results\.json of `nblora demo`, but KeyError"):
        draw_file(path)


def test_without_matplotlib_the_extra_is_named(tmp_path, rng, monkeypatch):
    path = demo_file(tmp_path, rng)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, ["plot", str(path)])
    assert result.exit_code == 2
    assert "pip install 'nblora[plot]'" in result.stderr


@pytest.mark.parametrize("make", [sweep_file, demo_file, curves_file])
def test_compare_command(make, tmp_path, rng):
    path, target = make(tmp_path, rng), tmp_path / "comparison.json"
    result = CliRunner().invoke(main, ["compare", str(path), "--json", str(target)])
    assert result.exit_code == 0, result.output
    name, values, _ = values_by_seed(read_result_file(path))
    content = json.loads(target.read_text())
    assert content["metric"] == name
    assert {row["name"]: row["mean"] for row in content["methods"]} == {
        method: pytest.approx(np.mean(list(by_seed.values()))) for method, by_seed in values.items()
    }
    assert name in result.output


def test_a_sweep_is_compared_on_its_test_split_with_settings_chosen_on_the_other(tmp_path, rng):
    path = sweep_file(tmp_path, rng)
    name, values, remarks = values_by_seed(read_result_file(path))
    assert name == "test_accuracy"
    by_setting = {}
    for record in read_result_file(path).content:
        settings = {key: value for key, value in record["settings"].items() if key != "seed"}
        by_setting.setdefault(json.dumps(settings), []).append(record)
    for method, by_seed in values.items():
        mine = [group for text, group in by_setting.items() if json.loads(text)["method"] == method]
        best = max(mine, key=lambda group: np.mean([record["metrics"]["val_accuracy"] for record in group]))
        assert np.mean(list(by_seed.values())) in [
            pytest.approx(np.mean([record["metrics"]["test_accuracy"] for record in group]))
            for group in mine
            if np.mean([record["metrics"]["val_accuracy"] for record in group])
            == np.mean([record["metrics"]["val_accuracy"] for record in best])
        ]
    assert "best mean val_accuracy of each method" in remarks[0]
    assert not any("flatters" in remark for remark in remarks)
    assert "flatters" in values_by_seed(read_result_file(path), "val_accuracy")[2][-1]


def test_compare_command_refuses(tmp_path, rng):
    runner = CliRunner()
    assert runner.invoke(main, ["compare", str(bench_file(tmp_path, rng))]).exit_code == 2
    assert runner.invoke(main, ["compare", str(demo_file(tmp_path, rng)), "--metric", "speed"]).exit_code == 2
    assert runner.invoke(main, ["compare", str(demo_file(tmp_path, rng)), "--baseline", "Magic"]).exit_code == 1
    assert runner.invoke(main, ["compare", str(sweep_file(tmp_path, rng)), "--metric", "speed"]).exit_code == 2
