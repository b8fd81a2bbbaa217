"""Several adapters on one model: what PEFT computes with them, training, files, and what cannot be."""

import pickle
import re

import numpy as np
import pytest

import nblora
from nblora.adapters import Adapter
from tests.pretrained.support import FIXTURES, outputs, relative_to_largest
from tests.processes import ROOT

SECOND = ROOT / "tests" / "data" / "adapters"
LLAMA, BERT = "llama_clm_all", "bert_cls_qv"
SUM = {"first": 0.7, "second": -0.4}


def two(name, dtype="float64"):
    model = nblora.load_pretrained(FIXTURES / name / "base", dtype=dtype)
    model.load_adapter(FIXTURES / name / "adapter", "first").load_adapter(SECOND / name / "adapter", name="second")
    return model


def held(name):
    ids = np.load(FIXTURES / name / "io.npz")
    inputs = {key: ids[key] for key in ("input_ids", "attention_mask")}
    computed = dict(np.load(SECOND / name / "io.npz")) | {"base": ids["logits0"]}
    return inputs, {key: outputs({**inputs, key: value}, key) for key, value in computed.items()}


def near(model, inputs, exact, tolerance=1e-9):
    return relative_to_largest(model(**inputs), exact) < tolerance


@pytest.mark.parametrize("name", [LLAMA, BERT])
def test_each_alone_is_that_of_peft(name):
    model, (inputs, exact) = two(name), held(name)
    assert model.adapter_names == ["first", "second"]
    assert model.active_adapters == {"first": 1.0}
    assert near(model, inputs, exact["first"])  # a further one is loaded, not made active
    for each in ("second", "first", "first", "second"):
        assert model.set_adapter(each) is model
        assert model.active_adapters == {each: 1.0}
        assert near(model, inputs, exact[each])
        with model.disable_adapter():
            computed = model(**inputs)
        if name == LLAMA:
            assert relative_to_largest(computed, exact["base"]) < 1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-4)])
def test_sums_are_those_of_peft(dtype, tolerance):
    model, (inputs, exact) = two(LLAMA, dtype), held(LLAMA)
    model.set_adapter({"first": 1, "second": 1})
    assert near(model, inputs, exact["both"], tolerance)
    model.set_adapter(SUM)
    assert near(model, inputs, exact["sum"], tolerance)
    assert near(model.merge(), inputs, exact["sum"], tolerance)
    with model.disable_adapter():
        assert near(model, inputs, exact["base"], tolerance)
    assert near(model.set_adapter({"second": 1.0}), inputs, exact["second"], tolerance)
    assert near(model.set_adapter({"second": 0.0}), inputs, exact["base"], tolerance)


def test_the_base_is_never_copied_or_changed():
    model = two(LLAMA)
    plain = {n: layer.base_layer if isinstance(layer, Adapter) else layer for n, layer in model.named_layers()}
    before = {name: {n: layer.get_parameter(n) for n in layer.parameter_names()} for name, layer in plain.items()}
    for chosen in ("second", SUM, "first"):
        model.set_adapter(chosen)
        for name, layer in model.named_layers():
            assert (layer.base_layer if isinstance(layer, Adapter) else layer) is plain[name]
    for name, values in before.items():
        for n, value in values.items():
            np.testing.assert_array_equal(plain[name].get_parameter(n), value)


@pytest.mark.parametrize("name", [LLAMA, BERT])
def test_each_trains_as_it_would_alone(name):
    model, (inputs, _) = two(name), held(name)
    alone = nblora.load_pretrained(FIXTURES / name / "base", dtype="float64").load_adapter(SECOND / name / "adapter")
    labels = np.load(FIXTURES / name / "io.npz")["labels"]
    first = {n: model.get_parameter(n) for n in model.parameter_names()}
    model.set_adapter("second")
    assert model.parameter_count == alone.parameter_count
    settings = {"epochs": 2, "optimizer": "adamw", "lr": 1e-2, "seed": 3}
    for each in (model, alone):
        nblora.fit(each, inputs, labels, **settings)
    assert model.parameter_names() == alone.parameter_names()
    for n in alone.parameter_names():
        np.testing.assert_array_equal(model.get_parameter(n), alone.get_parameter(n))
    model.set_adapter("first")
    for n, value in first.items():
        np.testing.assert_array_equal(model.get_parameter(n), value)
    np.testing.assert_array_equal(model.set_adapter("second")(**inputs), alone(**inputs))


