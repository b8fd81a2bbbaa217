"""The library on the CUDA backend: on the emulator, on Numba's simulator in a process of its own, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

import nblora
from nblora import backends
from nblora.backends.device import DeviceArray
from nblora.errors import DeviceMemoryError, DeviceUnavailableError
from nblora.training import EarlyStopping
from tests.cuda import contract
from tests.cuda.emulated import make_backend

ROOT = Path(__file__).parents[2]


@pytest.fixture
def move(monkeypatch):
    """To an emulated device, which is "cuda" for the time of the test."""
    opened = {}

    def open_emulated(index, precision):
        return opened.setdefault(precision, make_backend("random", precision=precision))

    monkeypatch.setattr(backends, "_cuda", open_emulated)
    return lambda layer, **settings: layer.to("cuda", **settings)


@pytest.mark.parametrize("samples", [4, 1, 0])
@pytest.mark.parametrize("layout", [nblora.Dense, nblora.FullyConnected])
@pytest.mark.parametrize("kind", [nblora.LoRAAdapter, nblora.DeltaLoRAAdapter])
def test_step(rng, move, kind, layout, samples):
    contract.check_step(rng, move, samples, kind=kind, layout=layout)


def test_step_of_a_trained_base(rng, move):
    contract.check_step(rng, move, frozen=False, activation="sigmoid")


def test_a_put_off_gradient_is_there_for_who_reads_it(rng, move):
    """PiSSA's factors are halves of those that the product has gradients of, which are put off."""
    host = nblora.LoRAAdapter(contract.make_layer(rng, (9, 6), dtype="float32"), 2, init="pissa", seed=0)
    device = move(host.clone())
    x, grad = rng.normal(size=(4, 9)), rng.normal(size=(4, 6))
    for adapter in (host, device):
        adapter.forward(x)
        adapter.backward(grad)
    contract.assert_close(device.get_parameter_gradients(), host.get_parameter_gradients())


def test_life(rng, move, tmp_path):
    contract.check_life(rng, move, tmp_path / "adapter.safetensors")


def test_gradients_move(rng, move):
    contract.check_gradients_move(rng, move)


def test_device_arrays(rng, move):
    contract.check_device_arrays(rng, move)


@pytest.mark.parametrize(("optimizer", "settings"), [("adamw", {}), ("sgd", {"clip_norm": 1.0})])
def test_fit(rng, move, optimizer, settings):
    contract.check_fit(rng, move, optimizer, **settings)


def test_a_run_goes_on_where_it_was_stopped(rng, move, tmp_path):
    """With the best state so far, which lies on the device, in the file."""
    x, y = rng.normal(size=(24, 6)).astype(np.float32), rng.integers(3, size=24)
    base = contract.make_layer(rng, (6, 3), dtype="float32")
    results = []
    for stops in ((4,), (2, 4)):
        model = move(contract.make_adapter(np.random.default_rng(0), base=base.clone(), rank=2))
        for epochs in stops:
            best, file = EarlyStopping(patience=9, restore_best=True), tmp_path / f"{len(stops)}.safetensors"
            settings = {"checkpoint": file, "resume": file if epochs > stops[0] else None, "callbacks": [best]}
            nblora.fit(model, x, y, loss="cross_entropy", epochs=epochs, batch_size=8, lr=0.01, delta_lr=0.01, seed=0,
                       validation=(x[:9], y[:9]), progress=False, **settings)  # fmt: skip
        results.append(model.get_parameters())
    np.testing.assert_array_equal(*results)


def test_adapter_around_a_model(rng, move):
    host = contract.make_adapter(rng, base=nblora.Sequential(contract.make_layer(rng, (5, 4), dtype="float32")), rank=2)
    device = move(host.clone())
    x, grad = rng.normal(size=(3, 5)), rng.normal(size=(3, 4))
    contract.assert_close(device.forward(x), host.forward(x))
    contract.assert_close(device.backward_update(grad, 0.1), host.backward_update(grad, 0.1))
    contract.assert_close(device.get_parameters(), host.get_parameters())


def test_new_objects_on_the_default_device(rng, move, monkeypatch):
    monkeypatch.setattr(backends, "_default_device", "cuda")
    adapter = nblora.DeltaLoRAAdapter(nblora.Dense.random(4, 3, seed=0), 2, seed=0)
    assert adapter.device == adapter.base_layer.device == adapter.lora_layer.device == "cuda:0"
    monkeypatch.setattr(backends, "_default_device", "cpu")
    reference = nblora.DeltaLoRAAdapter(nblora.Dense.random(4, 3, seed=0), 2, seed=0)
    x = rng.normal(size=(2, 4))
    contract.assert_close(adapter(x), reference(x))


