"""Parameters by name: shapes, copies, validate_weights and load_weights, all or nothing."""

import dataclasses

import numpy as np
import pytest

import nblora
from tests.helpers import LAYOUTS, assert_unchanged, make_adapter, make_layer, snapshot

pytestmark = pytest.mark.small

SHAPES = {"base.weight": (7, 5), "base.bias": (5,), "lora_A": (7, 3), "lora_B": (3, 5)}
DENSE = {"delta": (7, 5), "velocity": (7, 5)}


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def layout(request):
    return request.param


@pytest.fixture
def adapter(rng, layout):
    return make_adapter(rng, base=make_layer(rng, layout=layout))


@pytest.fixture
def weights(rng):
    return {name: rng.normal(size=shape) for name, shape in (SHAPES | DENSE).items()}


def test_names_and_shapes(rng, layout):
    base = make_layer(rng, layout=layout)
    lora, delta = make_adapter(rng, nblora.LoRAAdapter, base), make_adapter(rng, base=base)
    for adapter, shapes in ((lora, SHAPES), (delta, SHAPES | DENSE)):
        assert adapter.parameter_names() == list(shapes)
        assert adapter.named_parameter_count == len(shapes)
        assert {name: adapter.parameter_shape(name) for name in shapes} == shapes
        assert {name: adapter.get_parameter(name).shape for name in shapes} == shapes


def test_names_of_a_layer(rng, layout):
    layer = make_layer(rng, layout=layout)
    assert layer.parameter_names() == ["weight", "bias"]
    assert layer.parameter_shape("weight") == (7, 5)
    assert make_layer(rng, bias=False).parameter_names() == ["weight"]
    assert nblora.LoRALayer(7, 5, 3).parameter_names() == ["lora_A", "lora_B"]


def test_bias_is_absent_where_the_base_has_none(rng):
    assert "base.bias" not in make_adapter(rng, base=make_layer(rng, bias=False)).parameter_names()


def test_logical_shape_of_a_transposed_weight(rng):
    stored = rng.normal(size=(5, 7))
    layer = nblora.FullyConnected(stored.copy())
    np.testing.assert_array_equal(layer.get_parameter("weight"), stored.T)
    value = rng.normal(size=(7, 5))
    layer.set_parameter("weight", value)
    np.testing.assert_array_equal(layer.weight, value.T)


def test_set_parameter_works_in_place_and_copies(adapter, weights):
    stored = adapter.base_layer.weight
    for name, value in weights.items():
        given = value.copy()
        adapter.set_parameter(name, value)
        value[...] = 0
        np.testing.assert_array_equal(adapter.get_parameter(name), given)
    assert adapter.base_layer.weight is stored


@pytest.mark.parametrize("call", ["get_parameter", "parameter_shape", "set_parameter"])
def test_an_unknown_name_is_a_key_error(adapter, call):
    arguments = ("lora_C", np.zeros(1)) if call == "set_parameter" else ("lora_C",)
    with pytest.raises(KeyError, match=r"lora_C.*lora_A"):
        getattr(adapter, call)(*arguments)


def test_set_parameter_of_another_shape(adapter):
    before = snapshot(adapter)
    with pytest.raises(ValueError, match=r"lora_A must have shape \(7, 3\), got \(3, 7\)"):
        adapter.set_parameter("lora_A", np.ones((3, 7)))
    with pytest.raises(TypeError, match="lora_A"):
        adapter.set_parameter("lora_A", np.ones((7, 3), complex))
    assert_unchanged(adapter, before)


# --- validate_weights --------------------------------------------------------------------------------------------


def test_validate_a_perfect_match(adapter, weights):
    before = snapshot(adapter)
    result = adapter.validate_weights(weights)
    assert dataclasses.is_dataclass(result)
    assert result.is_valid is True
    assert sorted(result.matched) == sorted(weights)
    assert (result.unmatched, result.missing, result.shape_mismatches) == ([], [], [])
    assert_unchanged(adapter, before)


def test_validate_finds_every_fault(adapter, weights):
    weights["lora_A"] = np.zeros((3, 7))
    weights["other"] = np.zeros(1)
    del weights["lora_B"], weights["velocity"]
    result = adapter.validate_weights(weights)
    assert result.is_valid is False
    assert sorted(result.matched) == ["base.bias", "base.weight", "delta"]
    assert result.unmatched == ["other"]
    assert result.missing == ["lora_B"]
    assert result.shape_mismatches == ["lora_A"]


def test_a_missing_velocity_is_valid(adapter, weights):
    del weights["velocity"]
    assert adapter.validate_weights(weights).is_valid
    assert adapter.load_weights(weights, strict=True).success


