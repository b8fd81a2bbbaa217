"""`nblora merge` of what `nblora finetune` wrote, where the base's files lack the head, or are a GGUF file."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import nblora
from nblora.cli import main
from nblora.text.labels import read_labels

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

from tests.text.folders import chat_file

from . import support


def merge(*arguments):
    return CliRunner().invoke(main, ["merge", *map(str, arguments)])


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_base_without_a_head(tmp_path, method):
    model = support.encoder(tmp_path / "bert")
    data = support.write(tmp_path / "pets.jsonl", support.labelled(20))
    nblora.finetune(model, data, tmp_path / "out", method=method, rank=2, lr=0.01, epochs=2)
    done = merge(model, "--adapter", tmp_path / "out", "--output", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "a sequence-classification model (pets, tax)" in done.stdout
    assert read_labels(tmp_path / "merged") == ["pets", "tax"]
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "pets", "1": "tax"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    whole = nblora.load_pretrained(tmp_path / "merged", task="sequence-classification")
    adapted = nblora.load_pretrained(model, task="sequence-classification", num_labels=2).load_adapter(tmp_path / "out")
    texts = nblora.load_tokenizer(tmp_path / "merged").encode(["the cat", "tax law has"]).ids
    np.testing.assert_allclose(whole(texts), adapted(texts), atol=1e-5)
    refused = merge(model, "--adapter", tmp_path / "out", "--output", tmp_path / "other", "--shard-size", "5GB")
    assert refused.exit_code == 2
    assert "shard-size is for checkpoints that are merged as they lie" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_a_gguf_file(tmp_path):
    path = tmp_path / "chat.gguf"
    chat_file(path)
    data = support.write(tmp_path / "texts.jsonl", [{"text": "the sky is blue"}, {"text": "the sea is deep"}] * 4)
    result = nblora.finetune(path, data, tmp_path / "out", rank=2, lr=0.01, epochs=2, target="q_proj,v_proj")
    done = CliRunner().invoke(main, result.commands[1].replace("MERGED", str(tmp_path / "merged")).split()[1:])
    assert done.exit_code == 0, done.output
    assert "a causal-lm model, 4 layers merged" in done.stdout
    whole = nblora.load_pretrained(tmp_path / "merged")
    adapted = nblora.load_pretrained(path).load_adapter(tmp_path / "out")
    np.testing.assert_allclose(whole([[5, 6, 7]]), adapted([[5, 6, 7]]), atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_language_model_is_merged_as_it_lies(tmp_path):
    model = support.language_model(tmp_path / "llama")
    data = support.write(tmp_path / "yes.jsonl", support.completions(12))
    nblora.finetune(model, data, tmp_path / "out", rank=2, lr=0.01, epochs=1)
    done = merge(model, "--adapter", tmp_path / "out", "--output", tmp_path / "merged", "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["tensors"]) == 14
    whole = nblora.load_pretrained(tmp_path / "merged")
    adapted = nblora.load_pretrained(model).load_adapter(tmp_path / "out")
    np.testing.assert_allclose(whole([[5, 6, 7]]), adapted([[5, 6, 7]]), atol=1e-4)
