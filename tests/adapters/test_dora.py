"""DoRA by its formula; what PEFT computes of it is in tests/pretrained."""

import numpy as np
import pytest

import nblora
from nblora.adapters import DoRAAdapter
from nblora.backends import resolve
from nblora.backends.reference import ReferenceBackend
from nblora.formats import SafetensorsFile
from tests.adapters.support import KINDS, base_of, taught
from tests.helpers import assert_close

pytestmark = pytest.mark.small


def norms(adapter):
    """‖W + s A B‖ of each output, plainly."""
    W, A, B = (adapter.get_parameter(name) for name in ("base.weight", "lora_A", "lora_B"))
    return np.linalg.norm(W + adapter.scaling * A @ B, axis=0)


@pytest.mark.parametrize("kind", ["dense", "fully_connected"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_is_the_formula(kind, dropout, rng):
    base, x = base_of(kind)
    adapter = taught(DoRAAdapter(base, 3, alpha=5.0, lora_dropout=dropout, seed=1), x, rng)
    state = adapter._rng.bit_generator.state
    mask = np.ones(x.shape)
    if dropout:
        again = np.random.default_rng()
        again.bit_generator.state = state
        mask = ((again.random(x.reshape(-1, 7).shape) >= dropout) / (1 - dropout)).reshape(x.shape)
    W, A, B = (adapter.get_parameter(name) for name in ("base.weight", "lora_A", "lora_B"))
    f = adapter.get_parameter("magnitude") / norms(adapter)
    z = x @ W + (f - 1) * ((mask * x) @ W) + f * adapter.scaling * ((mask * x) @ A @ B)
    z = z if base.bias is None else z + base.bias
    wanted = nblora.Dense(np.eye(6), activation=base.activation)(z)
    assert_close(adapter(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_against_differences_with_the_norms_held(kind, freeze, dropout, monkeypatch, rng):
    base, x = base_of(kind)
    adapter = DoRAAdapter(base, 2, alpha=3.0, freeze_base_layer=freeze, lora_dropout=dropout, seed=1)
    taught(adapter, x, rng)
    state, held = adapter._rng.bit_generator.state, adapter._backend.output_norms(adapter._adapted())
    y = adapter(x)
    g = rng.normal(size=y.shape)
    gx, gradients = adapter.backward(g), adapter.get_parameter_gradients()
    monkeypatch.setattr(type(adapter._backend), "output_norms", lambda self, operands: held)

    def value(parameters, at):
        adapter.set_parameters(parameters)
        adapter._rng.bit_generator.state = state
        return float((adapter(at) * g).sum())

    def differences(function, at, step=1e-6):
        slopes = np.empty(at.size)
        for place in range(at.size):
            moved = at.copy().reshape(-1)
            moved[place] += step
            above = function(moved.reshape(at.shape))
            moved[place] -= 2 * step
            slopes[place] = (above - function(moved.reshape(at.shape))) / (2 * step)
        return slopes.reshape(at.shape)

    at = adapter.get_parameters()
    np.testing.assert_allclose(gradients, differences(lambda v: value(v, x), at), rtol=0, atol=1e-7)
    if gx is not None:
        np.testing.assert_allclose(gx, differences(lambda v: value(at, v), x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_without_the_dense_sum(kind, dtype, rng):
    base, x = base_of(kind, dtype)
    adapter = taught(DoRAAdapter(base, 3, alpha=7.0, seed=1), x, rng)
    wide = norms(adapter)
    for backend in (resolve("cpu"), ReferenceBackend()):
        assert_close(backend.output_norms(adapter._adapted()), wide, dtype)


def test_an_output_without_weight_gives_its_bias(rng):
    weight = rng.normal(size=(5, 4))
    weight[:, 2] = 0
    adapter = DoRAAdapter(nblora.Dense(weight, rng.normal(size=4)), 2, seed=1)
    x = rng.normal(size=(3, 5))
    assert_close(adapter(x), adapter.base_layer(x))
    adapter.backward_update(rng.normal(size=(3, 4)), 0.1)
    assert np.isfinite(adapter(x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_magnitudes_in_pefts_file(kind, tmp_path, rng):
    """(out,) of linear layers and embeddings, (1, out, 1, ...) of convolutions; use_dora in the configuration."""
    base, x = base_of(kind)
    adapter = taught(DoRAAdapter(base, 3, seed=1), x, rng)
    nblora.save_peft(adapter, tmp_path / "a", name="net.layer")
    shape = {"conv1d": (1, 5, 1), "conv2d": (1, 5, 1, 1)}.get(kind, (6,))
    with SafetensorsFile(tmp_path / "a" / "adapter_model.safetensors") as file:
        stored = file.read("base_model.model.net.layer.lora_magnitude_vector")
    assert stored.shape == shape
    np.testing.assert_array_equal(stored.reshape(-1), adapter.magnitude)
    assert '"use_dora": true' in (tmp_path / "a" / "adapter_config.json").read_text()


def test_two_methods_do_not_share_a_folder(tmp_path):
    base = nblora.Dense.random(4, 4, seed=1)
    both = {"a": DoRAAdapter(base, 2, seed=1), "b": nblora.LoRAAdapter(base, 2, seed=1)}
    with pytest.raises(ValueError, match=r"adapters follow dora, lora, and PEFT has one method for all"):
        nblora.save_peft(both, tmp_path / "a")


def test_a_convolution_in_a_resnet_keeps_its_norm_apart(rng):
    """The batch norm behind a convolution is not computed with it: its scale would change the norms."""
    from nblora.layers.images import BatchNorm2d, convolution_and_norm_gradient, convolve_and_norm
    from nblora.layers.run import Run
    from nblora.layers.sinks import Held

    base, x = base_of("conv2d")
    base = nblora.Conv2d(base.weight, stride=2)
    adapter = taught(DoRAAdapter(base, 2, seed=1), x, rng)
    norm = BatchNorm2d(*(rng.uniform(0.5, 2, 5) for _ in range(4)))
    norm.trainable = False
    run = Run(adapter._backend, training=True)
    y = convolve_and_norm(adapter, norm, x, run)
    np.testing.assert_allclose(y, norm(adapter(x)), rtol=0, atol=1e-13)
    g = rng.normal(size=y.shape)
    gx = convolution_and_norm_gradient(adapter, norm, g, run.back(Held()))
    np.testing.assert_allclose(gx, adapter.backward(norm.backward(g)), rtol=0, atol=1e-13)
