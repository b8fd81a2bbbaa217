"""Pretrained models on the CUDA backend: on the emulator, on Numba's simulator in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

import nblora
from nblora import backends
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
    models.check_learning(move, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
@pytest.mark.parametrize(
    "settings", [{"recompute": True}, {"accumulate": 2, "batch_size": 2, "clip_norm": 0.5}], ids=str
)
def test_settings_of_learning(move, name, settings):
    models.check_learning(move, name, merged=False, **settings)


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
@pytest.mark.parametrize("name", FAST)
def test_on_the_simulator(name):
    """Launches, grids and transfers as a device sees them."""
    script = f"""
import nblora
from tests.cuda import models
move = lambda model: model.to("cuda")
models.check_learning(move, {name!r})
{"models.check_generation(move, 'llama')" if name == "llama" else ""}
print("as on the CPU")
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("as on the CPU\n")
