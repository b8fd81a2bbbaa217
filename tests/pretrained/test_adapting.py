"""Adapting, merging, saving and moving pretrained models, by the names that PEFT users know."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest

import nblora
from nblora.adapters import Adapter
from nblora.errors import FormatError
from nblora.pretrained import saving
from nblora.storage.safetensors_reader import SafetensorsFile
from tests.pretrained.support import CASES, FIXTURES
from tests.processes import run

BERT = FIXTURES / "bert_cls_qv" / "base"
IDS = [[5, 6, 7], [8, 9]]


def adapters_of(model):
    return [name for name, layer in model.named_layers() if isinstance(layer, Adapter)]


def base(case):
    return FIXTURES / case / "base"


def inputs_of(case):
    held = np.load(FIXTURES / case / "io.npz")
    return {k: held[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in held.files}


def shaken(model, rng):
    """The model with every adapter's change made nonzero."""
    for name in model.parameter_names():
        if name.endswith((".lora_B", ".delta")):
            model.set_parameter(name, rng.normal(size=model.parameter_shape(name)) / 5)
    return model


@pytest.mark.parametrize(
    ("case", "target", "count", "first"),
    [
        ("bert_cls_qv", "query", 2, "bert.encoder.layer.0.attention.self.query"),
        ("bert_cls_qv", ["query", "output.dense"], 6, "bert.encoder.layer.0.attention.self.query"),
        ("bert_cls_qv", "encoder.layer.1.attention.self.key", 1, "bert.encoder.layer.1.attention.self.key"),
        ("bert_cls_qv", r".*layer\.1\..*dense", 3, "bert.encoder.layer.1.attention.output.dense"),
        ("bert_cls_qv", "*.intermediate.*", 2, "bert.encoder.layer.0.intermediate.dense"),
        ("bert_cls_qv", re.compile(".*value"), 2, "bert.encoder.layer.0.attention.self.value"),
        ("bert_cls_qv", "all-linear", 13, "bert.encoder.layer.0.attention.self.query"),
        ("bert_cls_qv", "word_embeddings", 1, "bert.embeddings.word_embeddings"),
        ("vit_cls_qv", ["q_proj", "v_proj"], 4, "vit.encoder.layer.0.attention.attention.query"),
        ("vit_cls_qv", "attention.attention.query", 2, "vit.encoder.layer.0.attention.attention.query"),
        ("vit_cls_qv", "layers.1.mlp.fc2", 1, "vit.encoder.layer.1.output.dense"),
        ("llama_clm_all", "all-linear", 14, "model.layers.0.self_attn.q_proj"),
        ("gpt2_clm", "all-linear", 8, "transformer.h.0.attn.c_attn"),
        ("resnet_conv", "convolution", 8, "resnet.embedder.embedder.convolution"),
    ],
)
def test_targets(case, target, count, first):
    model = nblora.load_pretrained(base(case)).adapt(target, rank=2, seed=0)
    assert len(adapters_of(model)) == count
    assert adapters_of(model)[0] == first
    assert {f"{first}.base.weight", f"{first}.lora_A", f"{first}.lora_B"} <= set(model.parameter_names())


@pytest.mark.parametrize(
    ("case", "given", "trained"),
    [
        ("bert_cls_qv", None, {"classifier"}),
        ("bert_cls_qv", [], set()),
        ("bert_cls_qv", ["classifier", "score"], {"classifier"}),
        ("bert_cls_qv", "layer.1.output", {f"bert.encoder.layer.1.output.{n}" for n in ("dense", "LayerNorm")}),
        ("roberta_cls", None, {"classifier.dense", "classifier.out_proj"}),
        ("roberta_cls", ["classifier"], {"classifier.dense", "classifier.out_proj"}),
        ("distilbert_cls", None, {"pre_classifier", "classifier"}),
        ("llama_clm_all", None, set()),
        ("resnet_conv", None, {"classifier.1"}),
        ("vit_cls_qv", ["layers.0.layernorm_before"], {"vit.encoder.layer.0.layernorm_before"}),
    ],
)  # fmt: skip
def test_modules_to_save(case, given, trained):
    target = "layers.0.layer.0.convolution" if "resnet" in case else "all-linear"
    if "output" in str(given):
        target = "query"
    model = nblora.load_pretrained(base(case)).adapt(target, rank=1, modules_to_save=given)
    adapters = adapters_of(model)
    found = {n.rpartition(".")[0] for n, _, trains in model._parameters() if trains}
    assert found - set(adapters) == trained