def test_nothing_of_a_sum_is_trained():
    model, (inputs, _) = two(LLAMA), held(LLAMA)
    model.set_adapter(SUM)
    assert model.parameter_count == 0
    with pytest.raises(ValueError, match="train"):
        nblora.fit(model, inputs, None, epochs=1)
    assert model.set_adapter("first").parameter_count > 0


@pytest.mark.parametrize("chosen", ["first", "second", SUM])
@pytest.mark.parametrize("way", ["save", "clone", "pickle"])
def test_all_are_kept(tmp_path, way, chosen):
    model, (inputs, exact) = two(LLAMA), held(LLAMA)
    model.set_adapter(chosen)
    names = model.parameter_names()
    if way == "save":
        model.save(tmp_path / "model.safetensors")
        twin = nblora.load(tmp_path / "model.safetensors")
    else:
        twin = model.clone() if way == "clone" else pickle.loads(pickle.dumps(model))
    assert twin.adapter_names == model.adapter_names
    assert twin.active_adapters == model.active_adapters
    assert twin.parameter_names() == names
    assert twin.parameter_count == model.parameter_count
    for each, logits in (("first", "first"), (SUM, "sum"), ("second", "second"), ({"first": 1, "second": 1}, "both")):
        assert near(twin.set_adapter(each), inputs, exact[logits])
        if isinstance(each, str):
            assert twin.parameter_count == model.set_adapter(each).parameter_count


def test_heads_are_kept_too(tmp_path):
    model, (inputs, exact) = two(BERT), held(BERT)
    model.save(tmp_path / "model.safetensors")
    twin = nblora.load(tmp_path / "model.safetensors")
    for each in ("second", "first"):
        assert near(twin.set_adapter(each), inputs, exact[each])
    with pytest.raises(ValueError, match="'classifier', and at least one brings it whole"):
        twin.set_adapter({"first": 0.5, "second": 0.5})
    assert twin.active_adapters == {"first": 1.0}
    assert near(twin, inputs, exact["first"])


def test_each_is_saved_for_peft(tmp_path):
    model, (inputs, exact) = two(LLAMA), held(LLAMA)
    model.save_adapter(tmp_path / "second", name="second")
    assert model.active_adapters == {"first": 1.0}
    model.save_adapter(tmp_path / "first")
    with pytest.raises(ValueError, match="a sum of first, second is active"):
        model.set_adapter(SUM).save_adapter(tmp_path / "sum")
    assert near(model, inputs, exact["sum"])
    model.save_adapter(tmp_path / "again", name="second")
    assert model.active_adapters == SUM
    for folder, name in (("first", "first"), ("second", "second"), ("again", "second")):
        read = nblora.load_pretrained(FIXTURES / LLAMA / "base", dtype="float64").load_adapter(tmp_path / folder)
        assert near(read, inputs, exact[name])


def test_adapted_here_and_loaded():
    model, (inputs, exact) = nblora.load_pretrained(FIXTURES / BERT / "base", dtype="float64"), held(BERT)
    model.adapt("dense", rank=2, seed=0)
    assert model.active_adapters == {"default": 1.0}
    own = model(**inputs)
    model.load_adapter(SECOND / BERT / "adapter", "second")
    np.testing.assert_array_equal(model(**inputs), own)
    assert near(model.set_adapter("second"), inputs, exact["second"])
    np.testing.assert_array_equal(model.set_adapter("default")(**inputs), own)
    assert "classifier.weight" in {n for n, p, on in model._trainable()}