def test_bfloat16_base_is_frozen(rng, move):
    adapter = contract.make_adapter(rng, base=contract.make_layer(rng, (8, 6), dtype="float32"))
    before = adapter.get_parameter("base.weight")
    move(adapter, precision="bf16-base")
    after = adapter.get_parameter("base.weight")
    assert 0 < np.abs(after - before).max() <= np.abs(before).max() / 256
    with pytest.raises(ValueError, match="read-only"):
        adapter.set_parameter("base.weight", before)
    trained = contract.make_adapter(rng, base=contract.make_layer(rng, (8, 6), dtype="float32"), frozen=False)
    before = trained.get_parameter("base.weight")
    np.testing.assert_array_equal(move(trained, precision="bf16-base").get_parameter("base.weight"), before)


def test_a_full_device_leaves_the_adapter_on_the_cpu(rng, move, monkeypatch):
    adapter = contract.make_adapter(rng)
    before = adapter.get_parameters()
    allowed = iter(range(3))

    def full(self, shape, dtype):
        if next(allowed, None) is None:
            raise DeviceMemoryError("cuda:0 is out of memory: 1.0 MB wanted, 0.5 of 2.0 MB free")
        return allocate(self, shape, dtype)

    device = type(make_backend()._device)
    allocate = device._allocate
    monkeypatch.setattr(device, "_allocate", full)
    with pytest.raises(DeviceMemoryError, match="free"):
        move(adapter)
    assert adapter.device == adapter.base_layer.device == adapter.lora_layer.device == "cpu"
    np.testing.assert_array_equal(adapter.get_parameters(), before)
    adapter(rng.normal(size=(2, 7)))


def test_dlpack(move):
    contract.check_dlpack(move)


def test_device_array_is_cut_and_written():
    array = make_backend().from_host(np.ones((2, 3), np.float32))
    assert isinstance(array, DeviceArray)
    assert (array.ndim, array.size, array.nbytes, len(array)) == (2, 6, 24, 2)
    assert array.reshape(-1).shape == (6,)
    assert array.T.shape == (3, 2)
    array[...] = 2
    np.testing.assert_array_equal(array.copy(), np.full((2, 3), 2.0))
    array[1:] = np.full((1, 3), 5)
    np.testing.assert_array_equal(array[:1], np.full((1, 3), 2.0))
    np.testing.assert_array_equal(array[-1:9], np.full((1, 3), 5.0))
    assert array[2:1].shape == (0, 3)
    for place in (0, slice(None, None, 2), (slice(None), 1)):
        with pytest.raises(IndexError, match="cut by a slice of its first axis"):
            array[place] = 1
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(array, copy=False)
    assert "cuda:0" in repr(array)


def test_arrays_of_another_gpu_are_refused(rng, move):
    adapter = move(contract.make_adapter(rng))
    other = make_backend()
    other._device.index, other._device.name = 1, "cuda:1"
    with pytest.raises(ValueError, match=r"on cuda:1 and the layer on cuda:0"):
        adapter(other.from_host(np.ones((2, adapter.in_features))))


@pytest.mark.parametrize("problem", ["the package numba-cuda is not installed", "no NVIDIA driver answers"])
def test_what_is_missing_is_said(monkeypatch, problem):
    monkeypatch.setattr("nblora.backends.device.missing", lambda: problem)
    assert nblora.devices() == ["cpu"]
    assert backends.resolve("auto").device == "cpu"
    with pytest.raises(DeviceUnavailableError, match=problem):
        nblora.Dense.random(3, 2).to("cuda:1")


def test_a_broken_toolkit_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "nblora.backends.device", None)
    assert nblora.devices() == ["cpu"]
    with pytest.raises(DeviceUnavailableError, match="fail at import"):
        backends.resolve("cuda:7")


@pytest.mark.slow
def test_on_the_simulator(tmp_path):
    """Launches, grids and transfers as a device sees them; no kernel runs here but through Numba's own launcher."""
    script = f"""
import numpy as np, nblora, pathlib
from tests.cuda import contract
assert nblora.devices() == ["cpu", "cuda:0"]
assert nblora.Dense.random(2, 2).to("auto").device == "cpu"
rng, move = np.random.default_rng(0), lambda layer: layer.to("cuda")
for layout in (nblora.Dense, nblora.FullyConnected):
    for samples in (4, 1):
        contract.check_step(rng, move, samples, layout=layout)
contract.check_life(rng, move, pathlib.Path({str(tmp_path)!r}) / "adapter.safetensors")
contract.check_gradients_move(rng, move)
contract.check_device_arrays(rng, move)
contract.check_dlpack(move)
contract.check_fit(rng, move)
try:
    nblora.Dense.random(2, 2).to("cuda", precision="tf32")
except nblora.errors.DeviceUnavailableError as error:
    assert "tensor cores" in str(error)
print("whole contract")
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("whole contract\n")
