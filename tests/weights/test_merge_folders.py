"""A merged folder is complete, and no output replaces what nblora did not write."""

import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import nblora
from nblora.cli import main
from nblora.errors import FormatError
from nblora.formats import PeftAdapter, save_peft
from nblora.weights import combine, inspect, merge, unmerge
from tests.helpers import make_adapter
from tests.weights.support import linear_factors, read_model, snapshot, write_adapter, write_file

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.fixture
def folder(tmp_path, rng):
    """A folder as sentence-transformers saves it, with another form of the model beside it."""
    base = tmp_path / "base"
    layers = {f"encoder.layer.{n}.query.weight": rng.standard_normal((6, 6)).astype("float32") for n in range(3)}
    write_file(base / "model.safetensors", layers | {"norm.weight": np.ones(6, "float32")})
    write_file(base / "2_Dense" / "model.safetensors", {"linear.weight": rng.standard_normal((4, 6))})
    for name, text in {
        "modules.json": json.dumps(MODULES),
        "config.json": '{"model_type": "bert"}',
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "2_Dense/config.json": "{}",
        "assets/icons/logo.svg": "<svg/>",
        "onnx/model.onnx": "old weights",
        "onnx/config.json": "{}",
        ".git/HEAD": "ref",
        "assets/.DS_Store": "",
    }.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    (base / "3_Normalize").mkdir()  # a layer without settings
    return base


