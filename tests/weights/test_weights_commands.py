"""The commands: exit codes, messages, JSON, help, and what they import."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from nblora.cli import main
from nblora.weights import merge
from tests.weights.support import FIXTURES, linear_factors, read_file, snapshot, write_adapter, write_file

MLP = FIXTURES / "mlp_r4"
COMMANDS = ["merge", "unmerge", "verify", "inspect", "combine"]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def trio(tmp_path, rng):
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": rng.standard_normal((6, 5)).astype(np.float32)})
    adapter = write_adapter(tmp_path / "adapter", linear_factors(rng, "lin", 6, 5))
    return base, adapter, tmp_path / "merged.safetensors"


def test_commands_do_what_their_functions_do(trio, tmp_path):
    base, adapter, merged = trio
    result = run("merge", base, "--adapter", f"{adapter}:0.5", "--output", merged, "--json", "--keep-original")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [tensor["name"] for tensor in report["tensors"]] == ["lin.weight"]
    merge(base, (adapter, 0.5), tmp_path / "same.safetensors")
    assert merged.read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    assert run("verify", merged, "--adapter", f"{adapter}:0.5").exit_code == 0
    assert run("verify", merged, "--adapter", f"{adapter}:0.5", "--base", base).exit_code == 0
    assert run("verify", base, "--adapter", adapter, "--base", base).exit_code == 1
    assert run("verify", base, "--adapter", adapter).exit_code == 3
    result = run("unmerge", merged, "-o", tmp_path / "back.safetensors", "--json")
    assert (result.exit_code, json.loads(result.stdout)["exact"]) == (0, True)
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()
    result = run("combine", "--adapter", f"{adapter}:2", "--adapter", adapter, "-o", tmp_path / "sum", "--rank", 4)
    assert (result.exit_code, "relative error" in result.stdout) == (0, True)
    result = run("inspect", tmp_path / "sum", "--json", "--plot", tmp_path / "p.svg")
    assert (result.exit_code, json.loads(result.stdout)["modules"][0]["rank"]) == (0, 4)
    assert b"<svg" in (tmp_path / "p.svg").read_bytes()


def test_options_of_merge(trio, tmp_path, rng):
    base, _, merged = trio
    adapter = write_adapter(tmp_path / "renamed", linear_factors(rng, "model.lin", 6, 5))
    options = ["--map", "model=", "--dtype", "float16", "--max-memory", "2MiB", "--shard-size", "1GB"]
    assert run("merge", base, "--adapter", adapter, "-o", merged, *options, "--dry-run").exit_code == 0
    assert not merged.exists()
    result = run("merge", base, "--adapter", adapter, "-o", merged, *options)
    assert (result.exit_code, "lin.weight" in result.stdout) == (0, True)
    assert read_file(merged)["lin.weight"].dtype == np.float16


@pytest.mark.parametrize("command", COMMANDS)
def test_unreadable_files_end_in_exit_code_2_and_a_message(command, trio, tmp_path):
    base, adapter, merged = trio
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(base.read_bytes()[:-1])
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    before = snapshot(tmp_path)
    last = ["--adapter", adapter, *(["-o", merged] if command != "verify" else [])]
    calls = {
        "inspect": [[adapter], [tmp_path / "nothing"]],
        "combine": [last, ["--adapter", tmp_path / "nothing", "-o", merged]],
    }
    for arguments in calls.get(command, [[broken, *last], [tmp_path / "nothing", *last], [base, *last]]):
        result = run(command, *arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("nblora: ")
        assert str(tmp_path) in result.stderr
        assert "Traceback" not in result.output
    assert snapshot(tmp_path) == before


def test_wrong_arguments_end_in_exit_code_2(trio, tmp_path):
    base, adapter, merged = trio
    for options in (["--max-memory", "tiny"], ["--map", "nothing"], ["--dtype", "int8"], ["--shard-size", "0"]):
        result = run("merge", base, "--adapter", adapter, "-o", merged, *options)
        assert (result.exit_code, merged.exists()) == (2, False)
    assert run("merge", base, "-o", merged).exit_code == 2
    assert run("merge", base, "--adapter", f"{adapter}:nan", "-o", merged).exit_code == 2
    assert run("unmerge", base, "-o", merged).exit_code == 2
    result = run("merge", base, "--adapter", adapter, "-o", base)
    assert (result.exit_code, "is the output and the input" in result.stderr) == (2, True)
    result = run("merge", base, "--adapter", FIXTURES / "linear_r4", "-o", merged)
    assert (result.exit_code, "match" in result.stderr, "nearest lin.weight" in result.stderr) == (2, True, True)


def test_weight_is_split_from_a_path_with_colons(trio, tmp_path, rng):
    base, _, merged = trio
    adapter = write_adapter(tmp_path / "a:0.5", linear_factors(rng, "lin", 6, 5))
    assert run("merge", base, "--adapter", adapter, "-o", merged).exit_code == 0
    merge(base, adapter, tmp_path / "whole.safetensors")
    assert merged.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert run("merge", base, "--adapter", f"{adapter}:2", "-o", merged).exit_code == 0
    merge(base, (adapter, 2), tmp_path / "twice.safetensors")
    assert merged.read_bytes() == (tmp_path / "twice.safetensors").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options_that_they_share(command):
    text = run(command, "--help").stdout
    assert "--json" in text
    assert command == "inspect" or "--adapter PATH[:WEIGHT]" in text


def test_no_command_imports_a_framework(trio, tmp_path):
    base, adapter, merged = trio
    traps = tmp_path / "traps"
    for name in ("torch", "transformers", "peft"):
        (traps / name).mkdir(parents=True)
        (traps / name / "__init__.py").write_text("raise SystemExit(77)")
    calls = [
        ["merge", base, "--adapter", adapter, "-o", merged, "--keep-original"],
        ["verify", merged, "--adapter", adapter],
        ["unmerge", merged, "-o", tmp_path / "back.safetensors"],
        ["inspect", adapter, "--plot", tmp_path / "p.png"],
        ["combine", "--adapter", adapter, "--adapter", adapter, "-o", tmp_path / "sum", "--rank", 2],
    ]
    path = os.pathsep.join([str(traps), *sys.path])
    program = "from nblora.cli import main; main()"
    trapped = subprocess.run(
        [sys.executable, "-c", "import torch"], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert trapped.returncode == 77
    for call in calls:
        command = [sys.executable, "-c", program, *map(str, call)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_a_name_tells_the_terminal_nothing(tmp_path):
    write_file(
        tmp_path / "m.safetensors", {"a\x1b]0;owned\x07\x1b[2J.weight": np.ones((2, 2), "float32"), "é": np.ones(2)}
    )
    result = run("inspect", tmp_path / "m.safetensors")
    assert result.exit_code == 0
    assert r"a\x1b]0;owned\x07\x1b[2J.weight" in result.stdout
    assert "é" in result.stdout
    assert "\x1b" not in result.stdout


def test_what_is_not_there_is_called_a_file_or_a_folder(tmp_path):
    result = run("inspect", tmp_path / "nowhere")
    assert (result.exit_code, "No such file or directory" in result.stderr) == (2, True)
