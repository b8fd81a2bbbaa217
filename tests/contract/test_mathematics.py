"""Forward, backward, update and merge against the oracle: every activation, layout, dtype, kind and base."""

import numpy as np
import pytest

import nblora
from tests import oracle
from tests.helpers import (
    ADAPTERS,
    DTYPES,
    LAYOUTS,
    assert_close,
    make_adapter,
    make_layer,
    packed,
    packed_state,
    randomise,
    state_of,
)

pytestmark = pytest.mark.small
LR = 0.05


def make(kind, rng, layout, dtype, activation, frozen, bias=True):
    if kind in LAYOUTS:
        return make_layer(rng, (7, 5), kind, dtype, activation, bias)
    if kind is nblora.LoRALayer:
        return randomise(nblora.LoRALayer(7, 5, 3, 2.0, dtype=dtype, seed=rng), rng)
    base = make_layer(rng, (7, 5), layout, dtype, activation, bias)
    return make_adapter(rng, kind, base, frozen=frozen)


CASES = [
    pytest.param(kind, layout, frozen, id=f"{kind.__name__}-{layout.__name__}-{'frozen' if frozen else 'trained'}")
    for kind in ADAPTERS
    for layout in LAYOUTS
    for frozen in (True, False)
] + [pytest.param(kind, nblora.Dense, True, id=kind.__name__) for kind in (*LAYOUTS, nblora.LoRALayer)]