def test_modules_to_save_win_over_the_target():
    model = nblora.load_pretrained(BERT).adapt("dense", rank=2, modules_to_save=["pooler"])
    assert "bert.pooler.dense" not in adapters_of(model)
    assert "bert.pooler.dense.weight" in {n for n, _, trained in model._parameters() if trained}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "qery"}, ValueError, r"target 'qery' matches none of the layers 'bert\.embeddings.*in all"),
        ({"target": "LayerNorm"}, ValueError, "is a LayerNorm, which no adapter wraps"),
        ({"target": "query", "modules_to_save": "nothing"}, ValueError, "modules_to_save 'nothing' matches none"),
        ({"target": "query", "adapter": "dorra"}, ValueError, "adapter must be one of"),
        ({"target": "classifier"}, ValueError, "only layers of modules_to_save"),
        ({"target": []}, TypeError, "a pattern, or a list of them"),
        ({"target": "query", "rank": 25}, ValueError, "'bert.encoder.layer.0.attention.self.query' maps 24 to 24"),
    ],
)
def test_what_cannot_be_adapted_changes_nothing(arguments, error, message):
    model = nblora.load_pretrained(BERT)
    names = model.parameter_names()
    with pytest.raises(error, match=message):
        model.adapt(**{"rank": 2, **arguments})
    assert model.parameter_names() == names
    assert model.parameter_count == 0