@pytest.fixture
def adapter(tmp_path, rng):
    return write_adapter(tmp_path / "adapter", linear_factors(rng, "encoder.layer.1.query", 6, 6))


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_subfolders_come_along_and_other_forms_of_the_model_stay_behind(folder, adapter, tmp_path):
    report = merge(folder, adapter, tmp_path / "out", keep_original=True)
    kept = {name for name in files_of(folder) if not name.startswith("onnx/") and "/." not in f"/{name}"}
    assert kept < files_of(tmp_path / "out")  # and the originals
    for name in kept - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "out" / "3_Normalize").is_dir()
    assert any("onnx/ stays behind" in warning for warning in report.warnings)
    unmerge(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == kept
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_broken_modules_json_is_no_reason_to_fail(folder, adapter, tmp_path):
    for text in ("{", "[1]", '[{"path": 3}]', "{}"):
        (folder / "modules.json").write_text(text)
        merge(folder, adapter, tmp_path / "out")
        assert "1_Pooling/config.json" in files_of(tmp_path / "out")
        assert "2_Dense/config.json" not in files_of(tmp_path / "out")  # weights that nobody names


def someone_elses(tmp_path, base):
    """Outputs that are there already: a folder of another model, and a file."""
    shutil.copytree(base, tmp_path / "theirs")
    shutil.rmtree(tmp_path / "theirs" / "onnx")
    shutil.rmtree(tmp_path / "theirs" / ".git")
    shutil.copy(base / "model.safetensors", tmp_path / "theirs.safetensors")
    return tmp_path / "theirs", tmp_path / "theirs.safetensors"


def test_what_nblora_did_not_write_is_not_replaced_without_force(folder, adapter, tmp_path):
    for place in someone_elses(tmp_path, folder):
        source = folder if place.is_dir() else folder / "model.safetensors"
        before = snapshot(place.parent)
        with pytest.raises(FormatError, match=r"nblora did not write it.*--force"):
            merge(source, adapter, place)
        result = CliRunner().invoke(main, ["merge", str(source), "--adapter", str(adapter), "-o", str(place)])
        assert result.exit_code == 2
        assert "--force" in result.stderr
        assert snapshot(place.parent) == before
        words = ["merge", str(source), "--adapter", str(adapter), "-o", str(place), "--force"]
        assert CliRunner().invoke(main, words).exit_code == 0
        assert not np.array_equal(*(read_model(m)["encoder.layer.1.query.weight"] for m in (place, source)))
        merge(source, adapter, place)  # now it is nblora's
    (tmp_path / "theirs" / "thesis.tex").write_text("mine")
    with pytest.raises(FormatError, match=r"holds 'thesis\.tex'"):
        merge(folder, adapter, tmp_path / "theirs")
    (tmp_path / "theirs" / "thesis.tex").rename(tmp_path / "theirs" / "1_Pooling" / "thesis.tex")
    with pytest.raises(FormatError, match=r"holds '1_Pooling.thesis\.tex'"):
        merge(folder, adapter, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "1_Pooling" / "thesis.tex").read_text() == "mine"


def test_force_never_replaces_an_input(folder, adapter):
    before = snapshot(folder)
    with pytest.raises(FormatError, match="is the output and the input"):
        merge(folder, adapter, folder, force=True)
    assert snapshot(folder) == before


def test_force_never_removes_an_input(folder, adapter, tmp_path, monkeypatch):
    """An output that holds the base or the adapter somewhere below would take them away with what else is there."""
    before = snapshot(tmp_path)
    monkeypatch.chdir(folder)
    for place in (tmp_path, "..", folder / "..", folder / "1_Pooling" / ".." / ".."):
        with pytest.raises(FormatError, match="holds the input"):
            merge(folder, adapter, place, force=True)
        with pytest.raises(FormatError, match="holds the input"):
            unmerge(folder, place, adapter, force=True)
        with pytest.raises(FormatError, match="holds the input"):
            combine(adapter, place, force=True)
    assert snapshot(tmp_path) == before


def test_where_folders_cannot_be_exchanged_none_is_lost(folder, adapter, tmp_path, monkeypatch):
    merge(folder, adapter, tmp_path / "out")
    before = snapshot(tmp_path)
    monkeypatch.setattr("nblora.formats.replace._exchange", lambda first, second: False)
    merge(folder, adapter, tmp_path / "out")
    assert snapshot(tmp_path) == before
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"):
        merge(folder, adapter, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_unmerge_combine_and_exports_ask_for_force_too(folder, adapter, tmp_path, rng):
    theirs = write_adapter(tmp_path / "theirs", linear_factors(rng, "x", 6, 6))
    single = tmp_path / "own.safetensors"
    shutil.copy(folder / "model.safetensors", single)

    def exported(place, **options):
        save_peft({"a": make_adapter(rng, nblora.LoRAAdapter)}, place, **options)

    def resaved(place, **options):
        with PeftAdapter(adapter) as opened:
            opened.save(place, **options)

    tasks = (
        (lambda place, **options: combine(adapter, place, **options), theirs),
        (exported, theirs),
        (resaved, theirs),
        (lambda place, **options: unmerge(folder / "model.safetensors", place, adapter, **options), single),
    )
    for task, place in tasks:
        copy = place.with_name(f"copy-{place.name}")
        shutil.copytree(place, copy) if place.is_dir() else shutil.copy(place, copy)
        before = snapshot(copy)
        with pytest.raises(FormatError, match="nblora did not write it"):
            task(copy)
        assert snapshot(copy) == before
        task(copy, force=True)
        task(copy)
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()


# --- inspecting a base -------------------------------------------------------------------------------------------


def test_inspect_says_what_a_checkpoint_holds(folder):
    report = inspect(folder)
    groups = {group.name: group for group in report.tensors}
    assert groups.keys() == {"encoder.layer.*.query.weight", "norm.weight"}
    queries = groups["encoder.layer.*.query.weight"]
    assert (queries.count, queries.shape, queries.dtype, queries.parameters) == (3, (6, 6), "F32", 108)
    assert queries.adaptable
    assert not groups["norm.weight"].adaptable
    assert (report.parameters, report.nbytes, report.files) == (114, 456, ["model.safetensors"])
    assert "bert, 4 tensors, 114 parameters, 456 bytes in model.safetensors" in report.table()
    for path in (folder, folder / "model.safetensors"):
        result = CliRunner().invoke(main, ["inspect", str(path)])
        assert result.exit_code == 0
        assert "encoder.layer.*.query.weight" in result.output
    assert json.loads(CliRunner().invoke(main, ["inspect", str(folder), "--json"]).output)["parameters"] == 114
    assert CliRunner().invoke(main, ["inspect", str(folder), "--plot", "a.png"]).exit_code == 2


def test_inspect_still_knows_adapters(adapter, tmp_path):
    for path in (adapter, adapter / "adapter_model.safetensors"):
        assert inspect(path).modules[0].name == "encoder.layer.1.query"
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        inspect(adapter)
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing")]).exit_code == 2


# --- Ctrl-C ------------------------------------------------------------------------------------------------------


def test_an_interrupted_command_exits_with_130(folder, adapter, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nblora.weights.merging.merge", interrupted)
    words = ["merge", str(folder), "--adapter", str(adapter), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
