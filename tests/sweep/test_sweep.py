"""A sweep in this process: what runs do, what is recorded, what is repeated."""

import json
import sys
import time

import numba
import numpy as np
import pytest
from click.testing import CliRunner
from threadpoolctl import threadpool_info

import nblora
from nblora.cli import main
from nblora.errors import FormatError, MissingExtraError
from nblora.sweep import Sweep, over_seeds, text_table
from nblora.sweep.task import Task, limit_threads, prepare
from nblora.training import AdamW, evaluate, fit

from .conftest import results_only


def run_of(sweep, **settings):
    return next(key for key, run in sweep.runs.items() if run.items() >= settings.items())


def test_a_run_is_what_fit_does(sweep, data, base, tmp_path):
    settings = {"method": "delta", "rank": 2, "delta_scaling": 0.5, "seed": 3}
    key = run_of(sweep, **settings)
    sweep.runs = {key: sweep.runs[key]}
    (record,) = sweep.run(tmp_path / "results.jsonl", workers=1)
    model = base.clone().adapt("*", "delta", rank=2, delta_scaling=0.5, lora_dropout=0.1, seed=3)
    with limit_threads(1):
        history = fit(
            model, data.x, data.y, loss="cross_entropy", optimizer=AdamW(lr=0.01), epochs=4, seed=3,
            validation=(data.x_validation, data.y_validation),
        )  # fmt: skip
        expected = evaluate(model, data.x_test, data.y_test, loss="cross_entropy")
    assert record["metrics"]["test_accuracy"] == expected["accuracy"]
    assert record["metrics"]["test_loss"] == expected["loss"]
    assert record["history"]["val_accuracy"] == history["val_accuracy"]
    assert record["trainable_parameters"] == model.parameter_count
    assert record["status"] == "done"


def test_methods_train_what_they_say(sweep):
    counts = {}
    for settings in sweep.runs.values():
        model = prepare(sweep.task, settings)
        counts[settings["method"], settings.get("rank")] = {
            name for name in model.parameter_names() if any(p.name == name and p.trainable for p in model._parameters())
        }
    whole = {f"{layer}.{name}" for layer in ("hidden", "head") for name in ("weight", "bias")}
    assert counts["full", None] == whole
    assert counts["head", None] == {"head.weight", "head.bias"}
    assert counts["lora", 1] == {f"{layer}.lora_{name}" for layer in ("hidden", "head") for name in "AB"}
    assert counts["delta", 2] == counts["lora", 2] | {"hidden.delta", "head.delta"}


def test_base_is_left_alone_and_its_adapters_are_merged(data, base):
    base.adapt("hidden", "lora", rank=1, seed=0)
    base["hidden"].set_parameter("lora_B", np.ones((1, 8)))
    sweep = Sweep.grid(data, {"method": ["full"]}, base=base)
    model = prepare(sweep.task, next(iter(sweep.runs.values())))
    np.testing.assert_array_equal(model.get_parameter("hidden.weight"), base.merge().get_parameter("hidden.weight"))
    assert isinstance(base["hidden"], nblora.LoRAAdapter)


