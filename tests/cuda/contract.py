"""What every device must do, on a small adapter, beside the same adapter on the CPU."""

from unittest import mock

import numpy as np
import pytest

import nblora
from nblora.backends.reference import ReferenceBackend
from tests.cuda.philox import dropout_mask
from tests.helpers import assert_close, make_adapter, make_layer

SIZES = (9, 6)


def pair(rng, move, layout=nblora.FullyConnected, kind=nblora.DeltaLoRAAdapter, **settings):
    """One adapter on the CPU, and its clone on the device."""
    base = make_layer(rng, SIZES, layout, "float32", settings.pop("activation", "gelu"))
    host = make_adapter(rng, kind, base, **settings)
    return host, move(host.clone())


def check_step(rng, move, samples=4, **settings):
    """Forward, backward, update, sweep and merge give what the CPU gives."""
    host, device = pair(rng, move, **settings)
    assert device.device == "cuda:0"
    x, grad = rng.normal(size=(samples, SIZES[0])), rng.normal(size=(samples, SIZES[1]))
    y = device.forward(x)
    assert isinstance(y, np.ndarray)
    assert_close(y, host.forward(x))
    assert_close(device.backward(grad), host.backward(grad))
    assert_close(device.get_parameter_gradients(), host.get_parameter_gradients())
    for adapter in (host, device):
        adapter.update_parameters(0.1)
        adapter.forward(x)
    assert_close(device.backward_update(grad, 0.1), host.backward_update(grad, 0.1))
    for name in host.parameter_names():
        assert_close(device.get_parameter(name), host.get_parameter(name))
    assert_close(device.merge_to_original_layer().forward(x), host.merge_to_original_layer().forward(x))


def check_life(rng, move, path):
    """Parameters, modes, files, moves and the end."""
    host, device = pair(rng, move)
    x = rng.normal(size=(2, 3, SIZES[0])).astype(np.float32)
    with device.disable_adapter(), host.disable_adapter():
        assert_close(device(x), host(x))
    vector = rng.normal(size=host.parameter_count).astype(np.float32)
    device.set_parameters(vector)
    np.testing.assert_array_equal(device.get_parameters(), vector)
    host.set_parameters(vector)
    assert_close(device.eval()(x), host.eval()(x))
    with pytest.raises(RuntimeError):
        device.backward(x[..., : SIZES[1]])
    device.save(path)
    np.testing.assert_array_equal(nblora.load(path).get_parameters(), vector)
    twin = device.clone()
    assert twin.device == device.device
    twin.reset_state(include_delta=True)
    assert not twin.get_current_delta().any()
    np.testing.assert_array_equal(device.get_parameters(), vector)
    figures, reference = device.diagnostics(), host.diagnostics()
    assert figures["device"] == "cuda:0"
    np.testing.assert_allclose(figures["delta_norm"], reference["delta_norm"], rtol=1e-5)
    twin.zero_gradients()
    assert not twin.get_parameter_gradients().any()
    base = device.base_layer
    back = device.to("cpu")
    assert back is device
    assert isinstance(base.weight, np.ndarray)
    np.testing.assert_array_equal(back.get_parameters(), vector)
    move(device)
    device.close()
    device.close()
    with pytest.raises(RuntimeError, match="closed"):
        device(x)
    assert_close(base.forward(x), host.base_layer.forward(x))


def check_gradients_move(rng, move):
    """Gradients held at a move are there after it."""
    host, _ = pair(rng, move)
    x, grad = rng.normal(size=(3, SIZES[0])), rng.normal(size=(3, SIZES[1]))
    host.forward(x)
    host.backward(grad)
    held = host.get_parameter_gradients()
    move(host)
    np.testing.assert_array_equal(host.get_parameter_gradients(), held)
    host.update_parameters(0.1)
    host.to("cpu")
    np.testing.assert_array_equal(host.get_parameter_gradients(), held)
    with pytest.raises(RuntimeError, match="forward"):
        host.backward(grad)


def check_device_arrays(rng, move):
    """What comes from the device goes back to the device, and NumPy takes it."""
    host, device = pair(rng, move)
    x, grad = (rng.normal(size=(3, size)).astype(np.float32) for size in SIZES)
    on_device = device._backend.from_host
    y = device.forward(on_device(x))
    assert not isinstance(y, np.ndarray)
    assert y.__cuda_array_interface__["shape"] == y.shape == (3, SIZES[1])
    assert_close(np.asarray(y), host.forward(x))
    back = device.backward(on_device(grad))
    assert not isinstance(back, np.ndarray)
    assert_close(np.asarray(back), host.backward(grad))
    with pytest.raises(ValueError, match="x must have shape"):
        device.forward(on_device(grad))


def check_fit(rng, move, optimizer="adamw", **settings):
    """A model of a layer and two adapters trains as on the CPU."""
    model = nblora.Sequential(
        make_layer(rng, (6, 8), nblora.FullyConnected, "float32", "relu"),
        make_layer(rng, (8, 7), nblora.Dense, "float32", "tanh"),
        make_layer(rng, (7, 3), nblora.Dense, "float32"),
    )
    model.adapt(["0", "1"], "delta", rank=2, seed=0, modules_to_save="2", lora_dropout=0.1)
    x, y = rng.normal(size=(24, 6)).astype(np.float32), rng.integers(3, size=24)
    losses = []
    for twin in (model.clone(), move(model.clone())):
        with mock.patch.object(ReferenceBackend, "dropout_mask", dropout_mask):  # the CPU drops what a GPU would
            history = nblora.fit(
                twin, x, y, loss="cross_entropy", optimizer=optimizer, epochs=2, batch_size=8, seed=0, **settings
            )
            losses.append((history["loss"], twin.get_parameters(), twin(x[:2])))
    for host, device in zip(*losses, strict=True):
        np.testing.assert_allclose(device, host, rtol=1e-4, atol=1e-5)


def check_dlpack(move):
    """DLPack hands out the values, where they lie."""
    adapter = move(nblora.LoRAAdapter(nblora.Dense.random(*SIZES, seed=0), 2, seed=0))
    array = adapter._backend.from_host(np.arange(6, dtype=np.float32).reshape(2, 3))
    seen = np.from_dlpack(array)
    np.testing.assert_array_equal(seen, [[0, 1, 2], [3, 4, 5]])
    assert seen.ctypes.data == array.address
    with pytest.raises(BufferError, match="copy it first"):
        array.__dlpack__(dl_device=(2, 7))
    copy = np.from_dlpack(array, copy=True)
    array[...] = 0
    assert not seen.any()
    assert copy.any()
