"""Arrays in, arrays out: what is copied, what is cast, what is kept, and what passes through."""

import ml_dtypes
import numpy as np
import pytest

import nblora
from tests import oracle
from tests.helpers import DTYPES, LAYOUTS, assert_close, make_adapter, make_layer, state_of

pytestmark = pytest.mark.small
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# --- constructors ------------------------------------------------------------------------------------------------


@every_layout
@every_dtype
def test_constructors_copy_nothing_that_fits(rng, layout, dtype):
    weight, bias = rng.normal(size=(5, 5)).astype(dtype), rng.normal(size=5).astype(dtype)
    layer = layout(weight, bias)
    assert layer.weight is weight
    assert layer.bias is bias
    assert layout(weight).bias is None


def test_from_factors_copies_nothing_that_fits(rng):
    A, B = rng.normal(size=(7, 3)), rng.normal(size=(3, 5))
    layer = nblora.LoRALayer.from_factors(A, B)
    assert layer.A is A
    assert layer.B is B
    adapter = nblora.LoRAAdapter.from_factors(make_layer(rng), A, B, alpha=6.0)
    assert adapter.lora_layer.A is A
    assert adapter.scaling == 2.0


def test_constructors_say_that_they_do_not_copy():
    assert "without a copy" in nblora.Dense.__doc__
    assert "without a copy" in nblora.LoRALayer.from_factors.__doc__


@every_layout
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([[1, 2], [3, 4]], "float32"),
        ([[1.5, 2.5], [3.5, 4.5]], "float32"),
        (np.arange(4).reshape(2, 2), "float32"),
        (np.ones((2, 2), np.float16), "float32"),
        (np.ones((2, 2), bool), "float32"),
        (np.ones((2, 2), ml_dtypes.bfloat16), "float32"),
        (np.ones((2, 2), ">f8"), "float64"),
        (np.ones((2, 2), ">f4"), "float32"),
    ],
)
def test_weights_of_other_kinds(layout, value, dtype):
    layer = layout(value, [1, 2])
    assert layer.dtype == layer.weight.dtype == layer.bias.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(layer.weight, np.asarray(value).astype(dtype))


@every_layout
def test_weights_that_are_not_contiguous(rng, layout):
    for weight in (rng.normal(size=(6, 8))[::2, ::-2], np.asfortranarray(rng.normal(size=(3, 4)))):
        layer = layout(weight)
        assert layer.weight.flags.c_contiguous
        np.testing.assert_array_equal(layer.weight, weight)


def test_a_bias_takes_the_dtype_of_the_weight(rng):
    assert nblora.Dense(rng.normal(size=(2, 2)).astype(np.float32), rng.normal(size=2)).bias.dtype == np.float32


# --- samples -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=DTYPES)
def adapter(request, rng):
    return make_adapter(rng, base=make_layer(rng, dtype=request.param, activation="gelu"))


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "uint16", "int64", "bool", ">f8", "longdouble"]
)
def test_real_inputs_are_cast(adapter, rng, dtype):
    x = rng.integers(0, 2 if dtype == "bool" else 9, size=(4, 7)).astype(dtype)
    y = adapter.forward(x)
    assert y.dtype == adapter.dtype
    np.testing.assert_array_equal(y, adapter.forward(x.astype(adapter.dtype)))
    grad = rng.integers(0, 2, size=(4, 5)).astype(dtype)
    assert_close(adapter.backward(grad), adapter.backward(grad.astype(adapter.dtype)))


