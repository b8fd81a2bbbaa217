"""What cannot be trained on is refused: a message that names it, exit code 2, and nothing is written or lost."""

import json

import pytest
from click.testing import CliRunner

from nblora.cli import main

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

from . import support

PETS = {"text": "the cat", "label": "pets"}
TAX = {"text": "tax law", "label": "tax"}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    support.encoder(folder / "bert")
    support.language_model(folder / "llama")
    support.write(folder / "pets.jsonl", support.labelled())
    support.write(folder / "talk.jsonl", [TALK] * 4)
    return folder


def refused(*arguments):
    """The message of a command that ends with exit code 2."""
    done = CliRunner().invoke(main, ["finetune", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(("nblora: ", "Usage: "))
    assert "Traceback" not in done.output
    return done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        (json.dumps(PETS), "all 1 records to train on have the label 'pets'; a classification needs at least two"),
        ("\n".join([json.dumps(PETS)] * 3), "all 3 records to train on have the label 'pets'"),
        ("\n".join([json.dumps(PETS), '{"text": "a", "label" "b"}']), "line 2, column 23: not valid JSON"),
        ("\n".join([json.dumps(PETS), json.dumps(TALK)]), "line 2: has the fields messages"),
        (json.dumps({**PETS, "source": "web"}), "line 1: the field 'source' is unknown"),
        (json.dumps({"text": "a", "text_pair": "b"}), "text_pair without a label"),
    ],
)
def test_data(place, tmp_path, text, message):
    data = tmp_path / "data.jsonl"
    data.write_text(text)
    found = refused("--model", place / "bert", "--data", data, "--output", tmp_path / "out")
    assert message in found
    assert str(data) in found
    assert not (tmp_path / "out").exists()


def test_labels_of_validation_that_training_lacks(place, tmp_path):
    support.write(tmp_path / "d" / "train.jsonl", [PETS, TAX])
    valid = support.write(tmp_path / "d" / "valid.jsonl", [PETS, {**TAX, "label": "law"}])
    found = refused("--model", place / "bert", "--data", tmp_path / "d", "--output", tmp_path / "out")
    assert f"{valid}, line 2: the label 'law' is none of those learnt ('pets', 'tax')" in found
    assert not (tmp_path / "out").exists()


def test_validation_of_another_kind_and_twice(place, tmp_path):
    arguments = ["--model", place / "bert", "--data", place / "pets.jsonl", "--output", tmp_path / "out"]
    assert "its records have the fields messages" in refused(*arguments, "--valid", place / "talk.jsonl")
    assert "No such file" in refused(*arguments, "--valid", tmp_path / "none.jsonl")
    assert "valid must be a path, or a share" in refused(*arguments, "--valid", "1.5")
    support.write(tmp_path / "d" / "train.jsonl", [PETS, TAX])
    support.write(tmp_path / "d" / "valid.jsonl", [PETS])
    arguments[3] = tmp_path / "d"
    assert "choose one of them" in refused(*arguments, "--valid", place / "pets.jsonl")
    assert "patience needs records held out" in refused(*arguments[:3], place / "pets.jsonl", *arguments[4:],
                                                       "--valid", "0", "--patience", "1")  # fmt: skip


def test_texts_that_are_too_long_are_counted_and_cut_or_refused(place, tmp_path):
    rows = [PETS, TAX, {**PETS, "text": "cat " * 60}, {**TAX, "text": "tax " * 50}]
    data = support.write(tmp_path / "long.jsonl", rows)
    arguments = ["--model", place / "bert", "--data", data, "--output", tmp_path / "out", "--valid", "0"]
    found = refused(*arguments, "--long", "refuse")
    assert f"{data}: 2 of 4 records (train) have more than 32 tokens" in found
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, ["finetune", *map(str, arguments), "--epochs", "1", "--rank", "2"])
    assert done.exit_code == 0, done.output
    assert "note: the model has 32 positions: texts are cut there, and not at 512 tokens" in done.stderr
    assert "note: 2 of 4 records (train) have more than 32 tokens, and were cut" in done.stderr
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["data"]["train"]["cut"] == 2


