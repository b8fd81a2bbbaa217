"""`nblora finetune` and `nblora.finetune`: what they write, and that it is what was trained."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import nblora
from nblora.cli import main
from nblora.cli.finetune import command as finetune_command
from nblora.finetuning.settings import METHODS
from nblora.text.labels import read_labels

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

from . import support


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models and records, which no test writes to."""
    folder = tmp_path_factory.mktemp("finetune")
    support.encoder(folder / "bert")
    support.language_model(folder / "llama")
    support.write(folder / "pets.jsonl", support.labelled())
    support.write(folder / "parts" / "train.jsonl", support.labelled(30))
    support.write(folder / "parts" / "valid.jsonl", support.labelled(10, seed=1))
    support.write(folder / "parts" / "test.jsonl", support.labelled(12, seed=2))
    support.write(folder / "yes.jsonl", support.completions())
    support.write(folder / "talk.jsonl", support.conversations())
    return folder


def call(*arguments):
    return CliRunner().invoke(main, ["finetune", *map(str, arguments)])


def test_a_classification_from_one_command(place, tmp_path):
    output = tmp_path / "out"
    arguments = ["--model", place / "bert", "--data", place / "parts", "--output", output, "--lr", "0.01"]
    done = call(*arguments, "--epochs", "6", "--rank", "2", "--alpha", "4")
    assert done.exit_code == 0, done.output
    assert read_labels(output) == ["pets", "tax"]
    files = {path.name for path in output.iterdir()} - {"history.png"}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "finetune.json", "history.csv", "labels.json"}
    held = json.loads((output / "finetune.json").read_text())
    assert held["status"] == "finished"
    assert held["labels"] == {"pets": 15, "tax": 15}
    assert held["settings"]["rank"] == 2
    assert held["reloaded_apart"] < 1e-5
    assert held["metrics"]["test"]["accuracy"] > 0.9
    lines = (output / "history.csv").read_text().splitlines()
    assert len(lines) == 7
    best = np.argmin([float(line.split(",")[4]) for line in lines[1:]])
    assert held["metrics"]["valid"]["loss"] == pytest.approx(float(lines[best + 1].split(",")[4]), rel=1e-5)
    assert held["metrics"]["best_step"] == 4 * (best + 1)
    assert f"nblora predict --model {place / 'bert'} --adapter {output} --data FILE" in done.stdout
    assert f"nblora merge {place / 'bert'} --adapter {output} --output MERGED" in done.stdout
    assert "test: loss" in done.stdout
    assert "epoch 6, update 24: loss" in done.stderr
    model = nblora.load_pretrained(place / "bert", task="sequence-classification", num_labels=2)
    model.load_adapter(output)
    ids = nblora.load_tokenizer(place / "bert").encode([row["text"] for row in support.labelled(12, seed=2)]).ids
    found = model(ids).argmax(axis=1)
    assert np.mean(found == np.arange(12) % 2) == held["metrics"]["test"]["accuracy"]


