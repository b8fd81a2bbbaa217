"""`nblora demo`: from the command line to files that parse, agree with the table and load again."""

import csv
import json
import re
import sys
import time

import numba
import numpy as np
import pytest
from click.testing import CliRunner

import nblora
from nblora.cli import main
from nblora.demo import Settings, data, methods, report, run
from nblora.errors import NbloraError
from nblora.kernels.common import cache, jit

pytest.importorskip("sklearn")
matplotlib_image = pytest.importorskip("matplotlib.image")

FILES = {"results.json", "results.csv", "results.md", "curves.csv", "figure.png", "adapters"}
MERGED_FLOAT32 = 2e-5


def invoke(*arguments):
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The output folder and what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the command"
    result = invoke("--tiny", "--seed", 3, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.fixture
def content(tiny):
    return json.loads((tiny[0] / "results.json").read_text())


def test_every_file_is_written_and_named(tiny):
    folder, result = tiny
    assert {path.name for path in folder.iterdir()} == FILES
    for name in FILES:
        assert name in result.stdout
    assert str(folder) in result.stdout
    assert result.stderr == ""  # no bar where there is no terminal


def test_tiny_is_one_seed_two_methods_three_steps(content):
    assert content["steps"] == 3
    assert content["samples"] == {"pretraining": 96, "adaptation": 96, "validation": 32, "test": 32}
    assert [row["method"] for row in content["methods"]] == ["LoRA", "Delta-LoRA"]
    assert [row["method"] for row in content["convolutional"]["methods"]] == ["LoRA", "Delta-LoRA"]
    for row in (*content["methods"], *content["convolutional"]["methods"]):
        assert len(row["test_accuracy"]) == len(row["curves"]) == 1
        assert row["test_accuracy_std"] is None


def test_json_csv_and_markdown_equal_the_printed_table(tiny, content):
    folder, result = tiny
    convolutional = content["convolutional"]
    for network in (content, convolutional):
        assert report.text_table(network) in result.stdout
    assert report.best_text(content) in result.stdout
    markdown = (folder / "results.md").read_text()
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["Not adapted", "LoRA", "Delta-LoRA"]
    assert [row["method"] for row in rows] == names + [f"{name}, convolutional" for name in names]
    both = [row for network in (content, convolutional) for row in (network["not_adapted"], *network["methods"])]
    for row, full in zip(rows, both, strict=True):
        assert float(row["test_accuracy_mean"]) == full["test_accuracy_mean"]
        assert int(row["trainable_parameters"]) == full["trainable_parameters"]
        assert int(row["state_bytes"]) == full["state_bytes"]
    for row in (*report.table_rows(content), *report.table_rows(convolutional)):
        assert "| " + " | ".join(row) + " |" in markdown
        printed = [line for line in result.stdout.splitlines() if line.startswith(row[0])]
        assert any(all(cell in line for cell in row) for line in printed)


def test_curves_hold_a_row_for_each_method_seed_and_epoch(tiny, content):
    with open(tiny[0] / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows] == [
        ("LoRA", "3", "1"),
        ("Delta-LoRA", "3", "1"),
        ("LoRA, convolutional", "3", "1"),
        ("Delta-LoRA, convolutional", "3", "1"),
    ]
    methods_of_both = (*content["methods"], *content["convolutional"]["methods"])
    for row, method in zip(rows, methods_of_both, strict=True):
        assert float(row["loss"]) == method["curves"][0][0]["loss"]
        assert 0 <= float(row["val_accuracy"]) <= 1


def test_the_figure_is_a_picture_with_something_in_it(tiny):
    pixels = matplotlib_image.imread(tiny[0] / "figure.png")
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100


def test_the_saved_models_load_and_score_what_the_table_says(tiny, content):
    digits = data.load_digits(3).first(3 * 32, 32)
    kinds = {"LoRA": nblora.LoRAAdapter, "Delta-LoRA": nblora.DeltaLoRAAdapter}
    for network, test in ((content, digits.test), (content["convolutional"], digits.as_images().test)):
        for row in network["methods"]:
            model = nblora.load(row["adapter_file"])
            assert isinstance(model["hidden1"], kinds[row["method"]])
            assert run.accuracy(model, test) == row["test_accuracy"][0]
            assert model.parameter_count == row["trainable_parameters"]
        pretrained = nblora.load(network["not_adapted"]["adapter_file"])
        assert run.accuracy(pretrained, test) == network["not_adapted"]["test_accuracy"][0]


def test_parameters_and_bytes_of_state_are_those_of_the_equations(content):
    lora, delta = content["methods"]
    head = 96 * 10 + 10
    factors = 8 * (64 + 96) + 8 * (96 + 96)
    dense = 64 * 96 + 96 * 96
    assert lora["trainable_parameters"] == head + factors
    assert lora["state_bytes"] == 4 * 3 * (head + factors)  # the parameter and AdamW's two moments
    assert delta["trainable_parameters"] == head + factors + dense
    assert delta["state_bytes"] == 4 * (3 * (head + factors) + 2 * dense)  # the delta and its velocity
    lora, delta = content["convolutional"]["methods"]
    head, factors, dense = 48 * 10 + 10, 8 * (9 + 16) + 8 * (16 * 9 + 48), 9 * 16 + 16 * 9 * 48
    assert lora["trainable_parameters"] == head + factors
    assert delta["trainable_parameters"] == head + factors + dense


def test_merged_models_predict_the_same(tiny, content):
    for row in (*content["methods"], *content["convolutional"]["methods"]):
        assert 0 <= row["merge_relative_difference"] <= MERGED_FLOAT32
        assert row["merge_changed_labels"] == 0
    assert "Merged and unmerged outputs agree" in tiny[1].stdout


def test_a_merge_that_does_not_agree_is_an_error(monkeypatch):
    model = methods.new_network(0)
    methods.DELTA_LORA.prepare(model, 0)
    wrong = methods.new_network(1)
    monkeypatch.setattr(type(model), "merge", lambda self: wrong)
    split = data.Split(np.ones((3, 64), np.float32), np.zeros(3, np.int64))
    with pytest.raises(NbloraError, match="merged and unmerged outputs differ"):
        run.check_merge(model, run.MethodResult("Delta-LoRA"), split)


def test_same_seed_same_accuracies_and_weights(tiny, content, tmp_path):
    assert invoke("--tiny", "--seed", 3, "--output", tmp_path, "--quiet").exit_code == 0
    again = json.loads((tmp_path / "results.json").read_text())
    rows = [[*found["methods"], *found["convolutional"]["methods"]] for found in (content, again)]
    for before, after in zip(*rows, strict=True):
        for key in ("test_accuracy", "upright_accuracy", "curves", "validation_accuracy", "merge_difference"):
            assert before[key] == after[key]
        first, second = nblora.load(before["adapter_file"]), nblora.load(after["adapter_file"])
        np.testing.assert_array_equal(first.get_parameters(), second.get_parameters())


def test_quiet_prints_nothing_and_writes_everything(tmp_path):
    result = invoke("--tiny", "--quiet", "--output", tmp_path, "--device", "cpu")
    assert result.exit_code == 0
    assert result.output == ""
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_the_table_takes_the_runs_that_chose_the_settings(monkeypatch, tmp_path):
    """The same settings from the same start give the same weights: what was trained once is not trained again."""
    runs, adapt = [], run._Experiment.adapt

    def counted(self, method, candidate, seed):
        runs.append((self.network.name, method.name, candidate, seed))
        return adapt(self, method, candidate, seed)

    monkeypatch.setattr(run._Experiment, "adapt", counted)
    settings = Settings(tmp_path, seeds=3, epochs=1, pretrain_epochs=1, batch_size=128)
    result = run.run_demo(settings, progress=False)
    assert len(runs) == len(set(runs)) == len(methods.METHODS) * (6 * 2 + 1 + 3 * 2 + 1)
    for name, network in (("dense", result.dense), ("convolutional", result.convolutional)):
        for row in network.methods:
            assert (name, row.method, row.candidate, 2) in runs
            assert len(row.test_accuracy) == len(row.curves) == len(row.seconds) == 3


def test_two_seeds_and_every_method_give_means_and_deviations(tmp_path):
    arguments = ("--seeds", 2, "--epochs", 1, "--pretrain-epochs", 1, "--batch-size", 128)
    result = invoke(*arguments, "--output", tmp_path)
    assert result.exit_code == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in content["methods"]] == [method.name for method in methods.METHODS]
    for row in content["methods"]:
        assert len(row["validation_accuracy"]) == 6
        assert row["test_accuracy_mean"] == pytest.approx(np.mean(row["test_accuracy"]))
        assert row["test_accuracy_std"] == pytest.approx(np.std(row["test_accuracy"], ddof=1))
        candidates = [candidate.label for candidate in next(m for m in methods.METHODS if m.name == row["method"])[2]]
        best = max(candidates, key=lambda name: row["validation_accuracy"][name])
        assert methods.Candidate(**row["candidate"]).label == best
    assert len(re.findall(r" ± ", report.text_table(content))) == 10


