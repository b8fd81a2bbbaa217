"""Pretrained models on the CUDA backend: on the emulator, on Numba's simulator in a process of its own."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

import nblora
from nblora import backends
from nblora.cli import main
from nblora.errors import NonFiniteError
from tests.cuda import models
from tests.cuda.emulated import make_backend

ROOT = Path(__file__).parents[2]
FAST = ("bert", "llama", "resnet")


@pytest.fixture
def move(monkeypatch):
    """To an emulated device."""
    opened = {}

    def open_emulated(index, precision):
        return opened.setdefault(precision, make_backend("random", precision=precision))

    monkeypatch.setattr(backends, "_cuda", open_emulated)
    return lambda model, **settings: model.to("cuda", **settings)


@pytest.mark.parametrize("name", FAST)
def test_a_step(move, name):
    models.check_learning(move, name, samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.CASES)
def test_learning(move, name):
    models.check_learning(move, name, samples=4, batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
@pytest.mark.parametrize(
    "settings", [{"recompute": True}, {"accumulate": 2, "batch_size": 1, "clip_norm": 0.5}], ids=str
)
def test_settings_of_learning(move, name, settings):
    models.check_learning(move, name, samples=4, merged=False, **{"batch_size": 2, **settings})


def test_generation(move):
    models.check_generation(move, "llama", tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2, table"])
def test_long_generation(move, monkeypatch, name):
    monkeypatch.setattr("nblora.pretrained.generation.ROOM", 2)  # so that keys get new places
    models.check_generation(move, name, tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_dropout_of_the_base(move, name):
    """Masks are a GPU's own: the loss is another, and every seed has its own."""
    losses = []
    for seed in (0, 0, 1):
        model = move(models.load(name))
        x, y = models.data(model)
        history = nblora.fit(model, x, y, epochs=1, batch_size=4, seed=seed, base_dropout=True, progress=False)
        losses.append(history["loss"][0])
    assert np.isfinite(losses).all()
    assert losses[0] == losses[1] != losses[2]


def test_what_is_not_finite_is_named(move):
    model = models.load("bert")
    name = "bert.encoder.layer.0.output.dense.base.weight"
    weight = model.get_parameter(name)
    weight[0, 0] = np.nan
    model.set_parameter(name, weight)
    x, y = models.data(model, 2)
    with pytest.raises(NonFiniteError, match=r"layer\.0\.output\.dense"):
        nblora.fit(move(model), x, y, epochs=1, batch_size=2, seed=0, progress=False)


@pytest.mark.slow
def test_a_frozen_base_in_bfloat16(move):
    """Weights and tables are rounded once: outputs are near those of the CPU, with the memory of a half."""
    host, device = models.load("bert"), models.load("bert")
    x, _ = models.data(host)
    device.to("cuda", precision="bf16-base")
    expected, found = host.eval()(x), device.eval()(x)
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_files_and_several_adapters(move, tmp_path):
    """What is saved on a device is loaded anywhere; sums of adapters, clones and pickles stay on it."""
    host, device = models.load("bert"), move(models.load("bert"))
    x, y = models.data(host)
    for model in (host, device):
        nblora.fit(model, x, y, epochs=1, batch_size=8, lr=1e-2, seed=0, progress=False)
    expected = host.eval()(x)
    device.eval().save_adapter(tmp_path / "adapter")
    device.merge().save_pretrained(tmp_path / "merged")
    device.save(tmp_path / "model.safetensors")
    plain = {"task": "sequence-classification"}
    base = models.FOLDER / "bert_cls_qv" / "base"
    for model in (
        nblora.load_pretrained(base, **plain).load_adapter(tmp_path / "adapter"),
        nblora.load_pretrained(tmp_path / "merged", **plain),
        nblora.load(tmp_path / "model.safetensors"),
        pickle.loads(pickle.dumps(device)),
        device.clone(),
    ):
        np.testing.assert_allclose(model.eval()(x), expected, **models.CLOSE)
    both, folder = [], models.FOLDER / "llama_clm_all"
    texts = models.data(models.load("llama"))[0]
    for bring in (lambda model: model, move):
        model = bring(nblora.load_pretrained(folder / "base", task="causal-lm"))
        for name in ("one", "two"):
            model.load_adapter(folder / "adapter", name)
        both.append((model.device, model.set_adapter({"one": 0.5, "two": 0.25}).eval()(texts)))
    assert [name for name, _ in both] == ["cpu", "cuda:0"]
    np.testing.assert_allclose(both[1][1], both[0][1], **models.CLOSE)


@pytest.mark.slow
def test_the_commands(move, monkeypatch, tmp_path):
    """`finetune`, `predict` and `generate` with the device of `NBLORA_DEVICE` say what they say on the CPU."""
    for package in ("tokenizers", "jinja2", "gguf"):
        pytest.importorskip(package, reason="the commands' models and texts need it (extra test)")
    from tests.finetuning import support

    encoder, model = support.encoder(tmp_path / "encoder"), support.language_model(tmp_path / "model")
    labels = support.write(tmp_path / "labels.jsonl", support.labelled(16))
    turns = support.write(tmp_path / "turns.jsonl", support.completions(12))
    said = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("NBLORA_DEVICE", device)
        classes, language = tmp_path / f"classes-{device}", tmp_path / f"language-{device}"
        options = f"--rank 2 --seed 0 --output {classes}", f"--method delta --rank 2 --seed 0 --output {language}"
        commands = (
            f"finetune --model {encoder} --data {labels} --epochs 1 {options[0]}",
            f"predict --model {encoder} --adapter {classes} --data {labels}",
            f"finetune --model {model} --data {turns} --iters 2 {options[1]}",
            f"generate --model {model} --adapter {language} --prompt ab --max-new-tokens 5",
        )
        said.append([CliRunner().invoke(main, command.split()) for command in commands])
    for on_cpu, on_gpu in zip(*said, strict=True):
        assert on_cpu.exit_code == on_gpu.exit_code == 0, on_gpu.output
        same = [re.sub(r"(0\.\d{4})\d+", r"\1", done.stdout.replace("-cuda", "-cpu")) for done in (on_cpu, on_gpu)]
        assert same[0] == same[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_on_the_simulator(name):
    """Launches, grids and transfers as a device sees them."""
    script = f"""
import nblora
from tests.cuda import models
move = lambda model: model.to("cuda")
models.check_learning(move, {name!r}, samples=4, batch_size=2)
{"models.check_generation(move, 'llama')" if name == "llama" else ""}
print("as on the CPU")
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("as on the CPU\n")