def test_the_command_offers_every_method():
    assert list(next(p for p in finetune_command.params if p.name == "method").type.choices) == list(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_methods(place, tmp_path, method):
    result = nblora.finetune(
        place / "bert", place / "pets.jsonl", tmp_path / "out", method=method, rank=2, lr=0.01, epochs=2, seed=3
    )
    description = result.description
    head, linear = 24 * 2 + 2, description["trainable_parameters"]
    assert (linear == head) == (method == "head")
    assert (linear == description["parameters"]) == (method == "full")
    assert description["data"]["train"]["records"] == 36
    assert description["data"]["valid"]["records"] == 4
    assert set(result.metrics) == {"valid", "best_step"}
    assert len(result.history) == 2
    if method == "full":
        model = nblora.load_pretrained(tmp_path / "out", task="sequence-classification")
        assert model.config["id2label"] == {"0": "pets", "1": "tax"}
        assert (tmp_path / "out" / "vocab.txt").is_file()
        assert not (tmp_path / "out" / "adapter_config.json").exists()
        assert len(result.commands) == 1
    else:
        model = nblora.load_pretrained(place / "bert", task="sequence-classification", num_labels=2)
        model.load_adapter(result.folder)
    metrics = nblora.training.evaluate(model, *_valid(place, 3))
    assert metrics["loss"] == pytest.approx(result.metrics["valid"]["loss"], rel=1e-4)


def _valid(place, seed):
    from nblora.finetuning.task import held_out
    from nblora.text.examples import class_examples
    from nblora.text.records import read_records

    records = read_records(place / "pets.jsonl")
    chosen = records.part(held_out(records, 0.1, seed))
    examples = class_examples(chosen, nblora.load_tokenizer(place / "bert"), ["pets", "tax"], 99)
    assert sorted(examples.targets.tolist()) == [0, 0, 1, 1]
    return examples.inputs, examples.targets


@pytest.mark.parametrize("data", ["yes.jsonl", "talk.jsonl"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_language(place, tmp_path, data, method):
    result = nblora.finetune(
        place / "llama", place / data, tmp_path / "out", method=method, lr=0.01, iters=12, eval_every=4, batch_size=4
    )
    assert [row["step"] for row in result.history] == [4, 8, 12]
    assert result.history["val_loss"][-1] < result.history["val_loss"][0]
    assert result.labels is None
    assert result.description["records"] == {"yes.jsonl": "completion", "talk.jsonl": "messages"}[data]
    assert not (tmp_path / "out" / "labels.json").exists()
    assert result.commands[0].endswith("--prompt TEXT")
    if method == "full":
        model = nblora.load_pretrained(tmp_path / "out")
    else:
        model = nblora.load_pretrained(place / "llama").load_adapter(tmp_path / "out")
    if data == "yes.jsonl" and method == "full":
        tokenizer = nblora.load_tokenizer(place / "llama")
        (found,) = nblora.generate(model, tokenizer.encode(["b 3:"]).ids, max_new_tokens=5)
        assert tokenizer.decode(found).startswith(" yes")


def test_the_best_is_kept_and_patience_ends(place, tmp_path):
    rows = support.labelled(30)
    wrong = [{**row, "label": "tax" if row["label"] == "pets" else "pets"} for row in support.labelled(10, seed=1)]
    data = support.write(tmp_path / "train.jsonl", rows)
    valid = support.write(tmp_path / "wrong.jsonl", wrong)
    result = nblora.finetune(
        place / "bert", data, tmp_path / "out", valid=valid, lr=0.02, epochs=30, patience=2, rank=2
    )
    losses = result.history["val_loss"]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    assert result.metrics["valid"]["loss"] == pytest.approx(losses[best], rel=1e-5)


def test_the_rate_that_learns_most_is_taken(place, tmp_path):
    told = []
    result = nblora.finetune(
        place / "bert", place / "pets.jsonl", tmp_path / "out", lr="auto", epochs=1, rank=2, tell=told.append
    )
    rates = result.description["rates"]
    assert [trial["lr"] for trial in rates] == [1e-4, 3e-4, 1e-3, 3e-3]
    assert result.lr == min(rates, key=lambda trial: trial["loss"])["lr"]
    assert any(
        line.startswith(f"lr {result.lr:g}: after 5 updates the loss of the records held out was") for line in told
    )
    plain = nblora.finetune(place / "bert", place / "pets.jsonl", tmp_path / "plain", lr=result.lr, epochs=1, rank=2)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "plain")]
    assert files[0] == files[1]  # trying rates leaves no trace
    assert plain.metrics == result.metrics


def test_a_dry_run_writes_nothing_and_says_what_to_expect(place, tmp_path):
    arguments = ["--model", place / "bert", "--data", place / "parts", "--output", tmp_path / "out", "--dry-run"]
    done = call(*arguments, "--epochs", "5", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["updates"] == 20
    assert found["memory"] > 2**20
    assert found["seconds"] > 0
    assert 0 < found["trainable"] < found["parameters"]
    text = call(*arguments)
    assert "12 updates" in text.stdout
    assert "GiB" in text.stdout
    assert not (tmp_path / "out").exists()


def test_a_sample_is_shown(place, tmp_path):
    arguments = ["--model", place / "llama", "--data", place / "yes.jsonl", "--output", tmp_path / "out"]
    done = call(*arguments, "--show-sample")
    assert done.exit_code == 0, done.output
    assert "learnt: " in done.stdout
    learnt = [line for line in done.stdout.splitlines() if line.startswith("*")]
    assert learnt[-1].endswith("'<|endoftext|>'")
    every = call(*arguments, "--show-sample", "--learn-prompt")
    assert len([line for line in every.stdout.splitlines() if line.startswith("*")]) > len(learnt)
    assert not (tmp_path / "out").exists()


def test_a_configuration_whose_values_flags_override(place, tmp_path):
    path = tmp_path / "run.toml"
    lines = [f'model = "{place / "bert"}"', f'data = "{place / "pets.jsonl"}"', "epochs = 1", "lr = 0.01", "rank = 3"]
    path.write_text("\n".join([*lines, 'target = ["query", "value"]', "batch-size = 4", "valid = 0", ""]))
    done = call("--config", path, "--output", tmp_path / "out", "--rank", "2", "--json")
    assert done.exit_code == 0, done.output
    held = json.loads(done.stdout)
    settings = held["settings"]
    assert (settings["rank"], settings["batch_size"], settings["lr"]) == (2, 4, 0.01)
    assert settings["target"] == ["query", "value"]
    assert settings["valid"] == 0
    assert held["metrics"] == {"best_step": 10}
    assert held["next"]
    path.write_text("model = 3\nepoch = 1\n")
    done = call("--config", path, "--output", tmp_path / "other")
    assert done.exit_code == 2
    assert "unknown setting 'epoch'" in done.output


def test_integer_labels_are_sorted_as_numbers_and_a_models_own_names_stay(place, tmp_path):
    rows = [{"text": row["text"], "label": [10, 9][number % 2]} for number, row in enumerate(support.labelled(12))]
    data = support.write(tmp_path / "numbers.jsonl", rows)
    settings = {"epochs": 1, "rank": 2, "valid": 0}
    first = nblora.finetune(place / "bert", data, tmp_path / "out", method="full", **settings)
    assert first.labels == ["9", "10"]
    write = [{**row, "label": "9"} if row["label"] == 9 else row for row in rows]
    support.write(tmp_path / "again.jsonl", write)
    (tmp_path / "out" / "labels.json").write_text('{"labels": ["10", "9"]}')
    second = nblora.finetune(tmp_path / "out", tmp_path / "again.jsonl", tmp_path / "second", **settings)
    assert second.labels == ["10", "9"]
    (tmp_path / "out" / "labels.json").unlink()  # then config.json names them
    third = nblora.finetune(tmp_path / "out", tmp_path / "again.jsonl", tmp_path / "third", **settings)
    assert third.labels == ["9", "10"]
    assert third.notes[0] == "no records are held out for validation: what is kept is the state after the last update"


@pytest.mark.parametrize("method", ["delta", "full"])
def test_a_dry_run_changes_nothing_of_the_model(place, tmp_path, method):
    from nblora.finetuning.estimate import estimate
    from nblora.finetuning.settings import Settings
    from nblora.finetuning.task import make_task, read_data

    given = {"rank": 2, "alpha": 4, "target": "query", "lr": "auto", "epochs": 2, "iters": None, "batch_size": 4}
    given |= {"accumulate": 2, "max_length": 20, "long": "cut", "valid": None, "eval_every": None, "save_every": None}
    given |= {"patience": None, "learn_prompt": False, "seed": 0, "method": method, "task": None}
    settings = Settings.checked(model=place / "bert", data=place / "pets.jsonl", output=tmp_path / "out", **given)
    task = make_task(settings, read_data(settings))
    before = {name: task.model.get_parameter(name) for name in task.model.parameter_names()}
    found = estimate(task)
    assert found.updates == 10
    for name, value in before.items():
        np.testing.assert_array_equal(task.model.get_parameter(name), value, err_msg=name)
