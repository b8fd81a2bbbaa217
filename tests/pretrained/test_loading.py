"""Folders as they come, and what is wrong with them: a message that names file, tensor or field; nothing foreign."""

import contextlib
import json
import shutil
import warnings

import numpy as np
import pytest

import nblora
from nblora.errors import FormatError
from nblora.storage.safetensors_reader import SafetensorsFile
from nblora.storage.safetensors_writer import write_safetensors
from tests.pretrained.support import FIXTURES
from tests.processes import run

BERT, LLAMA = FIXTURES / "bert_cls_qv" / "base", FIXTURES / "llama_clm_all" / "base"
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
IDS = [[5, 6, 7], [8]]


def tensors_of(folder):
    with SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.array(name) for name in file.tensors}


@pytest.fixture
def folder(tmp_path):
    """Make a folder of a fixture's base with another configuration, tensors or files."""

    def make(base=BERT, *, tensors=None, without=(), files=None, **config):
        target = tmp_path / "model"
        shutil.copytree(base, target, dirs_exist_ok=True)
        raw = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in without}))
        if tensors is not None:
            held = tensors_of(base)
            write_safetensors(target / "model.safetensors", tensors(held) or held, {"format": "pt"})
        for name, content in (files or {}).items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_text(json.dumps(content))
        return target

    return make


# --- what is there -----------------------------------------------------------------------------------------------


def test_names_are_those_of_the_class_and_nothing_is_trained():
    model = nblora.load_pretrained(BERT)
    assert set(model.parameter_names()) == set(tensors_of(BERT))
    assert model.parameter_count == 0
    assert not model.training
    assert "bert.encoder.layer.0.attention.self.query.weight" in repr(model.parameter_names())


def test_a_bare_encoder_is_an_embedding_under_the_names_of_its_class(folder):
    def bare(held):
        return {n.removeprefix("bert."): t for n, t in held.items() if not n.startswith("classifier")}

    path = folder(tensors=bare, architectures=["BertModel"])
    model = nblora.load_pretrained(path)
    assert model.task == "embedding"
    assert "bert.encoder.layer.1.output.dense.bias" in model.parameter_names()
    with pytest.warns(UserWarning, match="not used for 'embedding': classifier.bias, classifier.weight"):
        whole = nblora.load_pretrained(BERT, task="embedding")
    np.testing.assert_array_equal(model(IDS), whole(IDS))
    with_head = nblora.load_pretrained(path, task="sequence-classification", num_labels=5, seed=3)
    assert [n for n, _, t in with_head._parameters() if t] == ["classifier.weight", "classifier.bias"]
    assert with_head(IDS).shape == (2, 5)
    again = nblora.load_pretrained(path, task="sequence-classification", num_labels=5, seed=3)
    np.testing.assert_array_equal(
        again.get_parameter("classifier.weight"), with_head.get_parameter("classifier.weight")
    )
    assert 0.01 < with_head.get_parameter("classifier.weight").std() < 0.03
    assert len(with_head.config["id2label"]) == 5


def test_old_names_of_norms(folder):
    def old(held):
        return {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in held.items()}

    np.testing.assert_array_equal(nblora.load_pretrained(folder(tensors=old))(IDS), nblora.load_pretrained(BERT)(IDS))


def test_the_names_of_transformers_5_in_a_file(folder):
    base = FIXTURES / "vit_cls_qv" / "base"
    new = {
        "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "encoder.layer": "layers",
    }  # fmt: skip

    def renamed(held):
        result = {}
        for name, tensor in held.items():
            for old, called in new.items():
                name = name.replace(old, called)
            result[name] = tensor
        return result

    pixels = np.random.default_rng(0).standard_normal((2, 3, 12, 12))
    model = nblora.load_pretrained(folder(base, tensors=renamed))
    np.testing.assert_array_equal(model(pixels), nblora.load_pretrained(base)(pixels))


