"""A run that was killed goes on, and ends as one that was not, bit for bit; nothing is lost on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import nblora
from nblora.errors import FormatError
from nblora.training import checkpoint
from tests.processes import ROOT

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("gguf")

from . import support

KILLS = 20
SETTINGS = {"rank": 2, "lr": 0.01, "epochs": 3, "eval_every": 4, "save_every": 2, "batch_size": 4, "seed": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    support.encoder(folder / "bert")
    support.language_model(folder / "llama")
    support.write(folder / "pets.jsonl", support.labelled(24))
    support.write(folder / "yes.jsonl", support.completions(24))
    return folder


def results(folder):
    """Everything that a run wrote and that is the same in each."""
    held = json.loads((folder / "finetune.json").read_text())
    left_out = ("seconds", "settings")
    history = support.without_times((folder / "history.csv").read_text())
    adapter = (folder / "adapter_model.safetensors").read_bytes()
    return {k: v for k, v in held.items() if k not in left_out}, history, adapter


class Stopped(BaseException):
    """As if the process had ended."""


@pytest.mark.parametrize(
    ("kind", "method", "lr"),
    [("pets", "lora", 0.01), ("pets", "delta", 0.01), ("pets", "head", "auto"), ("yes", "lora", "auto")],
)
def test_a_stopped_run_goes_on(place, tmp_path, monkeypatch, kind, method, lr):
    """Stopped when a file is about to be put in its place: the second, and of each that goes on one later."""
    model = place / ("bert" if kind == "pets" else "llama")
    settings = {**SETTINGS, "method": method, "lr": lr}
    nblora.finetune(model, place / f"{kind}.jsonl", tmp_path / "whole", **settings)
    wanted = results(tmp_path / "whole")
    replace, moves = os.replace, []

    def stopping(source, target):
        moves.append(target)
        if len(moves) == stopped + 2:
            raise Stopped
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    stopped = 0
    while True:
        moves.clear()
        try:
            nblora.finetune(model, place / f"{kind}.jsonl", tmp_path / "out", resume=True, **settings)
            break
        except Stopped:
            stopped += 1
            assert stopped < 60
    assert stopped >= 5
    assert results(tmp_path / "out") == wanted
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_second_run_into_a_folder_is_refused_and_changes_nothing(place, tmp_path):
    output = tmp_path / "out"
    nblora.finetune(place / "bert", place / "pets.jsonl", output, **SETTINGS)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(FormatError, match=r"holds a run already \(finished\): choose a new folder"):
        nblora.finetune(place / "bert", place / "pets.jsonl", output, **SETTINGS)
    with pytest.raises(FormatError, match="was started with rank 2, and this one has 3"):
        nblora.finetune(place / "bert", place / "pets.jsonl", output, resume=True, **(SETTINGS | {"rank": 3}))
    with pytest.raises(FormatError, match="was started with data "):
        nblora.finetune(place / "bert", place / "yes.jsonl", output, resume=True, **SETTINGS)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    again = nblora.finetune(place / "bert", place / "pets.jsonl", output, resume=True, **SETTINGS)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert len(again.history) == 5
    told = []
    new = tmp_path / "new"
    nblora.finetune(place / "bert", place / "pets.jsonl", new, resume=True, tell=told.append, **SETTINGS)
    assert told[0] == f"there is no run in {new} yet: it begins"
    assert results(new) == results(output)


def test_data_that_changed_since_are_noticed(place, tmp_path, monkeypatch):
    data = support.write(tmp_path / "own.jsonl", support.labelled(24))
    write, calls = checkpoint.write_checkpoint, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Stopped
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", stopping)
    with pytest.raises(Stopped):
        nblora.finetune(place / "bert", data, tmp_path / "out", **SETTINGS)
    support.write(data, support.labelled(24, seed=9))
    with pytest.raises(FormatError, match=r"own.jsonl \(train\): has changed since the run"):
        nblora.finetune(place / "bert", data, tmp_path / "out", resume=True, **SETTINGS)


def test_a_full_disk_loses_nothing_that_was_saved(place, tmp_path, monkeypatch):
    nblora.finetune(place / "bert", place / "pets.jsonl", tmp_path / "whole", **SETTINGS)
    write, calls, told = checkpoint.write_checkpoint, [], []

    def full(path, *rest):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        nblora.finetune(place / "bert", place / "pets.jsonl", tmp_path / "out", tell=told.append, **SETTINGS)
    assert "--resume goes on" in told[-1]
    nblora.finetune(place / "bert", place / "pets.jsonl", tmp_path / "out", resume=True, **SETTINGS)
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_two_runs_do_not_write_to_one_folder(place, tmp_path):
    from nblora.finetuning.folder import Folder

    with Folder(tmp_path / "out").held(), pytest.raises(FormatError, match="another run is writing to this folder"):
        nblora.finetune(place / "bert", place / "pets.jsonl", tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_twenty_random_moments(place, tmp_path):
    """By SIGKILL, each run and the one that goes on with it: while it starts, trains, saves or writes."""
    flags = ["--model", place / "bert", "--data", place / "pets.jsonl", "--rank", "2", "--lr", "0.01", "--seed", "1"]
    flags += ["--eval-every", "4", "--save-every", "2", "--batch-size", "4", "--epochs", "40"]
    command = [sys.executable, "-c", "from nblora.cli import main; main()", "finetune", *map(str, flags)]

    def run(output, *more, kill=None):
        process = subprocess.Popen(
            [*command, "--output", str(output), *more], env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        if kill is not None:
            time.sleep(kill)
            process.send_signal(signal.SIGKILL)
        error = process.communicate(timeout=600)[1].decode()
        assert kill is not None or process.returncode == 0, error
        return process.returncode

    began = time.perf_counter()
    run(tmp_path / "whole")
    whole = time.perf_counter() - began
    wanted, rng, killed = results(tmp_path / "whole"), random.Random(4), 0
    for number in range(40):  # some come too late
        if killed >= KILLS:
            break
        output = tmp_path / f"out{number}"
        killed += run(output, kill=rng.uniform(0, whole)) == -signal.SIGKILL
        killed += run(output, "--resume", kill=rng.uniform(0, whole)) == -signal.SIGKILL  # and the one that goes on
        run(output, "--resume")
        assert results(output) == wanted, f"run {number}"
        assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "whole"))
    assert killed >= KILLS
