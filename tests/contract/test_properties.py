"""Hypothesis: any shape, stride, layout, dtype, leading axes, rank, batch and thread count agrees with the oracle."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nblora
from tests import oracle
from tests.helpers import ADAPTERS, DTYPES, LAYOUTS, assert_close, make_adapter, make_layer, packed_state, state_of

pytestmark = pytest.mark.small
SIZES = st.integers(1, 33)


@st.composite
def leading_axes(draw):
    """Leading axes of 0 to 12 samples, often none or one."""
    return draw(st.sampled_from([(), (0,), (1,), (2,), (7,), (12,), (2, 3), (1, 4, 2), (3, 0)]))


@st.composite
def strided(draw, values):
    """The same values with other strides."""
    how = draw(st.sampled_from(["plain", "rows", "columns", "fortran", "reversed"]))
    if how == "columns":
        return np.repeat(values, 2, axis=-1)[..., ::2]
    if how == "fortran":
        return np.asfortranarray(values)
    if how == "reversed":
        return values[..., ::-1].copy()[..., ::-1]
    if how == "rows" and values.ndim > 1:
        return np.repeat(values, 3, axis=0)[::3]
    return values


@st.composite
def cases(draw):
    """An adapter and a batch for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from(DTYPES))
    base = make_layer(
        rng,
        sizes,
        draw(st.sampled_from(LAYOUTS)),
        dtype,
        draw(st.sampled_from(oracle.ACTIVATIONS)),
        draw(st.booleans()),
    )
    adapter = make_adapter(
        rng,
        draw(st.sampled_from(ADAPTERS)),
        base,
        rank=draw(st.integers(1, min(sizes))),
        alpha=draw(st.sampled_from([-1.0, 0.5, 8.0])),
        frozen=draw(st.booleans()),
        use_rslora=draw(st.booleans()),
    )
    leading = draw(leading_axes())
    x = draw(strided(rng.normal(size=(*leading, sizes[0])).astype(dtype)))
    grad = draw(strided(rng.normal(size=(*leading, sizes[1])).astype(dtype)))
    return adapter, x, grad


@pytest.fixture
def threads():
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@given(case=cases(), count=st.sampled_from([1, min(2, numba.config.NUMBA_NUM_THREADS)]), fused=st.booleans())
def test_one_step_agrees_with_the_oracle(threads, case, count, fused):
    adapter, x, grad = case
    threads(count)
    state = state_of(adapter)
    expected = oracle.gradients(x, grad, state)
    assert_close(adapter.forward(x), oracle.forward(x, state))
    if fused:
        grad_input = adapter.backward_update(grad, 0.05)
    else:
        grad_input = adapter.backward(grad)
        adapter.update_parameters(0.05)
    assert_close(grad_input, expected["x"])
    state = oracle.update(state, expected, 0.05)
    assert_close(adapter.get_parameters(), packed_state(state))
    merged = adapter.merge_to_original_layer()
    assert_close(merged.get_parameter("weight"), oracle.merge(state).weight, adapter.dtype)
    assert_close(merged.forward(x), oracle.forward(x, state))


@given(case=cases())
def test_runs_repeat_bit_for_bit(case):
    adapter, x, grad = case
    results = []
    for _ in range(2):
        twin = adapter.clone()
        twin.forward(x)
        twin.backward_update(grad, 0.05)
        results.append(np.append(twin.get_parameters(), twin.forward(x)))
    np.testing.assert_array_equal(results[0], results[1])


@given(case=cases())
def test_set_parameters_and_gradients_pack_alike(case):
    """The gradient vector belongs to the parameter vector: one step of plain descent through both."""
    adapter, x, grad = case
    if isinstance(adapter, nblora.DeltaLoRAAdapter):
        adapter.momentum_factor = 0.0  # then V is the gradient itself
    twin = adapter.clone()
    adapter.forward(x)
    adapter.backward(grad)
    vector = adapter.get_parameters() - 0.05 * adapter.get_parameter_gradients()
    adapter.update_parameters(0.05)
    twin.set_parameters(vector)
    assert_close(twin.get_parameters(), adapter.get_parameters())
