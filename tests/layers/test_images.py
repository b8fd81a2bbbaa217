"""Pooling and batch norm with fixed statistics: kernels and reference against loops, and as layers of a network."""

import numpy as np
import pytest

import nblora
from nblora.backends import resolve
from nblora.backends.blocks import Pooling
from nblora.backends.reference import ReferenceBackend
from nblora.kernels.common.elementwise import IDENTITY, QUICK_GELU, SILU
from nblora.layers import AvgPool2d, BatchNorm2d, GlobalAvgPool2d, MaxPool2d
from nblora.layers.images import convolution_and_norm_gradient, convolve_and_norm
from nblora.layers.run import Run
from nblora.layers.sinks import Held, Sweep
from tests import oracle
from tests.helpers import DTYPES, assert_close, assert_unchanged, make_adapter, snapshot

from .support import BACKENDS

pytestmark = pytest.mark.small
WINDOWS = [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 0)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (3, 1), (0, 0))]


@pytest.mark.parametrize("maximum", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", WINDOWS)
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (0, 2, 6, 6), (1, 1, 3, 3)])
def test_pooling_against_loops(rng, backend, dtype, maximum, sizes, shape):
    x = rng.normal(size=shape).astype(dtype)
    exact, jacobian = oracle.pooled(x.astype(np.float64), maximum, *sizes)
    window = Pooling(maximum, *sizes)
    y, places = BACKENDS[backend].pool(x, window)
    assert y.dtype == x.dtype
    assert_close(y, exact)
    grad = rng.normal(size=exact.shape).astype(dtype)
    expected = np.zeros(shape)
    for (n, c, h, w), shares in jacobian.items():
        for (i, j), share in shares.items():
            expected[n, c, i, j] += share * grad[n, c, h, w]
    assert_close(BACKENDS[backend].pool_gradient(grad, places, window, *shape[2:]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_the_largest_and_of_equal_ones_the_first(backend):
    x = np.array([[[[1.0, np.nan], [2.0, 5.0]]], [[[3.0, 3.0], [3.0, 3.0]]]])
    window = Pooling(True, (2, 2), (2, 2), (0, 0))
    y, places = BACKENDS[backend].pool(x, window)
    np.testing.assert_array_equal(y.ravel(), [np.nan, 3.0])
    gx = BACKENDS[backend].pool_gradient(np.ones((2, 1, 1, 1)), places, window, 2, 2)
    np.testing.assert_array_equal(gx.ravel(), [0, 1, 0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("code", [IDENTITY, SILU, QUICK_GELU])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_against_loops(rng, backend, dtype, code):
    x, grad = rng.normal(size=(2, 3, 4, 5, 7)).astype(dtype)
    scale, shift = rng.normal(size=(2, 4)).astype(dtype)
    z = np.einsum("nchw,c->nchw", x.astype(np.float64), scale.astype(np.float64)) + shift[:, None, None]
    name = oracle.ACTIVATIONS[code]
    assert_close(BACKENDS[backend].channels(x, scale, shift, code), oracle.each(oracle.act, z, name))
    g = grad * oracle.each(oracle.act_derivative, z, name)
    found = BACKENDS[backend].channels_gradient(grad, x, scale, shift, code)
    for gradient, exact in zip(
        found, (g * scale[:, None, None], (g * x).sum(axis=(0, 2, 3)), g.sum(axis=(0, 2, 3))), strict=True
    ):
        assert_close(gradient, exact, dtype)


# --- layers ----------------------------------------------------------------------------------------------------------


def batch_norm(rng, channels=4, dtype="float64", activation="relu"):
    weight, bias, mean = rng.normal(size=(3, channels)).astype(dtype)
    return BatchNorm2d(weight, bias, mean, rng.uniform(0.5, 2, channels).astype(dtype), activation=activation)


def network(rng, dtype="float64"):
    return nblora.Sequential(
        nblora.Conv2d.random(3, 4, 3, padding=1, dtype=dtype, seed=0),
        batch_norm(rng, dtype=dtype),
        MaxPool2d(4, 3, stride=2, padding=1, dtype=dtype),
        AvgPool2d(4, 2, dtype=dtype),
        GlobalAvgPool2d(4, dtype=dtype),
        nblora.Dense.random(4, 2, dtype=dtype, seed=1),
    )


def test_central_differences_of_a_network(rng):
    model, x = network(rng), rng.normal(size=(2, 3, 9, 8))
    grad = rng.normal(size=(2, 2))
    model(x)
    gx, vector = model.backward(grad), model.get_parameters()
    gradients = model.get_parameter_gradients()
    assert not any(name.endswith(("running_mean", "running_var")) for name, _, _ in model._trainable())
    for start, gradient in ((x, gx), (vector, gradients)):
        for _ in range(5):
            direction = rng.normal(size=start.shape)
            values = []
            for step in (1e-6, -1e-6):
                if start is x:
                    values.append((model(x + step * direction) * grad).sum())
                else:
                    model.set_parameters(vector + step * direction)
                    values.append((model(x) * grad).sum())
            model.set_parameters(vector)
            assert abs((values[0] - values[1]) / 2e-6 - (gradient * direction).sum()) <= 1e-6


def test_batch_norm_by_its_formula(rng):
    layer, x = batch_norm(rng, activation="identity"), rng.normal(size=(2, 4, 3, 5))
    mean, variance = (layer.get_parameter(f"running_{name}")[:, None, None] for name in ("mean", "var"))
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    assert_close(layer(x), (x - mean) / np.sqrt(variance + 1e-5) * weight + bias)
    before = layer.get_parameter("running_mean")
    layer.backward_update(np.ones(x.shape), 0.1)
    np.testing.assert_array_equal(layer.get_parameter("running_mean"), before)


@pytest.mark.parametrize("backend", [resolve("cpu"), ReferenceBackend()], ids=["cpu", "reference"])
@pytest.mark.parametrize("kind", [None, nblora.LoRAAdapter, nblora.DeltaLoRAAdapter])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "held"])
def test_a_norm_in_its_convolutions_epilogue(rng, monkeypatch, backend, kind, frozen, bias, fused):
    """Against the two one after the other: values, gradients, three updates; nothing of the norm changes."""
    layer = nblora.Conv2d.random(3, 4, 3, stride=2, padding=1, bias=bias, dtype="float64", seed=0)
    if kind is not None:
        layer = make_adapter(rng, kind, layer, frozen=frozen)
    layer.trainable = not frozen or kind is not None
    norm = batch_norm(rng, activation="gelu")
    norm.trainable = False
    twin, before, calls = layer.clone(), snapshot(norm), []
    separate = type(backend).channels
    monkeypatch.setattr(backend, "channels", lambda *a: calls.append(1) or separate(backend, *a))
    for _ in range(3):
        x, grad = rng.normal(size=(2, 3, 9, 8)), rng.normal(size=(2, 4, 5, 4))
        found = []
        for convolution in (layer, twin):
            run = Run(backend, training=True)
            if convolution is layer:
                y = convolve_and_norm(convolution, norm, x, run)
                assert not calls
            else:
                y = norm._forward(convolution._forward(x, run), run)
            sink = Sweep(0.05, 0.05) if fused else Held()
            run.back(sink)
            if convolution is layer:
                gx = convolution_and_norm_gradient(convolution, norm, grad, run)
            else:
                gx = convolution._backward(norm._backward(grad, run), run)
            if fused:
                sink.finish(backend, [each.parameter for each in convolution._trainable()])
            trained = [each.parameter for each in convolution._trainable()]
            found.append([y, gx, *(p.array.copy() for p in trained), *(p.gradient for p in trained if not fused)])
            if not fused:
                assert len(found[-1]) == 2 + 2 * len(trained)
        calls.clear()
        for value, wanted in zip(*found, strict=True):
            assert (value is None) == (wanted is None)
            if value is not None:
                assert_close(value, wanted)
    assert_unchanged(norm, before)


def test_a_trained_norm_or_an_activation_between_is_not_folded(rng):
    norm = batch_norm(rng)
    for activation, trained in (("identity", True), ("relu", False)):
        layer = nblora.Conv2d.random(3, 4, 3, dtype="float64", activation=activation, seed=0)
        norm.trainable = trained
        x, run, apart = rng.normal(size=(2, 3, 5, 6)), Run(resolve("cpu"), training=True), Run(resolve("cpu"))
        np.testing.assert_array_equal(
            convolve_and_norm(layer, norm, x, run), norm._forward(layer._forward(x, apart), apart)
        )
        sink = Held()
        grad = rng.normal(size=(2, 4, 3, 4))
        convolution_and_norm_gradient(layer, norm, grad, run.back(sink))
        assert (norm._weight.gradient is not None) is trained
        norm._weight.gradient = norm._bias.gradient = None


def test_files_clones_compiling_and_one_sample(rng, tmp_path):
    model, x = network(rng), rng.normal(size=(2, 3, 9, 8))
    before = snapshot(model)
    model.compile()
    assert_unchanged(model, before)
    model.save(tmp_path / "model")
    for twin in (nblora.load(tmp_path / "model"), model.clone()):
        np.testing.assert_array_equal(twin(x), model(x))
    assert_close(model(x[1]), model(x)[1])
    assert model(x[1]).shape == (2,)
    assert model.backward(np.ones(2)).shape == x[1].shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_onnx(rng, dtype, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = network(rng, dtype), rng.normal(size=(3, 3, 9, 8)).astype(dtype)
    model.to_onnx(tmp_path / "model.onnx")
    if dtype == "float64":  # ONNX Runtime has no convolution in it
        session = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(tmp_path / "model.onnx"))
    else:
        session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert_close(session.run(None, {"x": x})[0], model.eval()(x))


def test_wrong_arguments(rng):
    with pytest.raises(ValueError, match=r"too small for MaxPool2d\(2, kernel_size=\[3, 3\].*output would be empty"):
        MaxPool2d(2, 3)(np.zeros((1, 2, 2, 5)))
    with pytest.raises(ValueError, match="padding must be at most half of kernel_size"):
        AvgPool2d(2, 3, padding=2)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 2, height, width\)"):
        GlobalAvgPool2d(2)(np.zeros((1, 3, 2, 5)))
    with pytest.raises(ValueError, match=r"variance must have shape \(2,\)"):
        BatchNorm2d([1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="kernel_size must be at least 1"):
        MaxPool2d(2, 0)