def test_bfloat16_is_cast(adapter, rng):
    x = rng.normal(size=(4, 7)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(adapter.forward(x), adapter.forward(x.astype(adapter.dtype)))


def test_lists_and_tuples(adapter):
    expected = adapter.forward(np.ones((2, 7)))
    np.testing.assert_array_equal(adapter.forward([[1.0] * 7, [1] * 7]), expected)
    np.testing.assert_array_equal(adapter.forward(((True,) * 7, (1.0,) * 7)), expected)
    assert adapter.backward([[1] * 5, [0] * 5]).shape == (2, 7)


def test_the_input_is_never_written_to(adapter, rng):
    x, grad = (rng.normal(size=(4, n)).astype(adapter.dtype) for n in (7, 5))
    given = x.copy(), grad.copy()
    x.flags.writeable = grad.flags.writeable = False
    for _ in range(2):
        adapter.forward(x)
        adapter.backward(grad)
        adapter.update_parameters(0.1)
        adapter.forward(x)
        adapter.backward_update(grad, 0.1)
    np.testing.assert_array_equal(x, given[0])
    np.testing.assert_array_equal(grad, given[1])


@every_layout
def test_forward_returns_a_new_array(rng, layout):
    layer = layout(np.eye(5))
    for x in (rng.normal(size=(4, 5)), rng.normal(size=5)):
        y = layer.forward(x)
        assert not np.shares_memory(x, y)
        assert not np.shares_memory(y, layer.forward(x))
        grad_input = layer.backward(y)
        assert not np.shares_memory(grad_input, y)


def test_x_is_kept_by_reference(rng):
    layer, x = make_layer(rng), rng.normal(size=(4, 7))
    layer.forward(x)
    assert np.shares_memory(layer._run.recall(layer).saved.x, x)


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
def test_leading_axes(adapter, rng, leading):
    x = rng.normal(size=(*leading, 7)).astype(adapter.dtype)
    grad = rng.normal(size=(*leading, 5)).astype(adapter.dtype)
    y = adapter.forward(x)
    assert y.shape == (*leading, 5)
    state = state_of(adapter)
    assert_close(y, oracle.forward(x, state))
    grad_input = adapter.backward(grad)
    assert grad_input.shape == x.shape
    assert_close(grad_input, oracle.gradients(x, grad, state)["x"])


@pytest.mark.parametrize("frozen", [True, False])
@every_layout
def test_no_samples_give_gradients_of_zero(rng, layout, frozen):
    adapter = make_adapter(rng, base=make_layer(rng, layout=layout, activation="sigmoid"), frozen=frozen)
    adapter.forward(np.zeros((0, 7)))
    assert adapter.backward(np.zeros((0, 5))).shape == (0, 7)
    np.testing.assert_array_equal(adapter.get_parameter_gradients(), np.zeros(adapter.parameter_count))
    before, velocity = adapter.get_parameter("base.weight"), adapter.get_parameter("velocity")
    adapter.backward_update(np.zeros((0, 5)), 0.1)
    np.testing.assert_array_equal(adapter.get_parameter("base.weight"), before)
    assert_close(adapter.get_parameter("velocity"), 0.9 * velocity)


STRIDES = {
    "every second row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "Fortran order": np.asfortranarray,
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "misaligned": lambda x: misaligned(x),
}


def misaligned(x):
    """A copy that begins one byte into its buffer."""
    buffer = np.empty(x.nbytes + 1, np.uint8)
    view = buffer[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


@pytest.mark.parametrize("stride", STRIDES)
def test_strides(adapter, rng, stride):
    x = STRIDES[stride](rng.normal(size=(6, 7)).astype(adapter.dtype))
    grad = STRIDES[stride](rng.normal(size=(6, 5)).astype(adapter.dtype))
    expected = adapter.forward(np.ascontiguousarray(x))
    expected_gradient = adapter.backward(np.ascontiguousarray(grad))
    np.testing.assert_array_equal(adapter.forward(x), expected)
    np.testing.assert_array_equal(adapter.backward(grad), expected_gradient)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@every_dtype
def test_nan_and_infinity_pass_through(rng, bad, activation, dtype):
    adapter = make_adapter(rng, base=make_layer(rng, dtype=dtype, activation=activation))
    x = rng.normal(size=(3, 7)).astype(dtype)
    clean = adapter.forward(x)
    x[1, 2] = bad
    with np.errstate(invalid="ignore"):
        y = adapter.forward(x)
    np.testing.assert_allclose(y[[0, 2]], clean[[0, 2]], rtol=1e-5)
    if np.isnan(bad):
        assert np.isnan(y[1]).all()
    elif activation in ("identity", "relu"):
        assert not np.isfinite(y[1]).all() or activation == "relu"
    else:
        assert y.shape == clean.shape


def test_nan_in_a_gradient_passes_through(rng):
    adapter = make_adapter(rng)
    adapter.forward(rng.normal(size=(3, 7)))
    grad = rng.normal(size=(3, 5))
    grad[1, 1] = np.nan
    grad_input = adapter.backward(grad)
    assert np.isnan(grad_input[1]).all()
    assert np.isfinite(grad_input[[0, 2]]).all()
    assert np.isnan(adapter.get_parameter_gradients()).any()
    adapter.update_parameters(0.1)
    assert adapter.diagnostics()["non_finite_count"] > 0