def test_a_tokenizer_of_another_model(place, tmp_path):
    model = support.encoder(tmp_path / "bert")
    words = (model / "vocab.txt").read_text() + "".join(f"w{number}\n" for number in range(80)) + "zebra\n"
    (model / "vocab.txt").write_text(words)
    data = support.write(tmp_path / "d.jsonl", [PETS, {**TAX, "text": "a zebra"}])
    found = refused("--model", model, "--data", data, "--output", tmp_path / "out", "--valid", "0")
    assert f"the tokenizer does not fit the model: {data}, line 2 gives the token" in found
    (model / "vocab.txt").unlink()
    assert "holds no tokenizer.json" in refused("--model", model, "--data", data, "--output", tmp_path / "out")


def test_models(place, tmp_path):
    data = ["--data", place / "pets.jsonl", "--output", tmp_path / "out"]
    assert "no such model folder" in refused("--model", tmp_path / "none", *data)
    talk = ["--data", place / "talk.jsonl", "--output", tmp_path / "out"]
    assert "not for 'causal-lm'" in refused("--model", place / "bert", *talk)
    assert "which are for 'causal-lm', not for 'sequence-classification'" in refused(
        "--model", place / "llama", *talk, "--task", "sequence-classification"
    )
    assert "'head' is for labelled texts" in refused("--model", place / "llama", *talk, "--method", "head")
    assert "matches none of the layers" in refused("--model", place / "bert", *data, "--target", "nothing")
    assert "rank must be between 1 and 24" in refused("--model", place / "bert", *data, "--rank", "999")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "the chat template fails"),
        ("{{ raise_exception('no systems here') }}", "no systems here"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "differently when more follows"),
    ],
)
def test_templates(place, tmp_path, template, message):
    model = support.language_model(tmp_path / "llama")
    (model / "chat_template.jinja").write_text(template)
    found = refused("--model", model, "--data", place / "talk.jsonl", "--output", tmp_path / "out")
    assert f"{place / 'talk.jsonl'}, line 1: " in found
    assert message in found
    (model / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(
        "--model", model, "--data", place / "talk.jsonl", "--output", tmp_path / "out"
    )


def test_outputs(place, tmp_path):
    arguments = ["--model", place / "bert", "--data", place / "pets.jsonl", "--output"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").write_text("dear")
    assert "holds 'letter.txt', and no finetune.json" in refused(*arguments, tmp_path / "own")
    assert (tmp_path / "own" / "letter.txt").read_text() == "dear"
    assert "expected a folder or nothing, got a file" in refused(*arguments, tmp_path / "own" / "letter.txt")
    assert "No such file" in refused(*arguments, tmp_path / "none" / "out")
    assert "is the output, and" in refused(*arguments, place / "bert")
    assert "is the output, and" in refused(*arguments, place)


def test_rates_that_are_none(place, tmp_path):
    arguments = ["--model", place / "bert", "--data", place / "pets.jsonl", "--output", tmp_path / "out"]
    assert "lr must be a positive number or 'auto', got 'fast'" in refused(*arguments, "--lr", "fast")
    assert "lr" in refused(*arguments, "--lr", "-1")
    found = refused(*arguments, "--lr", "1e30", "--epochs", "1")
    assert "is not finite" in found or "the loss is" in found
    assert "Lower the learning rate" in found
    assert not (tmp_path / "out").exists()


def test_a_configuration(place, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("rank = \n")
    assert "not valid TOML" in refused("--config", path, "--model", "m")
    path.write_text("rank = 'high'\n")
    arguments = ["--model", place / "bert", "--data", place / "pets.jsonl", "--output", tmp_path / "out"]
    assert "'high' is not a valid integer" in refused("--config", path, *arguments)
