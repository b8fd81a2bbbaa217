"""Devices by name: what can run here, what is refused, and who decides."""

import os
import subprocess
import sys

import numpy as np
import pytest

import nblora
from nblora import backends
from nblora.errors import DeviceUnavailableError
from tests.helpers import make_adapter, make_layer, snapshot

pytestmark = pytest.mark.small


@pytest.fixture(autouse=True)
def restore():
    before = backends._default_device
    yield
    backends._default_device = before


has_gpu = any(name.startswith("cuda") for name in nblora.devices())
without_gpu = pytest.mark.skipif(has_gpu, reason="needs a machine without an NVIDIA GPU")


def test_devices_lists_the_cpu():
    assert "cpu" in nblora.devices()
    assert all(isinstance(name, str) for name in nblora.devices())


def test_auto_and_cpu(rng):
    layer = make_layer(rng)
    assert layer.to("cpu").device == "cpu"
    assert layer.to("auto").device in nblora.devices()
    nblora.set_device("auto")
    assert nblora.Dense(np.eye(2)).device in nblora.devices()


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_without_a_gpu_says_what_is_missing(rng, name):
    adapter = make_adapter(rng)
    before = snapshot(adapter)
    with pytest.raises(DeviceUnavailableError, match=r"cuda.*cpu"):
        adapter.to(name)
    with pytest.raises(DeviceUnavailableError):
        nblora.set_device(name)
    assert adapter.device == "cpu"
    assert list(snapshot(adapter)) == list(before)
    assert nblora.Dense(np.eye(2)).device == "cpu"


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "", "cpu:0"])
def test_an_unknown_name_is_a_value_error(rng, name):
    for call in (make_layer(rng).to, nblora.set_device):
        with pytest.raises(ValueError, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:N'"):
            call(name)


def test_a_device_is_a_string(rng):
    for call in (make_layer(rng).to, nblora.set_device):
        with pytest.raises(TypeError, match="device must be a string"):
            call(0)


def test_precision(rng):
    with pytest.raises(ValueError, match="precision must be one of"):
        make_layer(rng).to("cpu", precision="float8")


def test_moving_takes_the_base_along(rng):
    adapter = make_adapter(rng)
    adapter.to("cpu")
    assert adapter.device == adapter.base_layer.device == adapter.lora_layer.device == "cpu"
    model = nblora.Sequential(make_layer(rng), make_layer(rng, (5, 3)))
    assert model.to("cpu") is model
    assert {layer.device for layer in model} == {"cpu"}


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


MAKE = "import numpy, nblora; print(nblora.Dense(numpy.eye(2)).device)"


def test_the_environment_decides():
    assert run(MAKE, NBLORA_DEVICE="cpu").stdout.strip() == "cpu"
    wrong = run(MAKE, NBLORA_DEVICE="toaster")
    assert wrong.returncode != 0
    assert "toaster" in wrong.stderr


def test_set_device_beats_the_environment():
    code = "import nblora; nblora.set_device('cpu'); " + MAKE
    assert run(code, NBLORA_DEVICE="toaster").stdout.strip() == "cpu"
