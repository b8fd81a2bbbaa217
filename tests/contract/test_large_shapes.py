"""Shapes up to 1024 against NumPy's float64 formulas."""

import pytest

from tests import oracle
from tests.helpers import ADAPTERS, DTYPES, LAYOUTS, assert_close, make_adapter, make_layer, packed_state, state_of

SHAPES = [
    (64, 130, 70, 8),
    (33, 257, 129, 5),
    (3, 512, 384, 16),
    pytest.param(128, 1024, 1024, 16, marks=pytest.mark.slow),
    pytest.param(1, 1024, 1000, 1, marks=pytest.mark.slow),
    pytest.param(1024, 300, 1024, 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("batch", "in_features", "out_features", "rank"), SHAPES)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True], ids=["two calls", "fused"])
def test_a_step_and_a_merge(rng, batch, in_features, out_features, rank, kind, layout, dtype, fused):
    frozen = fused == (kind is ADAPTERS[0])
    activation = oracle.ACTIVATIONS[(rank + fused) % 5]
    base = make_layer(rng, (in_features, out_features), layout, dtype, activation)
    adapter = make_adapter(rng, kind, base, rank=rank, frozen=frozen)
    adapter.set_parameter("lora_B", adapter.get_parameter("lora_B") / 8)  # or gelu and tanh are all saturated
    x = (rng.normal(size=(batch, in_features)) / 4).astype(dtype)
    grad = rng.normal(size=(batch, out_features)).astype(dtype)
    state = state_of(adapter)
    expected = oracle.gradients(x, grad, state, oracle.fast_matmul)
    assert_close(adapter.forward(x), oracle.forward(x, state, oracle.fast_matmul))
    if fused:
        grad_input = adapter.backward_update(grad, 1e-3)
    else:
        grad_input = adapter.backward(grad)
        held = adapter.get_parameter_gradients()
        start = 0
        for name in ("weight", "bias", "lora_A", "lora_B", "delta"):
            if name in expected:
                stop = start + expected[name].size
                assert_close(held[start:stop], expected[name].ravel(), dtype)
                start = stop
        adapter.update_parameters(1e-3)
    assert_close(grad_input, expected["x"])
    state = oracle.update(state, expected, 1e-3)
    assert_close(adapter.get_parameters(), packed_state(state))
    merged = adapter.merge_to_original_layer()
    assert_close(merged.get_parameter("weight"), oracle.merge(state, oracle.fast_matmul).weight, dtype)
    assert_close(merged.forward(x), adapter.forward(x))
