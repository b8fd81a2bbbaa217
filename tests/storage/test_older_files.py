"""Files of before: written by `tests/data/make_v0.1.py` with nblora 0.1.0, when layers were no tree yet."""

import numpy as np
import pytest

import nblora
from tests.helpers import assert_close
from tests.processes import ROOT

pytestmark = pytest.mark.small

FOLDER = ROOT / "tests" / "data" / "v0.1"
NAMES = ("dense", "fully_connected", "lora_layer", "lora", "delta", "around", "model", "run")


@pytest.fixture
def outputs():
    with np.load(FOLDER / "outputs.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", NAMES)
def test_an_older_file_computes_what_it_did(name, outputs, tmp_path):
    layer = nblora.load(FOLDER / f"{name}.safetensors").eval()
    assert_close(layer(outputs["x"]), outputs[name])
    layer.save(tmp_path / "again")
    assert repr(nblora.load(tmp_path / "again")) == repr(layer)
    assert_close(nblora.load(tmp_path / "again")(outputs["x"]), outputs[name])


def test_an_older_run_goes_on(outputs):
    """A checkpoint that holds its frozen base still resumes, and ends where the uninterrupted run of then ended."""
    model = nblora.load(FOLDER / "model.safetensors")
    settings = {"loss": "mse", "batch_size": 2, "seed": 8, "delta_lr": 0.3, "progress": False}
    nblora.fit(model, outputs["x"], outputs["target"], epochs=4, resume=FOLDER / "run.safetensors", **settings)
    assert_close(model.get_parameters(), outputs["resumed"])
