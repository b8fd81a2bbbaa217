"""Every reader of files that others wrote: a whole file for each, how it is damaged, and the call that reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nblora
from nblora import results
from nblora.formats import PeftAdapter, load_peft, save_peft
from nblora.formats.model_files import ORIGINALS_SUFFIX, open_model
from nblora.pretrained.gguf_tokenizer import tokenizer_files
from nblora.storage.safetensors_reader import SafetensorsFile
from nblora.storage.safetensors_writer import write_safetensors
from nblora.sweep import Sweep, read_data, read_results
from nblora.sweep.specification import read_specification
from nblora.weights import combine, inspect, merge, unmerge

from . import mutation

FIXED = {"loss": "mse", "optimizer": "sgd", "batch_size": 8, "progress": False, "seed": 0}


class Reader(NamedTuple):
    """What is read: the folder is made by `make`, of which the file `name` is damaged before each `read(folder)`."""

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    structured: Callable[..., bytes] | None = None


def _network() -> nblora.Sequential:
    model = nblora.Sequential({"first": nblora.Dense.random(5, 4, seed=0), "head": nblora.Dense.random(4, 3, seed=1)})
    return model.adapt("first", "delta", rank=2, modules_to_save="head", lora_dropout=0.1, seed=2)


def _samples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 5)).astype("float32"), rng.normal(size=(16, 3)).astype("float32")


# --- files that nblora wrote -----------------------------------------------------------------------------------------


def _make_tensors(folder: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(3, "float16"), "c": np.zeros((0, 2), "float32")}
    write_safetensors(folder / "file.safetensors", arrays, {"k": "v"})


def _read_tensors(folder: Path) -> None:
    with SafetensorsFile(folder / "file.safetensors") as file:
        for name in file.tensors:
            file.read(name)


def _make_run(folder: Path) -> None:
    callbacks = [nblora.training.EarlyStopping("loss", restore_best=True)]
    nblora.fit(_network(), *_samples(), epochs=1, checkpoint=folder / "run", callbacks=callbacks, **FIXED)


def _resume(folder: Path) -> None:
    callbacks = [nblora.training.EarlyStopping("loss", restore_best=True)]
    nblora.fit(_network(), *_samples(), epochs=1, resume=folder / "run", callbacks=callbacks, **FIXED)


def _make_results(folder: Path) -> None:
    data = nblora.sweep.Data(*_samples(), *_samples())
    runs = nblora.sweep.expand_grid({"method": ["lora"], "rank": [1, 2]}, {"epochs": 1, "optimizer": "sgd"})
    nblora.sweep.Sweep(data, runs, loss="mse").run(folder / "results.jsonl")


def _read_results(folder: Path) -> None:
    read_results(folder / "results.jsonl")
    results.values_by_seed(results.read_result_file(folder / "results.jsonl"))


def _make_demo(folder: Path) -> None:
    row = {"method": "lora", "test_accuracy": [0.5, 0.75], "seconds": 1.5}
    content = {"settings": {"seed": 0}, "not_adapted": {"test_accuracy": 0.25}, "methods": [row]}
    (folder / "results.json").write_text(json.dumps(content))


def _make_curves(folder: Path) -> None:
    rows = ["method,seed,epoch,loss,val_accuracy", "lora,0,1,0.5,0.75", "lora,0,2,0.25,0.875", "delta,0,1,0.5,0.5"]
    (folder / "curves.csv").write_text("\n".join(rows))


def _make_table(folder: Path) -> None:
    rows = ["length;width;label", *(f"{place};{place % 7}.5;{'wide' if place % 3 else 'long'}" for place in range(40))]
    (folder / "own.csv").write_text("\n".join(rows))


def _make_sweep(folder: Path) -> None:
    text = '[data]\nfile = "data.npz"\n[base]\nhidden = [4]\n[grid]\nmethod = ["lora", "delta"]\nlr = [0.1, 1e-2]\n'
    (folder / "sweep.toml").write_text(f"{text}[fixed]\nepochs = 1\nrank = 2\n")
    x, y = _samples()
    labels = y.argmax(axis=1)
    np.savez(folder / "data.npz", x=x, y=labels, x_validation=x, y_validation=labels)


# --- files of other tools --------------------------------------------------------------------------------------------


def _make_adapter(folder: Path) -> None:
    base = nblora.Dense.random(5, 4, seed=0)
    adapter = nblora.LoRAAdapter(base, 2, seed=1)
    adapter.set_parameter("lora_B", np.ones((2, 4)))
    save_peft({"model.layers.0.q_proj": adapter}, folder / "adapter")
    write_safetensors(
        folder / "base.safetensors", {"model.layers.0.q_proj.weight": base.weight.T, "other": np.ones(3, "float32")}
    )


def _read_adapter(folder: Path) -> None:
    with PeftAdapter(folder / "adapter"):
        pass
    load_peft(folder / "adapter", folder / "base.safetensors")
    inspect(folder / "adapter")
    combine([folder / "adapter", folder / "adapter"], folder / "combined", rank=1, force=True)


def _make_model(folder: Path) -> None:
    _make_adapter(folder)
    model = folder / "model"
    model.mkdir()
    names = ["model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"]
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(model / shard, {name: np.ones((4, 5), "float32")})
    index = {"metadata": {"total_size": 160}, "weight_map": dict(zip(names, shards, strict=True))}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "config.json").write_text(json.dumps({"torch_dtype": "float32", "tie_word_embeddings": False}))


def _read_model(folder: Path) -> None:
    with open_model(folder / "model") as model:
        assert model.tensors
    merge(folder / "model", folder / "adapter", folder / "merged", dry_run=True)


def _make_originals(folder: Path) -> None:
    _make_model(folder)
    merge(folder / "model", folder / "adapter", folder / "merged", keep_original=True)


def _unmerge(folder: Path) -> None:
    unmerge(folder / "merged", folder / "restored", force=True)


def _make_gguf(folder: Path) -> None:
    from tests.pretrained.gguf_files import random_llama, sentencepiece, write_gguf

    small = random_llama(folder / "folder", vocabulary=40, inner=32)
    write_gguf(folder / "model.gguf", small, "Q4_1", more=lambda writer: sentencepiece(writer, 40))


def _read_gguf(folder: Path) -> None:
    nblora.load_pretrained(folder / "model.gguf")
    tokenizer_files(folder / "model.gguf")


READERS = {
    "safetensors": Reader("file.safetensors", _make_tensors, _read_tensors, mutation.damage_safetensors),
    "checkpoint": Reader(
        "layer.safetensors",
        lambda folder: _network().save(folder / "layer.safetensors"),
        lambda folder: nblora.load(folder / "layer.safetensors"),
        mutation.damage_sealed,
    ),
    "run": Reader("run", _make_run, _resume, mutation.damage_sealed),
    "peft-config": Reader("adapter/adapter_config.json", _make_adapter, _read_adapter, mutation.damage_json),
    "peft-tensors": Reader(
        "adapter/adapter_model.safetensors", _make_adapter, _read_adapter, mutation.damage_safetensors
    ),
    "index": Reader("model/model.safetensors.index.json", _make_model, _read_model, mutation.damage_json),
    "model-config": Reader("model/config.json", _make_model, _read_model, mutation.damage_json),
    "originals": Reader("merged/model" + ORIGINALS_SUFFIX, _make_originals, _unmerge, mutation.damage_safetensors),
    "gguf": Reader("model.gguf", _make_gguf, _read_gguf),
    "npz": Reader(
        "data.npz", _make_sweep, lambda folder: read_specification(folder / "sweep.toml"), mutation.damage_npz
    ),
    "toml": Reader(
        "sweep.toml", _make_sweep, lambda folder: Sweep.from_toml(folder / "sweep.toml"), mutation.damage_toml
    ),
    "table": Reader("own.csv", _make_table, lambda folder: read_data(folder / "own.csv")),
    "results": Reader("results.jsonl", _make_results, _read_results, mutation.damage_lines),
    "demo": Reader(
        "results.json",
        _make_demo,
        lambda folder: results.values_by_seed(results.read_result_file(folder / "results.json")),
        mutation.damage_json,
    ),
    "curves": Reader(
        "curves.csv",
        _make_curves,
        lambda folder: results.values_by_seed(results.read_result_file(folder / "curves.csv")),
    ),
}
