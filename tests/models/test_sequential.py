"""Models: how they are made, chained, adapted, merged, counted and kept."""

import importlib
import re

import numpy as np
import pytest

import nblora
from nblora.errors import FormatError
from nblora.sweep import expand_grid
from tests import oracle
from tests.helpers import (
    assert_close,
    assert_disjoint,
    assert_unchanged,
    make_adapter,
    make_layer,
    randomise,
    snapshot,
    state_of,
)

pytestmark = pytest.mark.small


def network(rng, **layers):
    made = {
        "hidden1": make_layer(rng, (7, 6), activation="relu"),
        "hidden2": make_layer(rng, (6, 6), nblora.FullyConnected, activation="tanh"),
        "head": make_layer(rng, (6, 4)),
    }
    return nblora.Sequential(made | layers)


@pytest.fixture
def model(rng):
    return network(rng)


@pytest.fixture
def x(rng):
    return rng.normal(size=(5, 7))


# --- making ------------------------------------------------------------------------------------------------------


def test_names(rng):
    first, second = make_layer(rng, (7, 6)), make_layer(rng, (6, 5))
    for model in (nblora.Sequential(first, second), nblora.Sequential([first, second])):
        assert [name for name, _ in model.named_layers()] == ["0", "1"]
        assert len(model) == 2
        assert list(model) == [first, second]
        assert model[0] is model["0"] is first
        assert model[-1] is second
        assert model.parameter_names() == ["0.weight", "0.bias", "1.weight", "1.bias"]
    with pytest.raises(KeyError, match=r"no layer '7'; there are 0, 1"):
        model["7"]
    with pytest.raises(IndexError):
        model[7]


def test_bad_layers(rng):
    layer = make_layer(rng, (5, 5))
    for layers in ((), ([],), ({},)):
        with pytest.raises(ValueError, match="layers must not be empty"):
            nblora.Sequential(*layers)
    for wrong in (None, 3, np.zeros((5, 5)), "relu"):
        with pytest.raises(TypeError, match=r"layers\['1'\] must be a layer"):
            nblora.Sequential(layer, wrong)
    for name in ("", "a.b", 3):
        with pytest.raises(ValueError, match="name"):
            nblora.Sequential({name: layer})
    with pytest.raises(ValueError, match="distinct"):
        nblora.Sequential(layer, layer)
    with pytest.raises(ValueError, match="'0' has 5 outputs but layer '1' takes 4 inputs"):
        nblora.Sequential(layer, make_layer(rng, (4, 5)))
    with pytest.raises(ValueError, match="'0' is float64 but layer '1' is float32"):
        nblora.Sequential(layer, make_layer(rng, (5, 5), dtype="float32"))


# --- computing ---------------------------------------------------------------------------------------------------


def test_a_chain_agrees_with_the_oracle(rng, x):
    model = network(rng, hidden2=make_adapter(rng, base=make_layer(rng, (6, 6), activation="gelu"), frozen=False))
    states = [state_of(layer) for layer in model]
    values = [x]
    for state in states:
        values.append(oracle.forward(values[-1], state))
    assert_close(model(x), values[-1])
    grad = rng.normal(size=(5, 4))
    found = []
    back = grad
    for state, value in zip(reversed(states), reversed(values[:-1]), strict=True):
        gradients = oracle.gradients(value, back, state)
        back = gradients.pop("x")
        found.insert(0, gradients)
    assert_close(model.backward(grad), back)
    order = ("weight", "bias", "lora_A", "lora_B", "delta")
    packed = np.concatenate([g[name].ravel() for g in found for name in order if name in g])
    assert_close(model.get_parameter_gradients(), packed)


def test_parameters_are_packed_layer_by_layer(model):
    expected = np.concatenate([layer.get_parameters() for layer in model])
    np.testing.assert_array_equal(model.get_parameters(), expected)
    assert model.parameter_count == expected.size == 7 * 6 + 6 + 6 * 6 + 6 + 6 * 4 + 4


def test_modes_reach_every_layer(model):
    model.eval()
    assert [layer.training for layer in model] == [False] * 3
    model.train()
    assert [layer.training for layer in model] == [True] * 3


def test_closing_closes_every_layer(model, x):
    head = model["head"]
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        head.forward(x)


def test_diagnostics_of_every_layer(model):
    figures = model.diagnostics()
    assert figures["layer_count"] == 3
    assert figures["hidden2.type"] == "FullyConnected"
    assert figures["head.weight_norm"] == pytest.approx(np.linalg.norm(model["head"].weight))


# --- adapting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("hidden1", ["hidden1"]),
        ("hidden*", ["hidden1", "hidden2"]),
        ("hidden[0-9]+", ["hidden1", "hidden2"]),
        (r"(head|hidden1)", ["hidden1", "head"]),
        (re.compile("h.*d"), ["head"]),
        (["head", "hidden1"], ["hidden1", "head"]),
        (0, ["hidden1"]),
        (-1, ["head"]),
        ([0, "head"], ["hidden1", "head"]),
        ("*", ["hidden1", "hidden2", "head"]),
    ],
)
def test_targets(model, target, expected):
    layers = dict(model.named_layers())
    assert model.adapt(target, rank=2) is model
    adapted = {name: layer for name, layer in model.named_layers() if type(layer) is nblora.LoRAAdapter}
    assert list(adapted) == expected
    for name, adapter in adapted.items():
        assert adapter.base_layer is layers[name]