def test_nothing_is_run_twice(sweep, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    sweep.runs = dict(list(sweep.runs.items())[:6])
    first = sweep.run(path, workers=1)
    before = path.read_bytes()
    monkeypatch.setattr("nblora.sweep.engines.run_one", None)  # calling it would raise
    assert sweep.run(path, workers=1) == first
    assert path.read_bytes() == before


def test_a_larger_sweep_goes_on_from_a_smaller_one(data, base, tmp_path):
    path = tmp_path / "results.jsonl"
    fixed = {"method": "lora", "epochs": 1}
    Sweep.grid(data, {"rank": [1], "seed": [0, 1]}, fixed, base=base).run(path, workers=1)
    before = path.read_bytes()
    records = Sweep.grid(data, {"rank": [1, 2], "seed": [0, 1]}, fixed, base=base).run(path, workers=1)
    assert path.read_bytes().startswith(before)
    assert len(records) == len(path.read_text().splitlines()) == 4


def test_other_data_or_base_is_another_sweep(data, base):
    grid, other = {"rank": [1]}, base.clone()
    keys = set(Sweep.grid(data, grid, base=base).runs)
    assert keys == set(Sweep.grid(data, grid, base=other).runs)
    other.set_parameter("head.bias", np.ones(3))
    assert keys.isdisjoint(Sweep.grid(data, grid, base=other).runs)
    moved = Task(data, base, (), "cross_entropy", "*", None, 1)
    assert moved.digest() != Task(data, base, (), "cross_entropy", "head", None, 1).digest()
    assert keys.isdisjoint(Sweep.grid(data, grid, base=base, threads=2).runs)


def test_runs_that_diverge_or_cannot_be_are_results(data, base, tmp_path):
    path = tmp_path / "results.jsonl"
    sweep = Sweep.grid(data, {"lr": [1e30, 0.01], "rank": [1, 99]}, {"epochs": 2, "method": "lora"}, base=base)
    records = {(r["settings"]["lr"], r["settings"]["rank"]): r for r in sweep.run(path, workers=1)}
    assert records[1e30, 1]["status"] == "diverged"
    assert records[0.01, 99]["status"] == "failed"
    assert "rank must be between 1 and" in records[0.01, 99]["error"]
    assert records[0.01, 1]["status"] == "done"
    assert sweep.best(list(records.values())) is records[0.01, 1]
    assert "1 runs diverged" in text_table(list(records.values()), "val_accuracy")
    again = sweep.run(path, workers=1)
    assert results_only(again) == results_only(records.values())
    assert len(path.read_text().splitlines()) == 6  # the failed ones once more


def test_faults_of_the_machine_are_tried_again(sweep, tmp_path, monkeypatch):
    from nblora.sweep import engines

    original, calls = engines.run_one, []

    def flaky(task, key, settings):
        calls.append(key)
        if (key == chosen and calls.count(key) < 3) or key == hopeless:
            raise OSError("the disk is away")
        return original(task, key, settings)

    sweep.runs = dict(list(sweep.runs.items())[:3])
    chosen, hopeless, _ = sweep.runs
    monkeypatch.setattr(engines, "run_one", flaky)
    records = sweep.run(tmp_path / "results.jsonl", workers=1)
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    assert "the disk is away" in records[1]["error"]
    assert calls.count(chosen) == calls.count(hopeless) == engines.ATTEMPTS


def test_drawn_network_for_classes_and_for_numbers(data, tmp_path):
    classes = Sweep.grid(data, {"method": ["full"]}, {"epochs": 1}, hidden=(5, 4))
    model = prepare(classes.task, next(iter(classes.runs.values())))
    assert [layer.out_features for layer in model] == [5, 4, 3]
    numbers = {
        "x": data.x,
        "y": data.x[:, :2],
        "x_validation": data.x_validation,
        "y_validation": data.x_validation[:, :2],
    }
    sweep = Sweep.grid(numbers, {"method": ["full"]}, {"epochs": 20, "lr": 0.01}, loss="mse", hidden=())
    (record,) = sweep.run(tmp_path / "results.jsonl", workers=1)
    assert sweep.metric == "val_loss"
    assert record["metrics"]["val_loss"] < 0.3
    flat = numbers | {"y": data.x[:, 0], "y_validation": data.x_validation[:, 0]}
    assert (
        prepare(Sweep.grid(flat, {"method": ["full"]}, loss="mse").task, {"method": "full", "seed": 0}).out_features
        == 1
    )


def test_averages_over_seeds(sweep, tmp_path):
    records = sweep.run(tmp_path / "results.jsonl", workers=1)
    groups = over_seeds(records, "val_accuracy")
    assert len(groups) == 8
    assert all(len(values) == 8 for _, values in groups)
    means = [np.mean(list(values.values())) for _, values in groups]
    assert means == sorted(means, reverse=True)
    losses = [np.mean(list(values.values())) for _, values in over_seeds(records, "val_loss")]
    assert losses == sorted(losses)


def test_threads_are_limited_and_given_back():
    before = numba.get_num_threads(), [library["num_threads"] for library in threadpool_info()]
    with limit_threads(1), limit_threads(1):
        assert numba.get_num_threads() == 1
        assert all(library["num_threads"] == 1 for library in threadpool_info() if library["user_api"] == "blas")
    assert (numba.get_num_threads(), [library["num_threads"] for library in threadpool_info()]) == before


def test_bad_arguments(data, sweep, tmp_path):
    with pytest.raises(ValueError, match="runs must not be empty"):
        Sweep(data, [])
    with pytest.raises(ValueError, match="metric must be one of 'val_accuracy', 'val_loss'"):
        Sweep.grid(data, {"rank": [1]}, metric="test_accuracy")
    with pytest.raises(ValueError, match="exclude each other"):
        sweep.run(tmp_path / "r.jsonl", scheduler="tcp://x", cluster="dask")
    with pytest.raises(ValueError, match="cluster must be one of 'dask'"):
        sweep.run(tmp_path / "r.jsonl", cluster="slurm")
    assert not (tmp_path / "r.jsonl").exists()


TOML = """
loss = "cross_entropy"
[data]
file = "data.npz"
[base]
checkpoint = "base.safetensors"
target = ["hidden"]
modules_to_save = "head"
[grid]
method = ["lora", "delta"]
rank = [1, 2]
[fixed]
epochs = 1
"""


@pytest.fixture
def folder(tmp_path, data, base):
    np.savez(tmp_path / "data.npz", **vars(data))
    base.save(tmp_path / "base.safetensors")
    (tmp_path / "sweep.toml").write_text(TOML)
    return tmp_path


def test_toml_equals_python(folder, data, base):
    read = Sweep.from_toml(folder / "sweep.toml")
    built = Sweep.grid(
        data, {"method": ["lora", "delta"], "rank": [1, 2]}, {"epochs": 1},
        base=base, target=["hidden"], modules_to_save="head",
    )  # fmt: skip
    assert read.runs == built.runs


def test_command(folder):
    runner = CliRunner()
    arguments = ["sweep", str(folder / "sweep.toml"), "--workers", "1"]
    result = runner.invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "val_accuracy, mean ± std over seeds (4 settings, best first)" in result.output
    path = folder / "sweep.jsonl"
    before = path.read_bytes()
    assert len(before.splitlines()) == 4
    quiet = runner.invoke(main, [*arguments, "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert path.read_bytes() == before
    both = runner.invoke(main, [*arguments, "--cluster", "dask", "--scheduler", "tcp://x"])
    assert both.exit_code == 2


def test_toml_with_random_draws_and_scikit_learn_data(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "sweep.toml"
    path.write_text(
        'metric = "val_loss"\n[data]\nsklearn = "iris"\n[base]\nhidden = [4]\n'
        '[random]\nruns = 3\nmethod = ["delta"]\nrank = {low = 1, high = 3}\nseed = [0, 1]\n[fixed]\nepochs = 1\n'
    )
    sweep = Sweep.from_toml(path, threads=2)
    assert sweep.task.threads == 2
    assert {settings["seed"] for settings in sweep.runs.values()} == {0, 1}
    data = sweep.task.data
    assert (len(data.x), len(data.x_validation), len(data.x_test)) == (90, 30, 30)
    rows = np.concatenate([data.x, data.x_validation, data.x_test])
    assert len(np.unique(rows, axis=0)) > 140  # no sample is in two parts (iris has a few twins)
    np.testing.assert_allclose(data.x.mean(0), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("loss", "los"), "the file has los, which is unknown"),
        (("[grid]", "[[grid]]"), "grid must be a table"),
        (("[grid]", "[fixed2]"), "the file has fixed2"),
        (("rank", "ranks"), "unknown setting 'ranks'"),
        (("data.npz", "sweep.toml"), "must be an .npz file"),
        (("[data]", "[data"), "not a TOML file"),
        (('target = ["hidden"]', "hidden = [3]"), "both checkpoint and hidden"),
        (('[data]\nfile = "data.npz"', ""), "'data' is missing"),
        (('file = "data.npz"', "validation = 0.1"), "must have file"),
        (('file = "data.npz"', 'sklearn = "mnist"'), "data.sklearn must be one of"),
        (('file = "data.npz"', 'sklearn = "iris"\nvalidation = 0.6\ntest = 0.5'), "leave samples for training"),
        (('"cross_entropy"', '"msee"'), "loss must be one of 'mse'"),
        (('"cross_entropy"', "3"), "loss must be a name"),
        (("[data]", 'metric = "speed"\n[data]'), "metric must be one of 'val_accuracy'"),
        (("[data]", "threads = 0\n[data]"), "threads must be at least 1"),
    ],
)
def test_bad_files(folder, change, message):
    path = folder / "sweep.toml"
    path.write_text(TOML.replace(*change))
    with pytest.raises(FormatError, match=message) as caught:
        Sweep.from_toml(path)
    assert str(folder) in str(caught.value)
    result = CliRunner().invoke(main, ["sweep", str(path)])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("widths", "message"),
    [("3", "hidden must be a list of widths"), ('"ab"', "hidden must be a list of widths"), ("[0]", "at least 1"),
     ('["a"]', "hidden must be an integer"), ("[true]", "hidden must be an integer")],
)  # fmt: skip
def test_bad_widths(widths, message, tmp_path, data):
    np.savez(tmp_path / "data.npz", **{name: array for name, array in vars(data).items() if array is not None})
    path = tmp_path / "sweep.toml"
    path.write_text(f'[data]\nfile = "data.npz"\n[base]\nhidden = {widths}\n[grid]\nmethod = ["full"]\n')
    with pytest.raises(FormatError, match=rf"sweep\.toml: .*{message}"):
        Sweep.from_toml(path)
    assert CliRunner().invoke(main, ["sweep", str(path)]).exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "x." * 20000 + "y = 1", f"[{'a.' * 20000}a]", f"[[{'a . ' * 20000}a]]", '"a".' * 20000 + "b = 1",
        '# """\n' + "x." * 20000 + 'y = 1\n# """', 'b = """x"y"""\n' + "x." * 20000 + "y = 1",
        'a = {b="""x"y""",' + "k." * 20000 + 'k=1,c="z"}',
    ],
    ids=range(7),
)  # fmt: skip
def test_a_key_of_many_parts_costs_nothing(text, tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    before = time.thread_time()
    with pytest.raises(FormatError, match=r"sweep\.toml: not a TOML file: a key of 20001 parts"):
        Sweep.from_toml(path)
    assert time.thread_time() - before < 2


def test_records_are_json(sweep, tmp_path):
    sweep.runs = dict(list(sweep.runs.items())[:1])
    records = sweep.run(tmp_path / "results.jsonl", workers=1, progress=True)
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_missing_extras_are_named(sweep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"nblora\[dask\]"):
        sweep.run(tmp_path / "results.jsonl", cluster="dask")
    path = tmp_path / "sweep.toml"
    path.write_text('[data]\nsklearn = "iris"\n[grid]\nrank = [1]\n')
    with pytest.raises(MissingExtraError, match=r"nblora\[sklearn\]"):
        Sweep.from_toml(path)


def test_a_rank_that_is_too_large_for_one_layer_may_be_lowered_as_its_message_says(data, base, tmp_path):
    grid = {"method": ["lora"], "rank": [base.out_features + 1]}
    (record,) = Sweep.grid(data, grid, {"epochs": 1}, base=base).run(tmp_path / "a.jsonl", workers=1)
    assert record["status"] == "failed"
    assert "lower_rank=True" in record["error"]
    lowered = Sweep.grid(data, grid, {"epochs": 1, "lower_rank": True}, base=base)
    with pytest.warns(UserWarning, match="its adapter has rank"):
        (record,) = lowered.run(tmp_path / "b.jsonl", workers=1)
    assert record["status"] == "done"
