"""Names that only PEFT's files have: wrapped modules, copies of embeddings, biases that a model shares."""

import json

import ml_dtypes
import numpy as np
import pytest

from nblora.errors import FormatError
from nblora.weights import merge
from tests.weights.support import exact_change, linear_factors, read_file, read_model, write_adapter, write_file


def write_model(folder, tensors, **config):
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def classifier(tmp_path, rng):
    """A base with a classifier that an adapter with `bias="all"` replaces, and the adapter's factors."""
    names = {"net.weight": (6, 5), "net.bias": (6,), "classifier.weight": (3, 6), "classifier.bias": (3,)}
    base = {name: rng.standard_normal(shape) for name, shape in names.items()}
    return write_model(tmp_path / "base", base), linear_factors(rng, "net", 6, 5)


@pytest.mark.parametrize("wrapper", ["modules_to_save", "modules_to_save.default"])
def test_biases_that_peft_saves_three_times_are_one(wrapper, classifier, tmp_path, rng):
    base, factors = classifier
    weight, bias = rng.standard_normal((3, 6)), rng.standard_normal(3)
    tensors = factors | {
        "net.base_layer.bias": np.ones(6),
        "classifier.weight": weight,
        "classifier.bias": bias,
        f"classifier.{wrapper}.bias": bias,
        "classifier.original_module.bias": np.zeros(3),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, bias="all", modules_to_save=["classifier"])
    merge(base, adapter, tmp_path / "out")
    result = read_model(tmp_path / "out")
    np.testing.assert_array_equal(result["classifier.weight"], weight)
    np.testing.assert_array_equal(result["classifier.bias"], bias)
    np.testing.assert_array_equal(result["net.bias"], np.ones(6))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"classifier.bias": np.ones(3), "classifier.modules_to_save.bias": np.zeros(3)}, "different numbers"),
        ({"classifier.original_module.bias": np.zeros(3)}, "nothing replaces classifier.bias"),
        ({"classifier.lora_head.weight": np.zeros((3, 6))}, "not a tensor of a LoRA adapter"),
    ],
)
def test_copies_that_disagree_and_unknown_parts_are_refused(more, words, classifier, tmp_path):
    base, factors = classifier
    with pytest.raises(FormatError, match=words):
        merge(base, write_adapter(tmp_path / "adapter", factors | more), tmp_path / "out")


def test_a_saved_module_may_be_called_like_a_part_of_lora(tmp_path, rng):
    base = write_model(tmp_path / "base", {"net.weight": np.zeros((6, 5)), "lora_head.weight": np.zeros((3, 6))})
    head = rng.standard_normal((3, 6))
    tensors = linear_factors(rng, "net", 6, 5) | {"lora_head.weight": head}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lora_head"])
    merge(base, adapter, tmp_path / "out")
    np.testing.assert_array_equal(read_model(tmp_path / "out")["lora_head.weight"], head)


@pytest.mark.parametrize("stored_twice", [False, True])
@pytest.mark.parametrize("copied", [np.float32, ml_dtypes.bfloat16])
def test_a_tied_head_with_its_saved_copy_is_merged(copied, stored_twice, tmp_path, rng):
    """PEFT saves the weight of an adapted head or embedding along with the factors, in the adapter's own dtype."""
    embedding = rng.standard_normal((9, 5)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(5, np.float32)}
    if stored_twice:
        tensors["lm_head.weight"] = embedding
    base = write_model(tmp_path / "base", tensors, tie_word_embeddings=True)
    factors = linear_factors(rng, "lm_head", 9, 5)
    adapter = write_adapter(tmp_path / "adapter", factors | {"lm_head.base_layer.weight": embedding.astype(copied)})
    merge(base, adapter, tmp_path / "out", dtype="float64")
    result = read_model(tmp_path / "out")
    exact = embedding.astype(copied).astype(np.float64) + exact_change(factors, "lm_head", 2.0)
    for name in tensors.keys() - {"model.norm.weight"}:
        np.testing.assert_allclose(result[name], exact, rtol=1e-12, atol=1e-12)


def test_an_unchanged_copy_of_an_embedding_does_not_forbid_weights(tmp_path, rng):
    embedding = rng.standard_normal((9, 5))
    base = write_model(tmp_path / "base", {"model.embed_tokens.weight": embedding, "net.weight": np.zeros((6, 5))})
    factors = linear_factors(rng, "net", 6, 5)
    copy = {"model.embed_tokens.base_layer.weight": embedding}
    merge(base, (write_adapter(tmp_path / "adapter", factors | copy), 0.5), tmp_path / "out")
    result = read_model(tmp_path / "out")
    np.testing.assert_array_equal(result["model.embed_tokens.weight"], embedding)
    np.testing.assert_allclose(result["net.weight"], exact_change(factors, "net", 1.0), rtol=1e-12)


def test_the_decoder_of_a_masked_language_model_shares_weight_and_bias(tmp_path, rng):
    names = {"bert.embeddings.word_embeddings.weight": (9, 5), "cls.predictions.bias": (9,), "net.weight": (6, 5)}
    base = {name: rng.standard_normal(shape) for name, shape in names.items()}
    decoder, bias = "cls.predictions.decoder", rng.standard_normal(9)
    tensors = linear_factors(rng, decoder, 9, 5)
    more = {f"{decoder}.base_layer.bias": bias, "cls.predictions.bias": bias}
    adapter = write_adapter(tmp_path / "adapter", tensors | more, bias="all")
    merge(write_model(tmp_path / "base", base, model_type="bert"), adapter, tmp_path / "out")
    result = read_model(tmp_path / "out")
    embedding = base["bert.embeddings.word_embeddings.weight"] + exact_change(tensors, decoder, 2.0)
    np.testing.assert_allclose(result["bert.embeddings.word_embeddings.weight"], embedding, rtol=1e-12)
    np.testing.assert_array_equal(result["cls.predictions.bias"], bias)


def test_a_bias_of_a_tied_decoder_gets_its_lora_bias(tmp_path, rng):
    base = write_file(
        tmp_path / "base.safetensors", {"lm_head.bias": np.ones(9), "lm_head.decoder.weight": np.zeros((9, 5))}
    )
    tensors = linear_factors(rng, "lm_head.decoder", 9, 5) | {"lm_head.decoder.lora_B.bias": np.arange(9.0)}
    merge(base, write_adapter(tmp_path / "adapter", tensors, lora_bias=True), tmp_path / "out.safetensors")
    np.testing.assert_allclose(read_file(tmp_path / "out.safetensors")["lm_head.bias"], 1 + 2 * np.arange(9.0))


@pytest.mark.parametrize("value", [3, 0.5, "fast"])
def test_a_number_or_text_of_an_unknown_field_is_reported(value, classifier, tmp_path):
    base, factors = classifier
    report = merge(base, write_adapter(tmp_path / "adapter", factors, magic=value), tmp_path / "out")
    assert any("magic" in warning and repr(value) in warning for warning in report.warnings)
