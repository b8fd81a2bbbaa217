"""`nblora predict` and `nblora generate`, and what they are made of."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("tokenizers")

import nblora
from nblora.cli import main
from nblora.pretrained.labels import labels_of, name_labels
from nblora.text.answering import prompt_ids, stream_text
from nblora.text.labels import write_labels
from nblora.text.predicting import load_predictor
from tests.text.folders import chat_file, sentence_folder

TEXTS = ["the cat sat on the mat", "tax law on tax", "cat", "the law has tax", "mat cat sat on on on law"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A bare encoder, an adapter of it with labels, and a causal model."""
    place = tmp_path_factory.mktemp("models")
    sentence_folder(place / "encoder")
    model = nblora.load_pretrained(place / "encoder", task="sequence-classification", num_labels=3, seed=4)
    model.adapt("all-linear", rank=2, seed=5)
    rng = np.random.default_rng(6)
    for name in model.parameter_names():
        if name.endswith(("lora_B", "classifier.weight")):
            model.set_parameter(name, rng.normal(size=model.parameter_shape(name)))
    logits = model(nblora.load_tokenizer(place / "encoder").encode(TEXTS).ids)
    model.set_parameter("classifier.bias", model.get_parameter("classifier.bias") - logits.mean(0))  # several win
    model.save_adapter(place / "adapter")
    write_labels(place / "adapter", ["law", "pet", "other"])
    name_labels(model, ["law", "pet", "other"])
    model.merge().save_pretrained(place / "merged")
    write_labels(place / "merged", ["law", "pet", "other"])
    return place, model


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    pytest.importorskip("gguf")
    return chat_file(tmp_path_factory.mktemp("causal") / "chat.gguf")


def run(*words, code=0, **options):
    result = CliRunner().invoke(main, [str(word) for word in words], **options)
    assert result.exit_code == code, result.output
    return result


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- predict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_labels_and_probabilities_in_the_order_of_the_records(models, tmp_path, merged):
    place, model = models
    data = write(tmp_path / "new.jsonl", [{"text": text} for text in TEXTS])
    where = ["--model", place / "merged"] if merged else ["--model", place / "encoder", "--adapter", place / "adapter"]
    run("predict", *where, "--data", data, "--output", tmp_path / "found.jsonl", "--batch-size", 2)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    logits = model(nblora.load_tokenizer(place / "encoder").encode(TEXTS).ids).astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = ["law", "pet", "other"]
    assert [row["text"] for row in found] == TEXTS
    assert [row["label"] for row in found] == [names[best] for best in logits.argmax(1)]
    assert len({row["label"] for row in found}) > 1
    assert all(list(row["probabilities"]) == names for row in found)
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in found], wanted, atol=1e-4)


def test_standard_output_holds_records_and_nothing_else(models, tmp_path):
    place, _ = models
    data = tmp_path / "new.csv"
    data.write_text("text,label\nthe cat,pet\ntax law,law\n")
    result = run("predict", "--model", place / "merged", "--data", data)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    right = sum(row["label"] == label for row, label in zip(rows, ["pet", "law"], strict=True))
    assert f"{right} of 2 as labelled" in result.stderr
    assert all("label" in row and "probabilities" in row for row in rows)
    assert run("predict", "--model", place / "merged", "--data", data, "--quiet").stderr == ""


def test_pairs_are_read_as_pairs(models, tmp_path):
    place, model = models
    pairs = [("the cat", "law"), ("law", "the cat")]
    data = write(tmp_path / "pairs.jsonl", [{"text": first, "text_pair": second} for first, second in pairs])
    result = run("predict", "--model", place / "encoder", "--adapter", place / "adapter", "--data", data, "--quiet")
    shares = [list(json.loads(line)["probabilities"].values()) for line in result.stdout.splitlines()]
    encoding = nblora.load_tokenizer(place / "encoder").encode(*map(list, zip(*pairs, strict=True)))
    logits = model(encoding.ids, token_type_ids=encoding.kinds).astype(np.float64)
    np.testing.assert_allclose(shares, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-4)


def test_embeddings_where_there_are_no_labels(models, tmp_path):
    place, _ = models
    data = write(tmp_path / "new.jsonl", [{"text": text} for text in TEXTS])
    result = run("predict", "--model", place / "encoder", "--data", data)
    rows = [json.loads(line)["embedding"] for line in result.stdout.splitlines()]
    wanted = nblora.encode(nblora.load_pretrained(place / "encoder"), TEXTS)
    np.testing.assert_allclose(rows, wanted, atol=1e-5)


def test_texts_are_cut_as_in_training(models, tmp_path):
    place, _ = models
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "finetune.json").write_text(json.dumps({"settings": {"max_length": 4}}))
    short = load_predictor(place / "encoder", tmp_path / "adapter")
    assert (short.max_length, load_predictor(place / "encoder", place / "adapter").max_length) == (4, 32)
    assert load_predictor(place / "encoder", tmp_path / "adapter", max_length=9).max_length == 9
    np.testing.assert_array_equal(short.outputs(["the cat sat"]), short.outputs(["the cat law law"]))


def test_a_model_says_its_labels_by_itself(models, tmp_path):
    place, _ = models
    shutil.copytree(place / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "labels.json").unlink()
    (tmp_path / "merged" / "modules.json").unlink()
    predictor = load_predictor(tmp_path / "merged")
    assert predictor.labels == labels_of(predictor.model) == ["law", "pet", "other"]


