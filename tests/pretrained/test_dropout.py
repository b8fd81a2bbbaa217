"""Dropout of the base: where it acts, against transformers; gradients; `fit(base_dropout=True)`, exactly repeated."""

import json
import shutil

import numpy as np
import pytest

import nblora
from nblora.backends import resolve
from nblora.layers import tree
from nblora.layers.attention import Attention
from nblora.layers.functions import Dropout
from nblora.layers.run import Run
from tests.pretrained.support import FIXTURES, outputs, relative_to_largest
from tests.processes import ROOT

DATA = ROOT / "tests" / "data"
FOLDERS = {
    "bert": "models/bert_cls_qv",
    "bert_head": "models/bert_cls_qv",
    "roberta": "dropout/roberta",
    "distilbert": "dropout/distilbert",
    "gpt2": "generation/gpt2",
    "llama": "models/llama_clm_all",
    "qwen2": "generation/qwen2",
    "vit": "models/vit_cls_qv",
}


@pytest.fixture
def make(tmp_path):
    """Makes the model of a case, whose config.json says what to drop, its inputs and its labels."""

    def made(name, dtype="float64"):
        held = np.load(DATA / "dropout" / "io.npz")
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(DATA / FOLDERS[name] / "base", folder)
            raw = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(raw | json.loads(str(held[f"{name}.config"]))))
        model = nblora.load_pretrained(folder, dtype=dtype)
        causal = model.task == "causal-lm"
        source = {"vit": "vit_cls_qv"}.get(name, "llama_clm_all" if causal else "bert_cls_qv")
        kept = np.load(FIXTURES / source / "io.npz")
        inputs = {key: kept[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in kept}
        exact = outputs({**inputs, "logits": held[f"{name}.logits"]}, "logits")
        return model, inputs, kept["labels"], exact

    return made


def drawing(model, seed=0):
    model.train()._drop_base(np.random.default_rng(seed))
    return model


@pytest.mark.parametrize("name", FOLDERS)
def test_it_acts_where_transformers_has_it(make, monkeypatch, name):
    model, inputs, _, exact = make(name)
    attend = Attention._forward

    def scaled(step, x, run, rng):
        return x if rng is None else x * (1 + step.share)

    def attended(step, q, k, v, run, rng=None):
        o = attend(step, q, k, v, run)
        return o if rng is None else o * (1 + step.dropout)

    monkeypatch.setattr(Dropout, "_forward", scaled)
    monkeypatch.setattr(Attention, "_forward", attended)
    plain = model(**inputs)
    assert relative_to_largest(drawing(model)(**inputs), exact) < 1e-9
    assert relative_to_largest(plain, exact) > 1e-3


@pytest.mark.parametrize("name", FOLDERS)
def test_gradients(make, rng, name):
    model, inputs, _, exact = make(name)
    drawing(model.unfreeze())
    weights = rng.normal(size=exact.shape)
    states = {key: g.bit_generator.state for key, g in tree.generators(model).items()}

    def loss():
        for key, generator in tree.generators(model).items():
            generator.bit_generator.state = states[key]
        return float((model(**inputs) * weights).sum())

    loss()
    model.backward(weights)
    trained = [(parameter, parameter.gradient.copy()) for _, parameter, _ in model._trainable()]
    assert sum(bool(gradient.any()) for _, gradient in trained) > 0.8 * len(trained)
    for _ in range(3):
        directions = [rng.normal(size=gradient.shape) for _, gradient in trained]
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            for (parameter, _), direction in zip(trained, directions, strict=True):
                parameter.array += step * direction
            values.append(loss())
        slope = sum(float((g * d).sum()) for (_, g), d in zip(trained, directions, strict=True))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_what_is_dropped():
    rng, run = np.random.default_rng(0), Run(resolve("cpu"), training=True)
    x = np.full((400, 100), 3.0)
    step = Dropout(0.3)
    y = step._forward(x, run, rng)
    assert set(np.unique(y)) == {0, 3 / 0.7}
    assert abs((y == 0).mean() - 0.3) < 0.01
    np.testing.assert_array_equal(step._backward(x, run), y)
    assert step._forward(x, Run(resolve("cpu")), rng) is x
    assert Dropout(0.0)._forward(x, Run(resolve("cpu"), training=True), rng) is x


def parameters(model):
    return {name: model.get_parameter(name) for name in model.parameter_names()}


def same(model, other):
    found, expected = parameters(model), parameters(other)
    return all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", FOLDERS)
def test_runs_repeat_and_resume_bit_for_bit(make, tmp_path, name):
    def trained(epochs=2, **settings):
        model, inputs, labels, _ = make(name, "float32")
        model.adapt("all-linear", rank=2, seed=0, lora_dropout=0.1)
        x = inputs.get("pixel_values", inputs)
        settings = {"base_dropout": True, "seed": 5, "batch_size": 2, "lr": 1e-2, **settings}
        return model, nblora.fit(model, x, labels, epochs=epochs, **settings), (x, labels)

    whole, history, (x, y) = trained(checkpoint=tmp_path / "whole")
    assert same(trained(recompute=True)[0], whole)
    assert not same(trained(seed=6, shuffle=False)[0], trained(seed=7, shuffle=False)[0])
    assert not same(trained(base_dropout=False)[0], whole)
    trained(1, checkpoint=tmp_path / "run")
    again, resumed, _ = trained(resume=tmp_path / "run")
    assert same(again, whole)
    assert resumed["loss"] == history["loss"]
    assert not any("dropout" in str(key) for key in tree.generators(whole))
    assert all(layer.lora_dropout for layer in (node.layer for node in tree.walk(whole)) if layer._rng is not None)
    assert nblora.training.evaluate(again, x, y) == nblora.training.evaluate(whole, x, y)


def test_validation_and_evaluation_drop_nothing(make):
    model, inputs, labels, _ = make("bert", "float32")
    model.adapt("query", rank=2, seed=0)
    history = nblora.fit(model, inputs, labels, epochs=2, validation=(inputs, labels), base_dropout=True, seed=1)
    assert history["val_loss"][-1] == nblora.training.evaluate(model, inputs, labels)["loss"]
    assert history["loss"][-1] != history["val_loss"][-1]


def test_what_it_is_not_for(make, rng):
    x = rng.normal(size=(4, 3))
    with pytest.raises(ValueError, match="base_dropout is for pretrained models"):
        nblora.fit(nblora.Dense.random(3, 3), x, x, loss="mse", base_dropout=True)
    model, inputs, labels, _ = make("bert")
    with pytest.raises(TypeError, match="base_dropout must be True or False"):
        nblora.fit(model.adapt("query", rank=1), inputs, labels, base_dropout="yes")


@pytest.mark.parametrize("value", [1.0, -0.1, "much"])
def test_shares_that_are_none(tmp_path, value):
    folder = shutil.copytree(DATA / FOLDERS["bert"] / "base", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "hidden_dropout_prob": value}))
    with pytest.raises(nblora.errors.FormatError, match="hidden_dropout_prob is"):
        nblora.load_pretrained(folder)