def test_each_method_trains_what_it_says():
    trainable = {}
    for method in methods.METHODS:
        model = methods.new_network(0)
        method.prepare(model, 0)
        trainable[method.name] = {p.name for p in model._trainable()}
    factors = {f"hidden{place}.lora_{factor}" for place in (1, 2) for factor in "AB"}
    head = {"head.weight", "head.bias"}
    assert trainable["Head only"] == head
    assert trainable["LoRA"] == head | factors
    assert trainable["Delta-LoRA"] == head | factors | {"hidden1.delta", "hidden2.delta"}
    assert trainable["Full"] == head | {f"hidden{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}


def test_without_scikit_learn_it_says_what_to_install_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = invoke("--tiny", "--output", tmp_path / "none")
    assert result.exit_code == 2
    assert "pip install 'nblora[demo]'" in result.stderr
    assert not (tmp_path / "none").exists()


def test_without_matplotlib_only_the_figure_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("--tiny", "--output", tmp_path)
    assert result.exit_code == 0
    assert "no figure was drawn" in result.stderr
    assert "pip install 'nblora[demo]'" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"figure.png"}
    assert "figure.png" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seeds", "0"), "--seeds"),
        (("--epochs", "0"), "--epochs"),
        (("--seed", "-1"), "--seed"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_a_wrong_option_is_named(arguments, said, tmp_path):
    result = invoke("--tiny", "--output", tmp_path / "none", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "none").exists()


def test_an_output_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    result = invoke("--tiny", "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_the_kernels_run_in_one_thread_and_the_threads_come_back():
    before = numba.get_num_threads()
    with run.one_thread():
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before


@pytest.mark.parametrize(
    ("files", "writable", "empty"), [([], True, True), (["a.nbi"], True, False), ([], False, True)]
)
def test_the_report_says_whether_kernels_were_compiled(monkeypatch, tmp_path, content, files, writable, empty):
    monkeypatch.setattr(jit, "JIT_DISABLED", False)
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path if writable else None)
    for name in files:
        (tmp_path / name).touch()
    assert run.cache_is_empty() is empty
    said = report.machine_text(content | {"compiled": empty})
    assert said.endswith("compiling included." if empty else "its kernels compiled before.")


def test_the_best_method_is_the_one_with_the_highest_mean():
    def network(**means):
        return {
            "methods": [{"method": m, "test_accuracy_mean": v, "test_accuracy_std": 0.01} for m, v in means.items()]
        }

    both = network(LoRA=0.5, Full=0.75) | {"convolutional": network(LoRA=0.875, Full=0.75)}
    said = report.best_text(both)
    assert "Full on the dense network (75.0 ± 1.0 %); LoRA on the convolutional network (87.5 ± 1.0 %)" in said
    assert "left out" in report.best_text(both | {"convolutional": None})


def test_a_device_without_kernels_for_convolutions_leaves_that_network_out(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "runs_convolutions", lambda device: False)
    result = invoke("--tiny", "--output", tmp_path)
    assert result.exit_code == 0
    assert "The convolutional network was left out" in result.stdout
    assert json.loads((tmp_path / "results.json").read_text())["convolutional"] is None
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.slow
def test_the_whole_demo_adapts_for_real(tmp_path):
    start = time.process_time()
    result = run.run_demo(Settings(output=tmp_path), progress=False)
    for network in (result.dense, result.convolutional):
        before, rows = network.before, {row.method: row for row in network.methods}
        assert run.mean(before.upright_accuracy) > 0.85
        assert run.mean(before.test_accuracy) < 0.3
        accuracies = {name: run.mean(row.test_accuracy) for name, row in rows.items()}
        assert accuracies["Head only"] > 0.5
        assert min(accuracies["LoRA"], accuracies["Delta-LoRA"], accuracies["Full"]) > accuracies["Head only"] + 0.03
    assert time.process_time() - start < 100  # processor time, which a busy machine does not stretch