def test_what_cannot_be_predicted(models, causal, tmp_path):
    place, _ = models
    data = write(tmp_path / "new.jsonl", [{"text": "a"}])
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "a", "completion": "b"}])
    pair = write(tmp_path / "pair.jsonl", [{"text": "a", "text_pair": "b"}])
    headless = tmp_path / "headless"
    shutil.copytree(place / "encoder", headless)
    (headless / "modules.json").unlink()
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps(config | {"architectures": ["BertForSequenceClassification"]}))
    (tmp_path / "empty").mkdir()
    cases = [
        ((place / "encoder", None, asked), "no field text"),
        ((place / "encoder", None, pair), "pairs of texts are for a classification"),
        ((place / "encoder", None, tmp_path / "none.jsonl"), "none.jsonl"),
        ((place / "encoder", tmp_path / "empty", data), "holds no adapter_config.json"),
        ((headless, None, data), "has no head for a classification"),
        ((causal, None, data), "nblora generate is for it"),
        ((tmp_path / "nowhere", None, data), "no such model folder"),
    ]
    for (model, adapter, file), words in cases:
        given = ["--model", model, "--data", file, *([] if adapter is None else ["--adapter", adapter])]
        result = run("predict", *given, "--output", tmp_path / "out.jsonl", code=2)
        assert words in result.stderr
        assert not (tmp_path / "out.jsonl").exists()


# --- generate ----------------------------------------------------------------------------------------------------


def answer(path, ids, **settings):
    model, tokenizer = nblora.load_pretrained(path), nblora.load_tokenizer(path)
    (tokens,) = nblora.generate(model, [ids], **settings)
    return tokenizer.decode(tokens)


def test_a_prompt_is_a_turn_of_a_conversation_or_taken_as_it_is(causal):
    tokenizer = nblora.load_tokenizer(causal)
    turn = prompt_ids(tokenizer, "hello", chat=True, system="be brief")
    assert tokenizer.decode(turn, special=True) != tokenizer.decode(
        prompt_ids(tokenizer, "hello", chat=True), special=True
    )
    plain = prompt_ids(tokenizer, "hello", chat=False)
    for ids, words in (
        (prompt_ids(tokenizer, "hello", chat=True), []),
        (plain, ["--plain"]),
        (turn, ["--system", "be brief"]),
    ):
        result = run("generate", "--model", causal, "--prompt", "hello", "--max-new-tokens", 8, *words)
        assert result.stdout == answer(causal, ids, max_new_tokens=8) + "\n"


def test_drawn_text_repeats_by_its_seed(causal):
    given = ["generate", "--model", causal, "--prompt", "-", "--plain", "--temperature", 5, "--max-new-tokens", 12]
    first, again, other = (run(*given, "--seed", seed, input="hello").stdout for seed in (0, 0, 1))
    assert first == again != other
    assert (
        run(*given, "--top-p", 1e-9, input="hello").stdout
        == run(*given[:-4], "--max-new-tokens", 12, input="hello").stdout
    )


def test_pieces_are_whole_characters_and_all_of_the_text(causal):
    """Whatever tokens part a character's bytes."""
    model, tokenizer = nblora.load_pretrained(causal), nblora.load_tokenizer(causal)
    parts = 0
    for seed in range(6):
        settings = {"max_new_tokens": 30, "temperature": 8.0, "seed": seed, "eos": []}
        pieces = list(stream_text(model, tokenizer, np.array([5, 6]), **settings))
        assert "".join(pieces) == answer(causal, np.array([5, 6]), **settings)
        assert all(pieces)
        parts += len(pieces)
    assert parts > 12  # in several pieces each


def test_an_adapter_changes_the_answer(causal, tmp_path):
    model = nblora.load_pretrained(causal)
    model.adapt("all-linear", rank=2, seed=1)
    rng = np.random.default_rng(2)
    for name in model.parameter_names():
        if name.endswith("lora_B"):
            model.set_parameter(name, rng.normal(size=model.parameter_shape(name)))
    model.save_adapter(tmp_path / "adapter")
    given = ["generate", "--model", causal, "--prompt", "hello", "--plain", "--max-new-tokens", 10]
    adapted = run(*given, "--adapter", tmp_path / "adapter").stdout
    ids = prompt_ids(nblora.load_tokenizer(causal), "hello", chat=False)
    (tokens,) = nblora.generate(model, [ids], max_new_tokens=10)
    assert adapted == nblora.load_tokenizer(causal).decode(tokens) + "\n" != run(*given).stdout


def test_an_adapter_of_plain_prompts_is_asked_by_plain_prompts(causal, tmp_path):
    from nblora.text.answering import speaks_chat

    tokenizer = nblora.load_tokenizer(causal)
    assert speaks_chat(tokenizer, None)
    for records, chat in (("messages", True), ("completion", False), ("text", False)):
        (tmp_path / "finetune.json").write_text(json.dumps({"records": records}))
        assert speaks_chat(tokenizer, tmp_path) == chat
    tokenizer.chat_template = None
    assert not speaks_chat(tokenizer, None)


def test_what_cannot_be_generated(models, causal, tmp_path):
    place, _ = models
    cases = [
        (["--model", place / "encoder", "--prompt", "a"], "can be loaded for"),
        (["--model", causal, "--adapter", place / "adapter", "--prompt", "a"], "nblora predict is for it"),
        (["--model", causal, "--prompt", "a", "--plain", "--system", "b"], "a system message is for a conversation"),
        (["--model", causal, "--prompt", "a", "--top-p", 2], "--top-p"),
    ]
    for words, message in cases:
        assert message in run("generate", *words, code=2).stderr