def test_adapting_twice_says_what_to_do():
    model = nblora.load_pretrained(BERT).adapt("query", rank=2)
    with pytest.raises(ValueError, match=r"has an adapter already.*merge"):
        model.adapt("query", rank=2)
    with pytest.raises(ValueError, match="has an adapter already"):
        model.load_adapter(FIXTURES / "bert_cls_qv" / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_merged_disabled_saved_cloned_and_pickled(tmp_path, rng, case):
    model = nblora.load_pretrained(base(case), dtype="float64")
    inputs = inputs_of(case)
    plain = model(**inputs)
    model.load_adapter(FIXTURES / case / "adapter")
    y = model(**inputs)
    with model.disable_adapter():
        head = {n for n, _, trained in model._parameters() if trained and "lora" not in n}
        if not head:
            np.testing.assert_allclose(model(**inputs), plain, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(model.merge()(**inputs), y, rtol=1e-9, atol=1e-11)
    model.save(tmp_path / "model.safetensors")
    for twin in (nblora.load(tmp_path / "model.safetensors"), model.clone(), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(twin(**inputs), y)
        assert twin.parameter_names() == model.parameter_names()
        assert [t for *_, t in twin._parameters()] == [t for *_, t in model._parameters()]


def test_a_saved_model_loads_in_another_process(tmp_path):
    model = nblora.load_pretrained(BERT).load_adapter(FIXTURES / "bert_cls_qv" / "adapter")
    model.save(tmp_path / "model.safetensors")
    code = "import nblora, sys; print(nblora.load(sys.argv[1])([[5, 6, 7], [8, 9]]).tolist())"
    assert json.loads(run(code, str(tmp_path / "model.safetensors")).stdout) == pytest.approx(model(IDS), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["lora", "delta"])
def test_new_adapters_come_back_from_their_folder(tmp_path, rng, case, method):
    target = "convolution" if "resnet" in case else "all-linear"
    model = shaken(nblora.load_pretrained(base(case)).adapt(target, method, rank=2, alpha=3, seed=1), rng)
    if method == "lora":
        model.save_adapter(tmp_path / "adapter")
    else:
        with pytest.warns(UserWarning, match=r"is left out, [0-9.]+ % of the change"):
            model.save_adapter(tmp_path / "adapter")
        for _, layer in model.named_layers():
            if isinstance(layer, Adapter):
                layer.reset_state(include_delta=True)
    read = nblora.load_pretrained(base(case)).load_adapter(tmp_path / "adapter")
    inputs = inputs_of(case)
    np.testing.assert_allclose(read(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    assert sorted(adapters_of(read)) == sorted(adapters_of(model))


def test_a_folder_of_somebody_else_stays(tmp_path):
    model = nblora.load_pretrained(BERT).adapt("query", rank=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"holds 'notes\.txt', which this would remove"):
        model.save_adapter(tmp_path)
    with pytest.raises(FormatError, match=r"holds 'notes\.txt', which this would remove"):
        model.merge().save_pretrained(tmp_path)


def test_a_folded_delta_comes_back(tmp_path, rng):
    model = shaken(nblora.load_pretrained(BERT).adapt("query", "delta", rank=2, seed=1), rng)
    reports = model.save_adapter(tmp_path / "adapter", fold_delta=24)
    assert all(report.delta_error < 1e-5 for report in reports)
    read = nblora.load_pretrained(BERT).load_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(read(IDS), model(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fold", [None, 3])
@pytest.mark.filterwarnings("ignore:PEFT's files hold no dense delta")
def test_what_was_written_wrongly_is_noticed(tmp_path, rng, monkeypatch, fold):
    """With a delta that is left out, and with one that is folded in part."""
    model = shaken(nblora.load_pretrained(BERT).adapt("query", "delta", rank=2, seed=1), rng)
    model.save_adapter(tmp_path / "adapter", fold_delta=fold)
    right = nblora.DeltaLoRAAdapter.as_factors

    def wrong(adapter, fold=None):
        found = right(adapter, fold)
        return found._replace(B=1.2 * found.B)

    less = saving._less_written

    def less_and_wrong(slots, fold):
        with monkeypatch.context() as patch:
            patch.setattr(nblora.DeltaLoRAAdapter, "as_factors", wrong)
            return less(slots, fold)

    monkeypatch.setattr(saving, "_less_written", less_and_wrong)
    with pytest.raises(FormatError, match="computes something else than the model"):
        model.save_adapter(tmp_path / "adapter", fold_delta=fold)


def test_an_adapter_of_another_base_changes_nothing():
    model = nblora.load_pretrained(FIXTURES / "llama_clm_all" / "base")
    with pytest.raises(FormatError, match=r"adapts 'bert\.encoder.*model has the layers"):
        model.load_adapter(FIXTURES / "bert_cls_qv" / "adapter")
    assert adapters_of(model) == []


def test_a_saved_folder_is_as_the_source(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(base("resnet_conv"), source)
    (source / "preprocessor_config.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    model = nblora.load_pretrained(source)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "preprocessor_config.json").read_text() == "{}"
    assert (tmp_path / "saved" / "1_Pooling" / "config.json").is_file()
    with (
        SafetensorsFile(source / "model.safetensors") as first,
        SafetensorsFile(tmp_path / "saved" / "model.safetensors") as second,
    ):
        assert set(first.tensors) == set(second.tensors)
        for name in first.tensors:
            np.testing.assert_array_equal(first.array(name), second.array(name))
    with pytest.raises(ValueError, match=r"has adapters.*merge\(\)"):
        model.adapt("convolution", rank=1).save_pretrained(tmp_path / "other")


def test_a_tied_head_is_saved_once_and_untied_where_it_was_merged(tmp_path, rng):
    model = nblora.load_pretrained(base("gpt2_clm"))
    model.save_pretrained(tmp_path / "tied")
    with SafetensorsFile(tmp_path / "tied" / "model.safetensors") as file:
        assert "lm_head.weight" not in file.tensors
    assert "lm_head.weight" not in model.parameter_names()
    merged = shaken(model.adapt("wte", rank=2, seed=0), rng).merge()
    np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "untied")
    np.testing.assert_allclose(nblora.load_pretrained(tmp_path / "untied")(IDS), merged(IDS), rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False


def test_print_trainable_parameters_and_repr(capsys):
    model = nblora.load_pretrained(BERT).adapt("query", rank=2)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 267 || all params: 13,019 ||")
    assert repr(model) == "TextModel('bert', 'sequence-classification', 13,019 parameters, 2 adapters)"
    figures = model.diagnostics()
    assert figures["model_type"] == "bert"
    assert figures["non_finite_count"] == 0


@pytest.mark.parametrize(
    "case", ["bert_cls_qv", "roberta_cls", "llama_clm_all", "gpt2_clm", "vit_cls_qv", "resnet_early"]
)
def test_full_fine_tuning_has_the_slopes_of_central_differences(rng, case):
    """Of every kind of parameter of every family: some entries of each."""
    model, inputs = nblora.load_pretrained(base(case), dtype="float64").unfreeze(), inputs_of(case)
    weights = rng.normal(size=model(**inputs).shape)
    model.train()
    model(**inputs)
    model.backward(weights)
    gradients = {n: p.logical(p.gradient) for n, p, trained in model._parameters() if trained}
    model.eval()
    names = [n for n in gradients if "layer.1." not in n and "h.1." not in n and "layers.1." not in n]
    for name in names:
        value = model.get_parameter(name)
        flat, place = value.reshape(-1), int(rng.integers(value.size))
        if "embeddings" in name or "embed" in name or "wte" in name:
            place = int(np.abs(gradients[name]).argmax())
        slopes = []
        for step in (1e-6, -1e-6):
            moved = flat.copy()
            moved[place] += step
            model.set_parameter(name, moved.reshape(value.shape))
            slopes.append(float((model(**inputs) * weights).sum()))
        model.set_parameter(name, value)
        measured, found = (slopes[0] - slopes[1]) / 2e-6, gradients[name].reshape(-1)[place]
        assert found == pytest.approx(measured, rel=1e-5, abs=1e-5 * max(1, np.abs(gradients[name]).max())), name


def test_freezing_and_unfreezing():
    model = nblora.load_pretrained(BERT).unfreeze("encoder.layer.1.output.dense")
    assert model.parameter_count == 24 * 40 + 24
    model.unfreeze()
    assert model.parameter_count == sum(int(np.prod(p.shape)) for _, p, _ in model._parameters())
    assert model.freeze().parameter_count == 0
    with pytest.raises(ValueError, match="matches none"):
        model.unfreeze("quark")


def test_what_whole_models_do_not_do():
    model = nblora.load_pretrained(BERT)
    with pytest.raises(NotImplementedError, match="save_pretrained"):
        model.to_onnx("model.onnx")
    with pytest.raises(ValueError, match=r"adapt the layers in it \(model\.adapt\)"):
        nblora.LoRAAdapter(model, 2)
    assert model.compile() is model


def test_a_closed_model_says_so():
    model = nblora.load_pretrained(BERT)
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model(IDS)
    assert repr(model) == "TextModel(closed)"
