"""`LayerNorm` and `RMSNorm`: against loops, differences, and as layers."""

import numpy as np
import pytest

import nblora
from tests import oracle
from tests.helpers import DTYPES, assert_close, assert_unchanged, snapshot

from .support import BACKENDS

pytestmark = pytest.mark.small
KINDS = (nblora.LayerNorm, nblora.RMSNorm)


def make(rng, kind, features=7, dtype="float64", bias=True):
    weight, shift = rng.normal(size=(2, features)).astype(dtype)
    return kind(weight, shift if bias else None, eps=1e-3) if kind is nblora.LayerNorm else kind(weight, eps=1e-3)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 33), (70, 17), (3, 31)])
def test_kernels_against_loops(rng, backend, dtype, centred, shape):
    x, grad = (3 + 2 * rng.normal(size=(2, *shape))).astype(dtype)
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    operations = BACKENDS[backend]
    y, stats = operations.norm(x, weight, bias if centred else None, 1e-5, centred)
    assert_close(y, oracle.norm(x, weight.astype(np.float64), bias if centred else None, 1e-5, centred))
    if shape[1] == 1:
        return  # nothing but rounding comes back
    found = operations.norm_gradient(grad, x, stats, weight, centred, (True, True))
    for gradient, exact in zip(found, oracle.norm_gradients(x, weight, grad, 1e-5, centred), strict=True):
        assert gradient.dtype == x.dtype
        assert_close(gradient, exact)
    assert operations.norm_gradient(grad, x, stats, weight, centred, (False, True))[0] is None
    assert operations.norm_gradient(grad, x, stats, weight, centred, (True, False))[1:] == (None, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer(rng, kind, dtype):
    layer, x = make(rng, kind, dtype=dtype), rng.normal(size=(2, 5, 7)).astype(dtype)
    grad = rng.normal(size=x.shape).astype(dtype)
    weight, centred = layer.weight.astype(np.float64), kind is nblora.LayerNorm
    bias = layer.bias if centred else None
    y = layer(x)
    assert_close(y.reshape(10, 7), oracle.norm(x.reshape(10, 7), weight, bias, 1e-3, centred))
    exact = oracle.norm_gradients(x.reshape(10, 7), weight, grad.reshape(10, 7), 1e-3, centred)
    assert_close(layer.backward(grad).reshape(10, 7), exact[0])
    assert_close(layer.get_parameter_gradients(), np.concatenate(exact[1:] if centred else exact[1:2]))
    layer(x)
    layer.backward_update(grad, 0.5)
    assert_close(layer.get_parameter("weight"), weight - 0.5 * exact[1], dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_central_differences(rng, kind):
    layer, x, grad = make(rng, kind), rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    layer(x)
    gx = layer.backward(grad)
    vector, gradients = layer.get_parameters(), layer.get_parameter_gradients()
    for place in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[place] = 1e-6
        assert abs(((layer(x + step) - layer(x - step)) * grad).sum() / 2e-6 - gx[place]) <= 1e-6
    for place in range(len(vector)):
        values = []
        for step in (1e-6, -1e-6):
            moved = vector.copy()
            moved[place] += step
            layer.set_parameters(moved)
            values.append((layer(x) * grad).sum())
        assert abs((values[0] - values[1]) / 2e-6 - gradients[place]) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_as_part_of_a_model(rng, kind, tmp_path):
    model = nblora.Sequential(nblora.Dense.random(5, 7, dtype="float64", seed=0), make(rng, kind))
    x = rng.normal(size=(4, 5))
    y = model(x)
    before = snapshot(model)
    model.compile()
    assert_unchanged(model, before)
    model.save(tmp_path / "model")
    np.testing.assert_array_equal(nblora.load(tmp_path / "model")(x), y)
    np.testing.assert_array_equal(model.clone()(x), y)
    model["1"].trainable = False
    model(x)
    model.backward(np.ones((4, 7)))
    assert model.parameter_count == 5 * 7 + 7
    assert model["1"].diagnostics()["eps"] == 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_onnx(rng, kind, dtype, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = make(rng, kind, dtype=dtype), rng.normal(size=(6, 7)).astype(dtype)
    layer.to_onnx(tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "norm.onnx"), providers=["CPUExecutionProvider"])
    assert_close(session.run(None, {"x": x})[0], layer(x))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"weight must have shape \(any,\)"):
        nblora.LayerNorm([[1.0]])
    with pytest.raises(ValueError, match=r"bias must have shape \(2,\)"):
        nblora.LayerNorm([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="eps must be finite and not negative"):
        nblora.RMSNorm([1.0], eps=-1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 2\)"):
        nblora.RMSNorm([1.0, 2.0])([[1.0]])
    assert nblora.LayerNorm.random(3, bias=False).bias is None
