"""What every layer, adapter and model does, whatever it computes: modes, updates, copies, closing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import nblora
from tests.helpers import (
    ADAPTERS,
    assert_close,
    assert_disjoint,
    assert_unchanged,
    make_adapter,
    make_layer,
    randomise,
    snapshot,
)

pytestmark = pytest.mark.small


def low_rank(rng):
    return randomise(nblora.LoRALayer(7, 5, 3, 2.0, dtype="float64", seed=rng), rng)


def model(rng):
    first = make_adapter(rng, base=make_layer(rng, (7, 6), activation="relu"), frozen=False)
    return nblora.Sequential(first, make_layer(rng, (6, 5), nblora.FullyConnected))


def on_model(rng):
    base = nblora.Sequential(make_layer(rng, (7, 6), activation="tanh"), make_layer(rng, (6, 5)))
    return make_adapter(rng, base=base, frozen=False)


KINDS = {
    "Dense": lambda rng: make_layer(rng, activation="gelu"),
    "FullyConnected": lambda rng: make_layer(rng, layout=nblora.FullyConnected, activation="sigmoid"),
    "LoRALayer": low_rank,
    "LoRAAdapter": lambda rng: make_adapter(rng, nblora.LoRAAdapter, frozen=False),
    "DeltaLoRAAdapter": lambda rng: make_adapter(rng, base=make_layer(rng, layout=nblora.FullyConnected)),
    "Sequential": model,
    "on a model": on_model,
}


@pytest.fixture(params=KINDS, ids=str)
def layer(request, rng):
    return KINDS[request.param](rng)


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 7))


@pytest.fixture
def grad(rng):
    return rng.normal(size=(4, 5))


def step(layer, x, grad):
    layer.forward(x)
    layer.backward(grad)


# --- sizes and names ---------------------------------------------------------------------------------------------


def test_sizes_dtype_and_device(layer):
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert layer.dtype == np.float64
    assert layer.device == "cpu"


def test_call_is_forward(layer, x):
    np.testing.assert_array_equal(layer(x), layer.forward(x))


def test_parameter_count_counts_the_packed_elements(layer):
    assert layer.parameter_count == layer.get_parameters().size > 0


# --- modes -------------------------------------------------------------------------------------------------------


def test_new_objects_are_in_training_mode(layer):
    assert layer.training
    assert layer.eval() is layer
    assert not layer.training
    assert layer.train() is layer
    assert layer.training


def test_backward_after_eval_is_a_runtime_error(layer, x, grad):
    layer.forward(x)
    layer.eval()
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(grad)
    layer.forward(x)
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        layer.backward(grad)
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        layer.backward_update(grad, 0.1)
    layer.train().forward(x)
    assert layer.backward(grad).shape == x.shape


def test_eval_keeps_nothing(layer, x):
    layer.eval().forward(x)
    kept = [value for part in [layer, *parts_of(layer)] for value in vars(part).values() if value is x]
    assert kept == []
    assert all(part._run is None for part in [layer, *parts_of(layer)])


def parts_of(layer):
    """The layers that a layer holds, at any depth."""
    if isinstance(layer, nblora.Sequential):
        children = list(layer)
    else:
        children = [getattr(layer, name) for name in ("base_layer", "lora_layer") if hasattr(layer, name)]
    for child in children:
        yield child
        yield from parts_of(child)


def test_threads_may_share_an_evaluating_layer(layer, rng):
    layer.eval()
    inputs = [rng.normal(size=(n + 1, 7)) for n in range(24)]
    expected = [layer.forward(x) for x in inputs]
    barrier = threading.Barrier(4)

    def work(start):
        barrier.wait()
        return [(place, layer.forward(inputs[place])) for _ in range(5) for place in range(start, 24, 4)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            for place, y in found:
                assert_close(y, expected[place])


# --- calls out of order ------------------------------------------------------------------------------------------


def test_backward_before_forward(layer, grad):
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(grad)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward_update(grad, 0.1)


def test_no_gradients_when_new(layer):
    with pytest.raises(RuntimeError, match="gradients"):
        layer.update_parameters(0.1)
    with pytest.raises(RuntimeError, match="gradients"):
        layer.get_parameter_gradients()


@pytest.mark.parametrize("how", ["reset_state", "backward_update"])
def test_gradients_are_discarded(layer, x, grad, how):
    step(layer, x, grad)
    assert layer.get_parameter_gradients().size
    if how == "reset_state":
        layer.reset_state()
    else:
        layer.backward_update(grad, 0.1)
    with pytest.raises(RuntimeError, match="gradients"):
        layer.update_parameters(0.1)
    with pytest.raises(RuntimeError, match="gradients"):
        layer.get_parameter_gradients()


def test_reset_state_forgets_the_input_and_keeps_what_was_learned(layer, x, grad):
    learned = {name: value for name, value in snapshot(layer).items() if not name.endswith("velocity")}
    layer.forward(x)
    layer.reset_state()
    for name, value in learned.items():
        np.testing.assert_array_equal(layer.get_parameter(name), value)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(grad)


# --- gradients and updates ---------------------------------------------------------------------------------------


def test_update_keeps_its_gradients(layer, x, grad):
    step(layer, x, grad)
    gradients = layer.get_parameter_gradients()
    layer.update_parameters(0.1)
    np.testing.assert_array_equal(layer.get_parameter_gradients(), gradients)
    once = layer.get_parameters()
    layer.update_parameters(0.1)
    assert not np.array_equal(layer.get_parameters(), once)


def test_zero_gradients(layer, x, grad):
    layer.zero_gradients()
    np.testing.assert_array_equal(layer.get_parameter_gradients(), np.zeros(layer.parameter_count))
    step(layer, x, grad)
    assert np.any(layer.get_parameter_gradients())
    layer.zero_gradients()
    np.testing.assert_array_equal(layer.get_parameter_gradients(), np.zeros(layer.parameter_count))
    layer.update_parameters(0.1)  # gradients of zero are gradients


def test_accumulate_adds(layer, x, grad):
    step(layer, x, grad)
    first = layer.get_parameter_gradients()
    layer.forward(2 * x)
    layer.backward(grad, accumulate=True)
    both = layer.get_parameter_gradients()
    layer.forward(2 * x)
    layer.backward(grad)
    assert_close(both, first + layer.get_parameter_gradients())


def test_accumulate_starts_from_nothing_and_from_zero(layer, x, grad):
    step(layer, x, grad)
    expected = layer.get_parameter_gradients()
    layer.reset_state()
    layer.forward(x)
    layer.backward(grad, accumulate=True)
    np.testing.assert_array_equal(layer.get_parameter_gradients(), expected)
    layer.zero_gradients()
    layer.forward(x)
    layer.backward(grad, accumulate=True)
    assert_close(layer.get_parameter_gradients(), expected)


def test_accumulate_is_a_flag(layer, x, grad):
    layer.forward(x)
    with pytest.raises(TypeError, match="accumulate"):
        layer.backward(grad, accumulate="yes")


def test_update_with_rate_zero_moves_only_the_velocity(layer, x, grad):
    before = layer.get_parameters()
    step(layer, x, grad)
    layer.update_parameters(0)
    np.testing.assert_array_equal(layer.get_parameters(), before)


def test_backward_update_equals_the_two_calls(layer, x, grad):
    twin = layer.clone()
    for _ in range(3):
        layer.forward(x)
        expected = layer.backward(grad)
        layer.update_parameters(0.05)
        twin.forward(x)
        assert_close(twin.backward_update(grad, 0.05), expected)
    for name in layer.parameter_names():
        assert_close(twin.get_parameter(name), layer.get_parameter(name))


def test_backward_again_from_the_same_forward(layer, x, grad):
    layer.forward(x)
    first = layer.backward(grad)
    gradients = layer.get_parameter_gradients()
    assert_close(layer.backward(2 * grad), 2 * first)
    assert_close(layer.get_parameter_gradients(), 2 * gradients)


def test_the_output_belongs_to_the_caller(layer, x, grad):
    """Whatever is done to an output or a gradient changes nothing that the layer keeps."""
    step(layer, x, grad)
    expected, gradients = layer.backward(grad), layer.get_parameter_gradients()
    y = layer.forward(x)
    y[...] = np.nan
    grad_input = layer.backward(grad)
    np.testing.assert_array_equal(grad_input, expected)
    grad_input[...] = np.nan
    np.testing.assert_array_equal(layer.get_parameter_gradients(), gradients)


# --- copies ------------------------------------------------------------------------------------------------------


def test_getters_return_copies(layer, x, grad):
    step(layer, x, grad)
    before, gradients = snapshot(layer), layer.get_parameter_gradients()
    layer.get_parameters()[...] = np.nan
    layer.get_parameter_gradients()[...] = np.nan
    for name in layer.parameter_names():
        layer.get_parameter(name)[...] = np.nan
    assert_unchanged(layer, before)
    np.testing.assert_array_equal(layer.get_parameter_gradients(), gradients)


def test_set_parameters_is_the_inverse_of_get_parameters(layer, rng):
    vector = rng.normal(size=layer.parameter_count)
    given = vector.copy()
    layer.set_parameters(vector)
    np.testing.assert_array_equal(layer.get_parameters(), given)
    vector[...] = 0
    np.testing.assert_array_equal(layer.get_parameters(), given)


@pytest.mark.parametrize("wrong", [lambda v: v[:-1], lambda v: np.append(v, 1.0), lambda v: v[None]])
def test_set_parameters_of_another_shape(layer, wrong):
    before = snapshot(layer)
    with pytest.raises(ValueError, match="parameters must have shape"):
        layer.set_parameters(wrong(layer.get_parameters() + 1))
    assert_unchanged(layer, before)


def test_clone_computes_the_same_and_shares_no_memory(layer, x, grad):
    layer.forward(x)
    twin = layer.clone()
    assert type(twin) is type(layer)
    assert_disjoint(layer, twin)
    np.testing.assert_array_equal(twin.forward(x), layer.forward(x))
    before = snapshot(layer)
    step(twin, x, grad)
    twin.update_parameters(1.0)
    assert_unchanged(layer, before)
    assert layer.eval().clone().training is False


def test_save_and_load_is_the_identity(layer, x, grad, tmp_path):
    path = tmp_path / "layer.safetensors"
    step(layer, x, grad)
    layer.update_parameters(0.1)
    layer.save(path)
    for load in (nblora.load, type(layer).load):
        twin = load(path)
        assert type(twin) is type(layer)
        assert_unchanged(twin, snapshot(layer))
        assert repr(twin) == repr(layer)
        assert twin.training == layer.training
        for one in (layer, twin):
            step(one, x, grad)
            one.update_parameters(0.1)
        assert_unchanged(twin, snapshot(layer))
        layer.save(path)


# --- compiling, moving, describing -------------------------------------------------------------------------------


def test_compile_changes_nothing(layer):
    before = snapshot(layer)
    layer.compile()
    assert_unchanged(layer, before)
    assert layer.supports_jit is True
    with pytest.raises(RuntimeError, match="gradients"):
        layer.get_parameter_gradients()


def test_to_works_in_place_and_returns_self(layer):
    assert layer.to("cpu") is layer
    assert layer.to("cpu", precision="float32") is layer
    assert layer.device == "cpu"


def test_repr_names_the_class(layer):
    assert repr(layer).startswith(type(layer).__name__)


def test_diagnostics_is_flat(layer, x, grad):
    step(layer, x, grad)
    figures = layer.diagnostics()
    assert figures["type"] == type(layer).__name__
    assert figures["parameter_count"] == layer.parameter_count
    assert figures["non_finite_count"] == 0
    assert type(figures["non_finite_count"]) is int
    assert all(isinstance(value, str | int | float | bool) for value in figures.values())


def test_diagnostics_never_raises_on_nan(layer):
    name = layer.parameter_names()[0]
    value = layer.get_parameter(name)
    value.flat[0], value.flat[1] = np.nan, np.inf
    layer.set_parameter(name, value)
    assert layer.diagnostics()["non_finite_count"] == 2


# --- closing -----------------------------------------------------------------------------------------------------

CALLS = {
    "forward": lambda a: a.forward(np.zeros(7)),
    "call": lambda a: a(np.zeros(7)),
    "backward": lambda a: a.backward(np.zeros(5)),
    "backward_update": lambda a: a.backward_update(np.zeros(5), 0.1),
    "update_parameters": lambda a: a.update_parameters(0.1),
    "get_parameters": lambda a: a.get_parameters(),
    "set_parameters": lambda a: a.set_parameters([1.0]),
    "get_parameter_gradients": lambda a: a.get_parameter_gradients(),
    "zero_gradients": lambda a: a.zero_gradients(),
    "reset_state": lambda a: a.reset_state(),
    "train": lambda a: a.train(),
    "eval": lambda a: a.eval(),
    "clone": lambda a: a.clone(),
    "to": lambda a: a.to("cpu"),
    "compile": lambda a: a.compile(),
    "diagnostics": lambda a: a.diagnostics(),
    "parameter_names": lambda a: a.parameter_names(),
    "get_parameter": lambda a: a.get_parameter("weight"),
    "set_parameter": lambda a: a.set_parameter("weight", 1.0),
    "parameter_shape": lambda a: a.parameter_shape("weight"),
    "validate_weights": lambda a: a.validate_weights({}),
    "load_weights": lambda a: a.load_weights({}),
    "enter": lambda a: a.__enter__(),
    "dtype": lambda a: a.dtype,
    "device": lambda a: a.device,
    "training": lambda a: a.training,
    "supports_jit": lambda a: a.supports_jit,
    "parameter_count": lambda a: a.parameter_count,
    "named_parameter_count": lambda a: a.named_parameter_count,
    "in_features": lambda a: a.in_features,
}


@pytest.mark.parametrize("call", CALLS)
def test_everything_raises_after_close(layer, call):
    layer.close()
    with pytest.raises(RuntimeError, match="closed"):
        CALLS[call](layer)


def test_save_and_to_onnx_raise_after_close(layer, tmp_path):
    layer.close()
    with pytest.raises(RuntimeError, match="closed"):
        layer.save(tmp_path / "a")
    with pytest.raises(RuntimeError, match="closed"):
        layer.to_onnx(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


ADAPTER_CALLS = {
    "merge": lambda a: a.merge_to_original_layer(),
    "delta": lambda a: a.get_current_delta(),
    "disable": lambda a: a.disable_adapter().__enter__(),
    "rank": lambda a: a.rank,
    "alpha": lambda a: a.alpha,
    "scaling": lambda a: a.scaling,
    "base_layer": lambda a: a.base_layer,
}


@pytest.mark.parametrize("call", ADAPTER_CALLS)
def test_adapter_methods_raise_after_close(rng, call):
    adapter = make_adapter(rng)
    adapter.close()
    with pytest.raises(RuntimeError, match="closed"):
        ADAPTER_CALLS[call](adapter)


def test_closing_twice_is_harmless(layer):
    layer.close()
    layer.close()
    assert "closed" in repr(layer)


def test_context_manager_closes(layer, x):
    with layer as entered:
        assert entered is layer
        layer.forward(x)
    with pytest.raises(RuntimeError, match="closed"):
        layer.forward(x)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_base_stays_usable(rng, kind):
    base = make_layer(rng)
    x = rng.normal(size=(4, 7))
    expected = base.forward(x)
    make_adapter(rng, kind, base).close()
    np.testing.assert_array_equal(base.forward(x), expected)


def test_a_misspelt_attribute_is_an_attribute_error(layer):
    with pytest.raises(AttributeError, match="foward"):
        _ = layer.foward