@pytest.mark.parametrize("target", ["hiden*", "[", ["hidden1", "nothing"], 3, -4, re.compile("hid")])
def test_a_target_that_matches_nothing_lists_the_names(model, target):
    layers = list(model)
    with pytest.raises(ValueError, match=r"target .* matches none of the layers 'hidden1', 'hidden2', 'head'"):
        model.adapt(target, rank=2)
    assert list(model) == layers
    assert all(layer.trainable for layer in layers)


@pytest.mark.parametrize("target", [None, [], 1.5, True, [None], {}])
def test_a_target_of_the_wrong_kind(model, target):
    with pytest.raises(TypeError, match="target must"):
        model.adapt(target, rank=2)


def test_other_faults_change_nothing(model, x):
    layers, before = list(model), model(x)
    for arguments in (
        {"target": "*", "rank": 5},
        {"target": "*", "rank": 2, "alpha": 0},
        {"target": "*", "rank": 2, "adapter": "dense"},
        {"target": "head", "rank": 2, "modules_to_save": "h*"},
        {"target": "head", "rank": 2, "modules_to_save": "tail"},
    ):
        with pytest.raises(ValueError, match=r"."):
            model.adapt(**arguments)
        assert list(model) == layers
        assert all(layer.trainable for layer in layers)
    with pytest.raises(TypeError):
        model.adapt("*", rank=2, strength=3)
    np.testing.assert_array_equal(model(x), before)


def test_a_new_adaptation_computes_the_same(model, x):
    before = model(x)
    assert_close(model.adapt("*", rank=2)(x), before)


@pytest.mark.parametrize(("adapter", "kind"), [("lora", nblora.LoRAAdapter), ("delta", nblora.DeltaLoRAAdapter)])
def test_settings_go_to_every_adapter(model, adapter, kind):
    model.adapt("hidden*", adapter, rank=2, alpha=6.0, lora_dropout=0.5, freeze_base_layer=False)
    for layer in (model["hidden1"], model["hidden2"]):
        assert type(layer) is kind
        assert (layer.scaling, layer.lora_dropout, layer.is_base_layer_frozen) == (3.0, 0.5, False)


def test_each_adapter_draws_its_own_numbers_from_one_seed(rng):
    def drawn(seed):
        layers = [make_layer(rng, (6, 6)) for _ in range(2)]
        return [layer.get_parameter("lora_A") for layer in nblora.Sequential(*layers).adapt("*", rank=2, seed=seed)]

    first, second, other = drawn(1), drawn(1), drawn(2)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, other)