# --- load_weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_load_everything(adapter, weights, strict):
    result = adapter.load_weights(weights, strict=strict)
    assert dataclasses.is_dataclass(result)
    assert result.success is True
    assert sorted(result.loaded) == sorted(weights)
    assert (result.skipped, result.failed) == ([], [])
    assert "6" in result.message
    assert_unchanged(adapter, weights)


def test_mapping_is_from_the_file_to_the_parameter(adapter, weights):
    mapping = {f"file.{name}": name for name in weights}
    stored = {f"file.{name}": value for name, value in weights.items()}
    assert adapter.validate_weights(stored, mapping).is_valid
    assert not adapter.validate_weights(stored).is_valid
    assert adapter.load_weights(stored, mapping, strict=True).success
    assert_unchanged(adapter, weights)


def test_unknown_names_are_skipped(adapter, weights):
    weights["other"] = np.zeros(1)
    result = adapter.load_weights(weights)
    assert result.success
    assert result.skipped == ["other"]
    assert "other" in result.message
    del weights["other"]
    assert_unchanged(adapter, weights)


def test_a_part_is_loaded_when_not_strict(adapter, weights):
    before = snapshot(adapter)
    result = adapter.load_weights({"lora_A": weights["lora_A"]})
    assert result.success
    assert result.loaded == ["lora_A"]
    assert_unchanged(adapter, before | {"lora_A": weights["lora_A"]})


def test_a_wrong_shape_fails_and_changes_nothing(adapter, weights):
    before = snapshot(adapter)
    weights["velocity"] = np.zeros((5, 7))
    result = adapter.load_weights(weights)
    assert result.success is False
    assert result.loaded == []
    assert result.failed == ["velocity"]
    assert "(7, 5)" in result.message
    assert_unchanged(adapter, before)


def test_a_wrong_kind_fails_and_changes_nothing(adapter, weights):
    before = snapshot(adapter)
    weights["velocity"] = np.zeros((7, 5), complex)
    weights["delta"] = "text"
    result = adapter.load_weights(weights)
    assert not result.success
    assert sorted(result.failed) == ["delta", "velocity"]
    assert_unchanged(adapter, before)


def test_strict_lists_every_fault(adapter, weights):
    before = snapshot(adapter)
    weights["lora_A"] = np.zeros((3, 7))
    weights["other"] = np.zeros(1)
    del weights["lora_B"]
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        adapter.load_weights(weights, strict=True)
    for fault in ("lora_A must have shape (7, 3), got (3, 7)", "'other'", "'lora_B' is missing"):
        assert fault in str(caught.value)
    assert_unchanged(adapter, before)


def test_two_names_for_one_parameter(adapter, weights):
    before = snapshot(adapter)
    weights["copy"] = weights["lora_A"]
    assert adapter.load_weights(weights, {"copy": "lora_A"}).failed == ["copy"]
    assert adapter.validate_weights(weights, {"copy": "lora_A"}).unmatched == ["copy"]
    assert_unchanged(adapter, before)


@pytest.mark.parametrize("call", ["load_weights", "validate_weights"])
def test_weights_must_be_a_mapping(adapter, call):
    with pytest.raises(TypeError, match="weights must be a mapping"):
        getattr(adapter, call)([("lora_A", np.zeros((7, 3)))])
    with pytest.raises(TypeError, match="mapping must be"):
        getattr(adapter, call)({}, ["lora_A"])


def test_weights_may_be_views_of_the_layer_itself(adapter):
    """Swapping delta and velocity through their live views."""
    before = snapshot(adapter)
    adapter.load_weights({"delta": adapter.velocity, "velocity": adapter.delta})
    assert_unchanged(adapter, before | {"delta": before["velocity"], "velocity": before["delta"]})


@pytest.mark.parametrize("dtype", ["float16", "int8", "float64", ">f8"])
def test_values_of_another_dtype_are_cast(rng, dtype):
    layer = make_layer(rng, dtype="float32")
    value = rng.integers(-9, 9, size=(7, 5)).astype(dtype)
    assert layer.load_weights({"weight": value}).success
    np.testing.assert_array_equal(layer.weight, value.astype("float32"))


def test_a_read_only_parameter_cannot_be_set(rng):
    weight = rng.normal(size=(7, 5))
    weight.flags.writeable = False
    layer = nblora.Dense(weight, np.zeros(5))
    with pytest.raises(ValueError, match="weight is read-only"):
        layer.load_weights({"bias": np.ones(5), "weight": np.ones((7, 5))})
    np.testing.assert_array_equal(layer.bias, 0)
