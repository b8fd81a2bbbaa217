"""Sweeps on texts: runs are those of `TextClassifier`, wherever they are executed."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")

from nblora.errors import FormatError
from nblora.estimators import TextClassifier
from nblora.sweep import Data, Sweep, read_texts
from tests.sweep.conftest import results_only
from tests.text.folders import sentence_folder

TEXTS = ["the cat sat on the mat", "the law has tax", "tax law on tax", "cat has mat", "law law tax", "mat cat sat"] * 6
LABELS = ["pet", "law", "law", "pet", "law", "pet"] * 6
GRID = {"rank": [1, 2], "lr": [1e-3, 5e-3, 2e-2], "seed": [0, 1]}
FIXED = {"epochs": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(sentence_folder(tmp_path_factory.mktemp("models") / "minilm"))


@pytest.fixture(scope="module")
def texts():
    return {
        "x": TEXTS[:18], "y": LABELS[:18], "x_validation": TEXTS[18:27], "y_validation": LABELS[18:27],
        "x_test": TEXTS[27:], "y_test": LABELS[27:],
    }  # fmt: skip


@pytest.fixture(scope="module")
def sweep(texts, folder):
    return Sweep.grid(texts, GRID, FIXED, base=folder)


@pytest.fixture(scope="module")
def serial(sweep, tmp_path_factory):
    return sweep.run(tmp_path_factory.mktemp("serial") / "results.jsonl", workers=1)


def test_a_run_is_a_text_classifiers(sweep, serial, texts, folder):
    assert [record["status"] for record in serial] == ["done"] * 12
    assert len({record["parameters_digest"] for record in serial}) == 12
    for record in serial[::5]:
        settings = record["settings"]
        classifier = TextClassifier(
            folder, rank=settings["rank"], lr=settings["lr"], random_state=settings["seed"], **FIXED
        ).fit(texts["x"], texts["y"])
        assert record["metrics"]["val_accuracy"] == classifier.score(texts["x_validation"], texts["y_validation"])
        assert record["metrics"]["test_accuracy"] == classifier.score(texts["x_test"], texts["y_test"])
        shares = classifier.predict_proba(texts["x_test"])
        right = [list(classifier.classes_).index(label) for label in texts["y_test"]]
        loss = -np.log(shares[np.arange(len(right)), right]).mean()
        assert record["metrics"]["test_loss"] == pytest.approx(loss, rel=1e-4)
        assert record["history"]["loss"] == classifier.loss_curve_
    best = sweep.best(serial)
    assert best["metrics"]["val_accuracy"] == max(record["metrics"]["val_accuracy"] for record in serial)


@pytest.mark.slow
def test_dask_equals_serial(sweep, serial, tmp_path):
    pytest.importorskip("distributed")
    records = sweep.run(tmp_path / "results.jsonl", cluster="dask", workers=2)
    assert len(records) == 12
    assert results_only(records) == results_only(serial)
    assert len({record["process"] for record in records}) == 2


@pytest.mark.slow
def test_processes_equal_serial_and_a_second_start_runs_nothing(sweep, serial, tmp_path):
    path = tmp_path / "results.jsonl"
    assert results_only(sweep.run(path, workers=2)) == results_only(serial)
    before = path.read_bytes()
    sweep.run(path, workers=2)
    assert path.read_bytes() == before


def test_a_toml_file_of_texts(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "minilm")
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sweep.toml").write_text(
        '[data]\nfile = "own.jsonl"\nvalidation = 0.25\ntest = 0.25\n[base]\nmodel = "minilm"\nmax_length = 6\n'
        '[grid]\nmethod = ["head", "lora"]\nrank = [2]\n[fixed]\nepochs = 1\n'
    )
    sweep = Sweep.from_toml(tmp_path / "sweep.toml")
    assert (len(sweep.task.data.x), len(sweep.task.data.x_validation), len(sweep.task.data.x_test)) == (18, 9, 9)
    assert (sweep.task.max_length, sweep.task.target) == (6, "all-linear")
    records = sweep.run(tmp_path / "results.jsonl", workers=1)
    assert [record["status"] for record in records] == ["done"] * 2
    assert records[0]["trainable_parameters"] == 24 * 2 + 2 < records[1]["trainable_parameters"]


def test_a_folder_has_parts_of_its_own(tmp_path):
    for name, count in (("train", 3), ("valid", 2)):
        (tmp_path / f"{name}.csv").write_text("text,text_pair,label\n" + "a,b,1\n" * (count - 1) + "c,d,2\n")
    data = read_texts(tmp_path)
    assert (data.x.shape, data.x_validation.shape, data.x_test) == ((3, 2), (2, 2), None)
    assert data.y.tolist() == ["1", "1", "2"]
    (tmp_path / "valid.csv").unlink()
    with pytest.raises(FormatError, match=r"holds no valid\.jsonl"):
        read_texts(tmp_path)
    (tmp_path / "plain.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(FormatError, match="have no label"):
        read_texts(tmp_path / "plain.jsonl")


def test_what_decides_a_result_has_a_digest(texts, folder, tmp_path):
    def digest(base=folder, **options):
        return Sweep.grid(options.pop("data", texts), GRID, FIXED, base=base, **options).task.digest()

    shutil.copytree(folder, tmp_path / "other")
    assert digest() == digest(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    swapped = texts | {"x": [*TEXTS[1:18], TEXTS[0]]}
    moved = texts | {"x": [TEXTS[0][:3], TEXTS[0][3:] + TEXTS[1], *TEXTS[2:18]]}
    different = [
        digest(), digest(tmp_path / "other"), digest(max_length=5), digest(target="query"), digest(threads=2),
        digest(data=swapped), digest(data=moved),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("changed", "options", "error", "words"),
    [
        ({"y_validation": ["pet"] * 8 + ["new"]}, {}, ValueError, "y_validation holds the label 'new'"),
        ({"x": [1.5] * 18}, {}, TypeError, "x must hold texts for a model of text, got 1.5"),
        ({"x": TEXTS[:4]}, {}, ValueError, "y must hold a label for each of the 4 texts of x"),
        ({}, {"modules_to_save": "classifier"}, ValueError, "on texts the head is trained"),
        ({}, {"loss": "mse"}, ValueError, "on texts the head is trained"),
        ({}, {"max_length": 0}, ValueError, "max_length"),
    ],
)
def test_what_cannot_be_swept(texts, folder, changed, options, error, words):
    with pytest.raises(error, match=words):
        Sweep.grid(texts | changed, GRID, FIXED, base=folder, **options)


@pytest.mark.parametrize("setting", [{"optimizer": "sgd"}, {"clip_norm": 1.0}, {"init": "pissa"}])
def test_settings_that_are_not_for_texts_are_named(texts, folder, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is no setting of method 'lora' on texts"):
        Sweep.grid(texts, GRID, FIXED | setting, base=folder)


def test_arrays_of_texts_are_data(folder):
    data = Data(*(np.array(part) for part in (TEXTS[:12], LABELS[:12], TEXTS[12:18], LABELS[12:18])))
    assert len(Sweep.grid(data, {"rank": [1]}, base=folder).runs) == 1