def test_other_layers_are_frozen_but_for_modules_to_save(model, x, rng):
    model.adapt("hidden1", "delta", rank=2, modules_to_save="head")
    assert not model["hidden2"].trainable
    assert model["head"].trainable
    assert model.parameter_count == 7 * 2 + 2 * 6 + 7 * 6 + 6 * 4 + 4
    randomise(model["hidden1"], rng)
    before = snapshot(model)
    model(x)
    model.backward(rng.normal(size=(5, 4)))
    model.update_parameters(0.1)
    after = snapshot(model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    own = {f"hidden1.{name}" for name in ("lora_A", "lora_B", "delta", "velocity")}
    assert changed == own | {"head.weight", "head.bias"}


def test_an_evaluating_model_gets_evaluating_adapters(model):
    model.eval().adapt("*", rank=2)
    assert [layer.training for layer in model] == [False] * 3


def test_adapt_reaches_into_nested_models(rng, x):
    inner = nblora.Sequential({"a": make_layer(rng, (6, 6)), "b": make_layer(rng, (6, 6))})
    model = nblora.Sequential({"in": make_layer(rng, (7, 6)), "block": inner})
    before = model(x)
    model.adapt("block.a", "lora", rank=2)
    assert isinstance(model["block"]["a"], nblora.LoRAAdapter)
    assert not model["block"]["b"].trainable
    assert not model["in"].trainable
    assert_close(model(x), before)
    randomise(model["block"]["a"], rng)
    assert_close(model.merge()(x), model(x))
    with model.disable_adapter():
        assert_close(model(x), before)
    assert_unchanged(model.clone(), snapshot(model))


def test_an_adapted_layer_is_not_adapted_again(model):
    model.adapt("hidden1", rank=2)
    layers = list(model)
    for arguments in ({"target": "h*"}, {"target": "head", "modules_to_save": "hidden1"}):
        with pytest.raises(ValueError, match=r"layer 'hidden1' has an adapter already.*model\.merge\(\)"):
            model.adapt(**arguments, rank=2)
        assert list(model) == layers
    again = model.merge().adapt("hidden1", rank=2)
    assert type(again["hidden1"].base_layer) is nblora.Dense


def test_a_rank_that_is_too_large_names_the_layer_or_is_lowered(model):
    with pytest.raises(ValueError, match=r"between 1 and 4, got 5: layer 'head' maps 6 to 4 .*lower_rank=True"):
        model.adapt("*", rank=5)
    with pytest.warns(UserWarning, match="layer 'head' maps 6 to 4 features, so its adapter has rank 4 instead of 5"):
        model.adapt("*", rank=5, lower_rank=True)
    assert [layer.rank for layer in model] == [5, 5, 4]


def test_adapting_again_leaves_the_first_adapters(model):
    model.adapt("hidden1", rank=2)
    first = model["hidden1"]
    model.adapt("head", "lora", rank=2)
    assert model["hidden1"] is first
    assert model["hidden1"].parameter_count > 0


# --- merging and disabling ---------------------------------------------------------------------------------------


def test_merge_returns_a_plain_model(model, x, rng):
    model.adapt("hidden*", "delta", rank=2)
    for name in ("hidden1", "hidden2"):
        randomise(model[name], rng)
    before = snapshot(model)
    merged = model.merge()
    assert [(name, type(layer)) for name, layer in merged.named_layers()] == [
        ("hidden1", nblora.Dense),
        ("hidden2", nblora.FullyConnected),
        ("head", nblora.Dense),
    ]
    assert_close(merged(x), model(x))
    assert_disjoint(merged, model)
    assert_unchanged(model, before)


def test_disable_adapter(model, x, rng):
    before = model(x)
    model.adapt("hidden*", "delta", rank=2)
    randomise(model["hidden1"], rng)
    with model.disable_adapter() as entered:
        assert entered is model
        assert_close(model(x), before)
    assert not np.allclose(model(x), before)


# --- printing ----------------------------------------------------------------------------------------------------


def test_print_trainable_parameters(rng, capsys):
    model = nblora.Sequential(make_layer(rng, (33, 33)), make_layer(rng, (33, 2), bias=False))
    model.adapt("0", "lora", rank=2)
    model.print_trainable_parameters()
    # 33·33 + 33 + 33·2 of the base, 2·33·2 of the factors
    assert capsys.readouterr().out == "trainable params: 132 || all params: 1,320 || trainable%: 10.0000\n"


# --- files -------------------------------------------------------------------------------------------------------


def test_save_and_load(model, x, rng, tmp_path):
    model.adapt("hidden*", "delta", rank=2, modules_to_save="head")
    randomise(model["hidden1"], rng)
    model.save(tmp_path / "model")
    loaded = nblora.Sequential.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert repr(loaded) == repr(model)
    assert [layer.trainable for layer in loaded] == [layer.trainable for layer in model]
    grad = rng.normal(size=(5, 4))
    for one in (loaded, model):
        one(x)
        one.backward_update(grad, 0.1)
    assert_unchanged(loaded, snapshot(model))


def test_a_layer_is_no_model(rng, tmp_path):
    make_layer(rng).save(tmp_path / "layer")
    with pytest.raises(FormatError, match="holds a Dense, not a Sequential"):
        nblora.Sequential.load(tmp_path / "layer")


def test_named_parameters_of_a_model(model, rng):
    value = rng.normal(size=(6, 4))
    assert model.load_weights({"head.weight": value}).loaded == ["head.weight"]
    np.testing.assert_array_equal(model["head"].weight, value)
    result = model.validate_weights({"head.weight": value.T})
    assert result.shape_mismatches == ["head.weight"]
    assert "hidden1.weight" in result.missing


# --- whole or not at all -----------------------------------------------------------------------------------------


def test_a_stray_forward_of_a_layer_spoils_no_update(model, x, rng):
    grad, twin = rng.normal(size=(5, 4)), model.clone()
    for each in (model, twin):
        each.forward(x)
    model["hidden2"].forward(rng.normal(size=(2, 6)))
    assert_close(model.backward_update(grad, 0.1), twin.backward_update(grad, 0.1))
    np.testing.assert_array_equal(model.get_parameters(), twin.get_parameters())


@pytest.mark.parametrize("name", ["hidden1", "hidden2", "head"])
def test_a_layer_that_forgot_its_forward_leaves_the_others_as_they_were(model, x, name):
    model.forward(x)
    model[name].eval().train()
    before = model.get_parameters()
    with pytest.raises(RuntimeError, match="needs a forward first"):
        model.backward_update(np.ones((5, 4)), 0.1)
    np.testing.assert_array_equal(model.get_parameters(), before)


def test_plain_lora_is_what_one_gets_unasked():
    """A delta trains more parameters than the layer holds, so it is asked for by name."""
    model = nblora.Sequential(nblora.Dense.random(4, 3, seed=0)).adapt("*", rank=2)
    assert type(model[0]) is nblora.LoRAAdapter
    assert expand_grid({"rank": [2]})[0]["method"] == "lora"
    estimators = pytest.importorskip("sklearn") and importlib.import_module("nblora.estimators")
    assert estimators.LoRAClassifier().method == estimators.LoRARegressor().method == "lora"