def test_dense_deltas_are_active_alone():
    model = nblora.load_pretrained(FIXTURES / LLAMA / "base").adapt("q_proj", "delta", rank=2, seed=0)
    name = next(n for n in model.parameter_names() if n.endswith(".delta"))
    model.set_parameter(name, np.full_like(model.get_parameter(name), 0.25))
    inputs, _ = held(LLAMA)
    own = model(**inputs)
    model.load_adapter(SECOND / LLAMA / "adapter", "second")
    with pytest.raises(ValueError, match=r"'default' has more than low-rank factors at 'model\.layers\.0"):
        model.set_adapter({"default": 0.5, "second": 0.5})
    twin = model.set_adapter("second").clone()
    np.testing.assert_array_equal(twin.set_adapter("default")(**inputs), own)


def test_deleting():
    model = two(LLAMA)
    with pytest.raises(ValueError, match="'first' is active"):
        model.delete_adapter("first")
    model.delete_adapter("second")
    assert model.adapter_names == ["first"]
    with pytest.raises(ValueError, match=re.escape("there is no adapter 'second'; the model has 'first'")):
        model.delete_adapter("second")


def test_bad_input_changes_nothing(tmp_path):
    model, (inputs, exact) = two(LLAMA), held(LLAMA)
    for chosen, error, message in (
        ("third", ValueError, "there is no adapter 'third'; the model has 'first', 'second'"),
        ({}, ValueError, "at least one adapter"),
        ({"first": 1, "third": 1}, ValueError, "there is no adapter 'third'"),
        ({"first": "much"}, TypeError, "weight of adapter 'first'"),
        ({"first": float("nan")}, ValueError, "weight of adapter 'first' must be finite"),
        (["first"], TypeError, "name must be an adapter's name, or a dict"),
    ):
        with pytest.raises(error, match=message):
            model.set_adapter(chosen)
    for name, error, message in (
        ("first", ValueError, "has an adapter already that is called 'first'"),
        ("second", ValueError, "has an adapter already that is called 'second'"),
        ("a.b", ValueError, "no dot"),
        ("", ValueError, "not empty"),
        (3, TypeError, "name must be a string"),
    ):
        with pytest.raises(error, match=message):
            model.load_adapter(SECOND / LLAMA / "adapter", name)
    with pytest.raises(nblora.errors.FormatError):
        model.load_adapter(SECOND / BERT / "adapter", "third")
    with model.disable_adapter(), pytest.raises(RuntimeError, match="inside of disable_adapter"):
        model.set_adapter("second")
    with pytest.raises(ValueError, match="a sum of adapters is active"):
        model.set_adapter(SUM).adapt("o_proj", rank=1)
    assert model.adapter_names == ["first", "second"]
    assert near(model, inputs, exact["sum"])
    assert near(model.set_adapter("first"), inputs, exact["first"])
    assert model.parameter_count == two(LLAMA).parameter_count


def test_a_run_is_resumed_and_loaded(tmp_path):
    inputs, _ = held(LLAMA)
    whole, parts = two(LLAMA), two(LLAMA)
    settings = {"batch_size": 2, "seed": 1}
    nblora.fit(whole, inputs, epochs=2, **settings)
    nblora.fit(parts, inputs, epochs=1, checkpoint=tmp_path / "run.safetensors", **settings)
    again = two(LLAMA)
    nblora.fit(again, inputs, epochs=2, resume=tmp_path / "run.safetensors", **settings)
    for name in whole.parameter_names():
        np.testing.assert_array_equal(again.get_parameter(name), whole.get_parameter(name))
    read = nblora.load(tmp_path / "run.safetensors", base=two(LLAMA))  # it holds what was trained, not the others
    np.testing.assert_array_equal(read(**inputs), parts.eval()(**inputs))
    assert read.adapter_names == ["first"]