def test_shards_with_an_index(folder):
    def halves(held):
        names = sorted(held)
        write_safetensors(path / "model-00001-of-00002.safetensors", {n: held[n] for n in names[:9]}, {})
        write_safetensors(path / "model-00002-of-00002.safetensors", {n: held[n] for n in names[9:]}, {})
        places = {n: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, n in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    path = folder()
    halves(tensors_of(BERT))
    (path / "model.safetensors").unlink()
    np.testing.assert_array_equal(nblora.load_pretrained(path)(IDS), nblora.load_pretrained(BERT)(IDS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_numbers_are_widened_exactly(tmp_path, dtype):
    nblora.load_pretrained(BERT).save_pretrained(tmp_path / "narrow", dtype=dtype)
    narrow, wide = (
        nblora.load_pretrained(tmp_path / "narrow"),
        nblora.load_pretrained(tmp_path / "narrow", dtype="float64"),
    )
    for name in narrow.parameter_names():
        np.testing.assert_array_equal(narrow.get_parameter(name), wide.get_parameter(name))
    assert narrow.config["dtype"] == dtype


def test_mapped_tensors_are_copied_where_they_are_written(folder):
    path = folder()
    model = nblora.load_pretrained(path, mmap=True)
    before = tensors_of(path)
    np.testing.assert_array_equal(model(IDS), nblora.load_pretrained(BERT)(IDS))
    model.unfreeze("classifier")
    nblora.fit(model, IDS, [0, 1], epochs=1)
    for name, tensor in tensors_of(path).items():
        np.testing.assert_array_equal(tensor, before[name])


@pytest.mark.parametrize(
    ("pooling", "rows"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling_as_the_folder_says(folder, pooling, rows):
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    with pytest.warns(UserWarning, match=r"not used for 'embedding': classifier\.bias, classifier\.weight"):
        model = nblora.load_pretrained(folder(files={"modules.json": modules, "1_Pooling/config.json": pooling}))
    with pytest.warns(UserWarning, match="not used"):
        plain = nblora.load_pretrained(BERT, task="embedding")
    assert model.task == "embedding"
    hidden = plain.body._forward(plain._as_input("x", IDS), _run(plain, IDS))
    parts = {"first": hidden[[0, 3]], "last": hidden[[2, 3]], "mean": np.stack([hidden[:3].mean(0), hidden[3]])}[rows]
    exact = parts / np.linalg.norm(parts, axis=1, keepdims=True)
    np.testing.assert_allclose(model(IDS), exact, rtol=1e-5, atol=1e-6)


def _run(model, ids):
    from nblora.layers.run import Run, Sequences

    found = Run(model._backend)
    found.sequences = Sequences.of([len(each) for each in ids])
    return found


def test_a_square_projection_is_loaded_the_right_way_round():
    """Turned, each of these square weights would give other logits, by far more than rounding."""
    held = np.load(FIXTURES / "bert_cls_qv" / "io.npz")
    model = nblora.load_pretrained(BERT, dtype="float64")
    for name in model.parameter_names():
        shape = model.parameter_shape(name)
        if len(shape) == 2 and shape[0] == shape[1]:
            turned = nblora.load_pretrained(BERT, dtype="float64")
            turned.set_parameter(name, model.get_parameter(name).T)
            apart = np.abs(turned(held["input_ids"], held["attention_mask"]) - held["logits0"]).max()
            assert apart > 1e-4, name


# --- what is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "config", "message"),
    [
        (BERT, {"model_type": "t5"}, r"config\.json: model_type is 't5'; .* bert, distilbert, gpt2"),
        (BERT, {"model_type": None}, "model_type is None"),
        (BERT, {"hidden_act": "mish"}, "hidden_act is 'mish'; supported are gelu"),
        (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        (BERT, {"is_decoder": True}, "is_decoder is True"),
        (BERT, {"hidden_size": "24"}, "hidden_size is '24'; expected an integer"),
        (BERT, {"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide hidden_size"),
        (BERT, {"num_hidden_layers": 10**30}, "num_hidden_layers is 1e\\+30"),
        (BERT, {"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        (BERT, {"quantization_config": {"bits": 4}}, "quantization_config is .*: a quantisation is not supported"),
        (BERT, {"architectures": ["BertForMaskedLM"]}, "architectures names 'BertForMaskedLM', .* choose by task="),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        (LLAMA, {"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        (LLAMA, {"head_dim": 5}, "a head has 5 features"),
        (LLAMA, QWEN | {"use_sliding_window": True}, "use_sliding_window is True"),
        (LLAMA, QWEN | {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ],
)
def test_a_configuration_that_asks_for_something_else(folder, base, config, message):
    with pytest.raises(FormatError, match=message):
        nblora.load_pretrained(folder(base, **config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda held: held.__delitem__("bert.encoder.layer.1.output.dense.weight"),
            r"1\.output\.dense\.weight is missing",
        ),
        (
            lambda held: held.update({"bert.pooler.dense.bias": np.zeros(5, "f4")}),
            r"pooler\.dense\.bias has shape \(5,\)",
        ),
        (
            lambda held: held.update({"bert.encoder.layer.7.x": np.zeros(5, "f4")}),
            "does not have: bert.encoder.layer.7.x",
        ),
        (lambda held: held.update({"classifier.bias": np.zeros(3, "i8")}), r"classifier\.bias is I64"),
    ],
)
def test_tensors_that_are_missing_wrong_or_unknown(folder, change, message):
    with pytest.raises(FormatError, match=message):
        nblora.load_pretrained(folder(tensors=change))


def test_every_missing_tensor_is_listed_with_the_nearest_name(folder):
    def change(held):
        held["bert.encoder.layer.0.attention.self.qery.weight"] = held.pop(
            "bert.encoder.layer.0.attention.self.query.weight"
        )
        del held["bert.embeddings.LayerNorm.bias"]

    with pytest.raises(FormatError, match=r"LayerNorm\.bias is missing.*self\.query\.weight is missing \(.*qery"):
        nblora.load_pretrained(folder(tensors=change))


def test_other_heads_are_named_once(folder):
    path = folder(tensors=lambda held: held.update({"cls.predictions.bias": np.zeros(97, "f4")}))
    with pytest.warns(UserWarning, match=r"not used for 'sequence-classification': cls\.predictions\.bias"):
        nblora.load_pretrained(path)


def test_known_buffers_are_ignored(folder):
    buffers = {"bert.embeddings.position_ids": np.arange(32)[None]}
    nblora.load_pretrained(folder(tensors=lambda held: held.update(buffers)))


def test_pickles_are_refused_with_the_remedy(folder):
    path = folder()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        nblora.load_pretrained(path)


def test_places_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError):
        nblora.load_pretrained(tmp_path / "none")
    with pytest.raises(FormatError, match="no safetensors file"):
        nblora.load_pretrained(tmp_path)
    with pytest.raises(FormatError, match="expected a folder"):
        nblora.load_pretrained(BERT / "config.json")
    shutil.copy(BERT / "model.safetensors", tmp_path)
    with pytest.raises(FormatError, match=r"no config\.json"):
        nblora.load_pretrained(tmp_path)


def test_arguments():
    with pytest.raises(ValueError, match="task must be one of"):
        nblora.load_pretrained(BERT, task="translation")
    with pytest.raises(
        FormatError, match="can be loaded for 'sequence-classification', 'embedding', not for 'causal-lm'"
    ):
        nblora.load_pretrained(BERT, task="causal-lm")
    with pytest.raises(ValueError, match="num_labels is for a classification"):
        nblora.load_pretrained(LLAMA, num_labels=2)
    with pytest.raises(ValueError, match="float32 or float64"):
        nblora.load_pretrained(BERT, dtype="int8")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_configurations_are_format_errors(folder, seed):
    rng = np.random.default_rng(seed)
    raw = json.loads((BERT / "config.json").read_text())
    key = rng.choice(sorted(raw))
    values = [None, -1, 0, 1e400, "x", [], {}, True, 2**70, [1, "a"], {"a": {}}]
    path = folder(**{key: values[int(rng.integers(len(values)))]})
    with warnings.catch_warnings(), contextlib.suppress(FormatError):
        warnings.simplefilter("ignore", UserWarning)  # of heads that another task leaves
        nblora.load_pretrained(path)


# --- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[5, 97]],), IndexError, r"input_ids must hold integers from 0 to 96, got 97 at \(0, 1\)"),
        (([[5], [6, -1]],), IndexError, r"got -1 at \(1, 1\)"),
        (([[5.0, 6.0]],), TypeError, "must hold integers"),
        (([],), ValueError, "at least one sequence"),
        (([[5], []],), ValueError, "sequence 1 has none"),
        ((np.full((2, 33), 5),), ValueError, "33 tokens in sequence 0, and the model has 32 positions"),
        ((np.full((2, 3), 5), [[1, 1, 1], [0, 1, 1]]), ValueError, r"0 at the left in sequence 1: pad at the right"),
        ((np.full((2, 3), 5), [[1, 0, 1], [1, 1, 1]]), ValueError, "0 between tokens in sequence 0"),
        ((np.full((2, 3), 5), [[1, 1], [1, 1]]), ValueError, "attention_mask must have the shape of input_ids"),
        ((np.full((2, 3), 5), [[1, 2, 0], [1, 1, 1]]), ValueError, "0 and 1"),
        ((np.full((1, 3), 5), None, [[0, 2, 0]]), IndexError, "token_type_ids must hold integers from 0 to 1"),
        ((np.full((1, 3), 5), None, [[0, 1]]), ValueError, "token_type_ids must have the shape of input_ids"),
        ((np.full((1, 2, 3), 5),), ValueError, r"\(batch, length\)"),
    ],
)
def test_tokens_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        nblora.load_pretrained(BERT)(*arguments)


def test_images_that_do_not_fit():
    vit = nblora.load_pretrained(FIXTURES / "vit_cls_qv" / "base")
    with pytest.raises(ValueError, match=r"\(batch, 3, 12, 12\), got \(1, 3, 16, 16\)"):
        vit(np.zeros((1, 3, 16, 16)))
    with pytest.raises(ValueError, match="at least one image"):
        vit(np.zeros((0, 3, 12, 12)))
    resnet = nblora.load_pretrained(FIXTURES / "resnet_conv" / "base")
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
        resnet(np.zeros((1, 1, 20, 20)))
    assert resnet(np.zeros((2, 3, 33, 29))).shape == (2, 3)


def test_padded_listed_and_alone_are_the_same():
    model = nblora.load_pretrained(LLAMA)
    ids, mask = np.array([[5, 6, 7, 8], [9, 3, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = model(ids, mask)
    np.testing.assert_array_equal(padded, model([[5, 6, 7, 8], [9, 3]]))
    assert not padded[1, 2:].any()
    np.testing.assert_allclose(padded[1, :2], model([[9, 3]])[0], rtol=1e-5, atol=1e-6)


def test_importing_nblora_does_not_load_families():
    code = "import sys, nblora; print([m for m in sys.modules if m.startswith('nblora.pretrained')])"
    assert run(code).stdout == "[]\n"
