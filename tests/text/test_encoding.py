"""Sentence embeddings: those of a forward of each text alone, in the order of the texts."""

import json
import shutil

import numpy as np
import pytest

import nblora
from nblora.errors import FormatError
from tests.pretrained.support import FIXTURES
from tests.text.folders import LETTERS as WORDS
from tests.text.folders import sentence_folder

pytest.importorskip("tokenizers")

TEXTS = ["a b c", "", "z", "q r s t u v w x y z a b c d e f", "b", "A B C", "k l m n o p q"]


@pytest.fixture
def model(tmp_path):
    """Load the fixture with a vocabulary and with what sentence-transformers would say of it."""

    def make(longest=None, modules=("Transformer", "Pooling", "Normalize"), prompts=None, pooling=None, **settings):
        folder = sentence_folder(tmp_path / "model", WORDS, modules)
        rows = {"pooling_mode_mean_tokens": True, **(pooling or {})}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(rows))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest, **settings}))
        if prompts is not None:
            (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
        return nblora.load_pretrained(folder, dtype="float64")

    return make


def ids_of(text, longest=10**6):
    inside = [WORDS.index(letter) for letter in text.lower().split()]
    return [2, *inside[: longest - 2], 3]


def rows_of(model, texts, longest=10**6):
    """Each text alone, by ids that were made by hand."""
    return np.concatenate([model([ids_of(text, longest)]) for text in texts])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_embeddings_are_those_of_each_text_alone(model, batch_size):
    loaded = model()
    found = nblora.encode(loaded, TEXTS, batch_size=batch_size)
    assert found.shape == (len(TEXTS), loaded.out_features)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, rows_of(loaded, TEXTS), atol=1e-12)
    np.testing.assert_allclose(found[0], found[5], atol=1e-12)


def test_texts_are_cut_at_what_the_folder_says_or_at_the_positions(model):
    loaded, long = model(longest=5), ["a b c d " * 500]
    np.testing.assert_allclose(nblora.encode(loaded, TEXTS), rows_of(loaded, TEXTS, 5), atol=1e-12)
    loaded = model()
    np.testing.assert_allclose(nblora.encode(loaded, long), rows_of(loaded, long, loaded.body.longest), atol=1e-12)
    np.testing.assert_allclose(
        nblora.encode(model(longest=10**6), long), rows_of(loaded, long, loaded.body.longest), atol=1e-12
    )
    with pytest.raises(FormatError, match="max_seq_length is 0; expected a positive integer"):
        nblora.encode(model(longest=0), TEXTS)


def test_lower_case_and_a_prompt_are_as_the_folder_says(model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    unknown = nblora.encode(model(), ["A B", "[UNK] [UNK]"])
    np.testing.assert_allclose(unknown[0], unknown[1], atol=1e-12)
    loaded = model(do_lower_case=True)
    np.testing.assert_allclose(nblora.encode(loaded, ["A B"]), rows_of(loaded, ["a b"]), atol=1e-12)
    prompts = {"prompts": {"query": "q r: "}, "default_prompt_name": "query"}
    found = nblora.encode(model(prompts=prompts), ["a b"])
    wanted = nblora.encode(model(prompts={"default_prompt_name": None}), ["q r: a b"])
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    with pytest.raises(FormatError, match="include_prompt is False"):
        nblora.encode(model(prompts=prompts, pooling={"include_prompt": False}), ["a"])
    with pytest.raises(FormatError, match="default_prompt_name is 'x'"):
        nblora.encode(model(prompts={"prompts": {}, "default_prompt_name": "x"}), ["a"])


def test_an_adapted_model_is_evaluated_and_its_mode_comes_back(model):
    loaded = model()
    loaded.adapt("all-linear", rank=2, lora_dropout=0.5, seed=0)
    loaded.train()
    for name in loaded.parameter_names():
        if name.endswith("lora_B"):
            loaded.set_parameter(name, np.full_like(loaded.get_parameter(name), 0.1))
    found = nblora.encode(loaded, TEXTS)
    assert loaded.training
    np.testing.assert_array_equal(found, nblora.encode(loaded, TEXTS))
    assert abs(found - nblora.encode(model(), TEXTS)).max() > 1e-3


def test_no_texts_and_what_is_none(model, tmp_path):
    loaded = model()
    assert nblora.encode(loaded, []).shape == (0, loaded.out_features)
    with pytest.raises(TypeError, match="texts must be a list of texts, got str"):
        nblora.encode(loaded, "a")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        nblora.encode(loaded, TEXTS, batch_size=0)
    with pytest.raises(
        ValueError, match="model must be one of the task 'embedding', got a model of the task 'causal-lm'"
    ):
        nblora.encode(nblora.load_pretrained(FIXTURES / "llama_clm_all" / "base"), TEXTS)
    with pytest.raises(ValueError, match="got Dense"):
        nblora.encode(nblora.Dense.random(3, 2), TEXTS)
    (tmp_path / "model" / "vocab.txt").unlink()
    with pytest.raises(FormatError, match=r"holds no tokenizer.json"):
        nblora.encode(loaded, TEXTS)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match="which is not there: its tokenizer is needed"):
        nblora.encode(loaded, TEXTS)


def test_a_saved_model_encodes_by_the_tokenizer_of_its_folder(model, tmp_path):
    loaded = model()
    loaded.save(tmp_path / "model.nblora")
    found = nblora.encode(nblora.load(tmp_path / "model.nblora"), TEXTS)
    np.testing.assert_array_equal(found, nblora.encode(loaded, TEXTS))
    loaded.save_pretrained(tmp_path / "saved")
    again = nblora.encode(nblora.load_pretrained(tmp_path / "saved", dtype="float64"), TEXTS)
    np.testing.assert_allclose(again, found, atol=1e-12)