everything = pytest.mark.parametrize(("kind", "layout", "frozen"), CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_activation = pytest.mark.parametrize("activation", oracle.ACTIVATIONS)


@everything
@every_dtype
@every_activation
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward(rng, kind, layout, frozen, dtype, activation, bias):
    layer = make(kind, rng, layout, dtype, activation, frozen, bias)
    x = rng.normal(size=(2, 3, 7)).astype(dtype)
    for mode in (layer.train, layer.eval):
        y = mode().forward(x)
        assert y.dtype == dtype
        assert_close(y, oracle.forward(x, state_of(layer)))


@everything
@every_dtype
@every_activation
def test_backward(rng, kind, layout, frozen, dtype, activation):
    layer = make(kind, rng, layout, dtype, activation, frozen)
    x, grad = rng.normal(size=(6, 7)).astype(dtype), rng.normal(size=(6, 5)).astype(dtype)
    expected = oracle.gradients(x, grad, state_of(layer))
    layer.forward(x)
    assert_close(layer.backward(grad), expected["x"], dtype)
    start = 0
    held = layer.get_parameter_gradients()
    for name in ("weight", "bias", "lora_A", "lora_B", "delta"):
        if name in expected:
            piece = held[start : start + expected[name].size].reshape(expected[name].shape)
            assert_close(piece, expected[name], dtype)
            start += piece.size
    assert start == held.size == layer.parameter_count


@everything
@every_dtype
@every_activation
@pytest.mark.parametrize("fused", [False, True], ids=["two calls", "fused"])
def test_three_updates(rng, kind, layout, frozen, dtype, activation, fused):
    layer = make(kind, rng, layout, dtype, activation, frozen)
    state = state_of(layer)
    for _ in range(3):
        x, grad = rng.normal(size=(6, 7)).astype(dtype), rng.normal(size=(6, 5)).astype(dtype)
        expected = oracle.gradients(x, grad, state)
        state = oracle.update(state, expected, LR)
        layer.forward(x)
        if fused:
            grad_input = layer.backward_update(grad, LR)
        else:
            grad_input = layer.backward(grad)
            layer.update_parameters(LR)
        assert_close(grad_input, expected["x"], dtype)
    assert_close(layer.get_parameters(), packed_state(state), dtype)
    if "velocity" in layer.parameter_names():
        assert_close(layer.get_parameter("velocity"), state.velocity, dtype)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_dtype
@every_activation
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_merge(rng, kind, layout, dtype, activation, bias):
    adapter = make(kind, rng, layout, dtype, activation, True, bias)
    merged = adapter.merge_to_original_layer()
    assert type(merged) is layout
    assert (merged.activation, merged.dtype) == (activation, adapter.dtype)
    assert_close(merged.get_parameter("weight"), oracle.merge(state_of(adapter)).weight, dtype)
    assert (merged.bias is None) == (not bias)
    if bias:
        np.testing.assert_array_equal(merged.bias, adapter.base_layer.bias)
    x = rng.normal(size=(6, 7)).astype(dtype)
    assert_close(merged.forward(x), adapter.forward(x))


@pytest.mark.parametrize("kind", ADAPTERS)
@every_dtype
def test_identity_activation_adds_the_parts(rng, kind, dtype):
    adapter = make_adapter(rng, kind, make_layer(rng, dtype=dtype))
    x = rng.normal(size=(4, 7)).astype(dtype)
    parts = adapter.base_layer.forward(x).astype(np.float64) + adapter.lora_layer.forward(x)
    if kind is nblora.DeltaLoRAAdapter:
        parts = parts + adapter.delta_scaling * x @ adapter.get_current_delta()
    assert_close(adapter.forward(x), parts)


def test_relu_derivative_is_zero_at_zero():
    layer = nblora.Dense(np.eye(2), activation="relu")
    layer.forward([[0.0, 1.0]])
    np.testing.assert_array_equal(layer.backward([[1.0, 1.0]]), [[0.0, 1.0]])


def test_gelu_is_the_exact_one():
    layer = nblora.Dense(np.eye(1), activation="gelu")
    np.testing.assert_allclose(layer.forward([1.0]), [0.8413447460685429], rtol=1e-14)


@pytest.mark.parametrize(("name", "low", "high"), [("sigmoid", 0, 1), ("tanh", -1, 1), ("gelu", 0, 1e3)])
@every_dtype
def test_activations_saturate_without_warnings(name, low, high, dtype):
    layer = nblora.Dense(np.eye(1, dtype=dtype), activation=name)
    np.testing.assert_array_equal(layer.forward([[-1e3], [1e3]]), [[low], [high]])
    assert np.isfinite(layer.backward([[1.0], [1.0]])).all()


def test_gradients_are_sums_over_all_leading_axes(rng):
    adapter = make_adapter(rng, frozen=False)
    x, grad = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, 5))
    adapter.forward(x)
    adapter.backward(grad)
    together = adapter.get_parameter_gradients()
    apart = np.zeros_like(together)
    for sample, row in zip(x.reshape(6, 7), grad.reshape(6, 5), strict=True):
        adapter.forward(sample)
        adapter.backward(row)
        apart += adapter.get_parameter_gradients()
    assert_close(together, apart)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_come_from_the_values_before_the_update(rng, frozen):
    """dA uses the old B, dB the old A, and the input's gradient the old everything, in the fused sweep too."""
    adapter = make_adapter(rng, frozen=frozen)
    x, grad = rng.normal(size=(4, 7)), rng.normal(size=(4, 5))
    before = state_of(adapter)
    expected = oracle.gradients(x, grad, before)
    adapter.forward(x)
    grad_input = adapter.backward_update(grad, 10.0)  # so large a step that a new value in an old place is seen
    assert_close(grad_input, expected["x"])
    assert_close(adapter.get_parameters(), packed_state(oracle.update(before, expected, 10.0)))


def test_velocity_changes_once_per_update_and_never_in_backward(rng):
    adapter = make_adapter(rng)
    start = adapter.get_parameter("velocity")
    x, grad = rng.normal(size=(4, 7)), rng.normal(size=(4, 5))
    adapter.forward(x)
    adapter.backward(grad)
    adapter.backward(grad, accumulate=True)
    np.testing.assert_array_equal(adapter.get_parameter("velocity"), start)
    gradient = adapter.get_parameter_gradients()[-35:].reshape(7, 5)
    adapter.update_parameters(0.1)
    once = 0.9 * start + 0.1 * gradient
    assert_close(adapter.get_parameter("velocity"), once)
    adapter.update_parameters(0.1)
    assert_close(adapter.get_parameter("velocity"), 0.9 * once + 0.1 * gradient)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_packing_order(rng, kind):
    """[base weight, base bias][A][B][delta], each row-major in logical shape."""
    for layout in LAYOUTS:
        adapter = make_adapter(rng, kind, make_layer(rng, layout=layout), frozen=False)
        by_name = {
            name.removeprefix("base."): adapter.get_parameter(name)
            for name in adapter.parameter_names()
            if name != "velocity"
        }
        np.testing.assert_array_equal(adapter.get_parameters(), packed(by_name))
