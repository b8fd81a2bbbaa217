"""`nblora bench` and `nblora warmup` as they are typed."""

import json
import sys

import pytest
from click.testing import CliRunner

from nblora.bench import machine
from nblora.bench.report import BEGIN, END
from nblora.bench.runner import Effort
from nblora.cli import bench, main
from nblora.kernels.common.cache import cache_folder

LITTLE = Effort(rounds=3, burst=0.002, warm=0.005, rates=0.005)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "EFFORTS", dict.fromkeys(("quick", "default", "full"), LITTLE))
    monkeypatch.setattr(machine, "BUSY_LOAD", 1e9)
    monkeypatch.setattr(machine, "BUSY_SHARE", 1e9)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


def test_a_small_comparison_from_end_to_end(run, tmp_path):
    for name in ("README.md", "docs.md"):
        (tmp_path / name).write_text(f"# Speed\n{BEGIN}\n{END}\n")
    result = run(
        *("bench", "--case", "8,24,20,4", "--peer", "numpy", "--threads", "1", "--rounds", "2"),
        *("--kind", "step", "--kind", "forward", "--update-readme", "README.md", "--update-docs", "docs.md"),
    )
    assert result.exit_code == 0, result.output
    assert "| 8 × 24 × 20, r 4, step |" in result.output
    folder = tmp_path / "nblora-bench"
    content = json.loads((folder / "results.json").read_text())
    cases = content["groups"][0]["results"]
    assert [found["case"]["kind"] for found in cases] == ["step", "forward"]
    assert all(len(found["peers"]["numpy"]["rounds"]) == 2 for found in cases)
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 2 * 2
    assert "numpy takes" in (tmp_path / "README.md").read_text()
    assert (folder / "report.md").read_text().split("## ")[0].strip() in (tmp_path / "docs.md").read_text()
    assert (folder / "cases.png").exists()


COMPARED = ("bench", "--case", "4,12,10,2", "--peer", "numpy", "--threads", "1", "--rounds", "1")


def test_a_busy_machine_keeps_no_table(run, monkeypatch, tmp_path):
    """Busy before: nothing is measured. Busy meanwhile: the report is written, the kept table left as it was."""
    (tmp_path / "docs.md").write_text(f"{BEGIN}\n{END}\n")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "BUSY_LOAD", -1.0)
        refused = run(*COMPARED, "--update-docs", "docs.md")
        assert refused.exit_code == 1
        assert "busy with other work (load" in refused.output
        assert not (tmp_path / "nblora-bench").exists()
    monkeypatch.setattr(machine.Watch, "shares", lambda self: {"foreign_share": 2e9})
    refused = run(*COMPARED, "--update-docs", "docs.md")
    assert refused.exit_code == 1
    assert "no table was replaced" in refused.output
    assert "foreign_share" in (tmp_path / "nblora-bench" / "results.json").read_text()
    assert (tmp_path / "docs.md").read_text() == f"{BEGIN}\n{END}\n"
    assert run(*COMPARED).exit_code == 0


def test_only_the_sections_asked_for(run, tmp_path):
    result = run("bench", "--section", "startup", "--peer", "numpy", "--threads", "1", "--quick")
    assert result.exit_code == 0, result.output
    assert "process start to end of first step" in result.output
    assert "of the limit |" not in result.output


def test_quick_says_that_it_leaves_out_the_compiler(run, monkeypatch):
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    result = run("bench", "--quick", "--python", sys.executable)
    assert result.exit_code == 0, result.output
    assert "Not compared: torch-compile" in result.stdout
    assert "out of time" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "8,24"], "N,IN,OUT"),
        (["--case", "8,24,20,21"], "rank"),
        (["--peer", "tensorflow"], "tensorflow"),
        (["--threads", "0"], "number of threads"),
        (["--threads", "100000"], "cores"),
        (["--rounds", "0"], "0"),
        (["--dtype", "float16"], "float16"),
        (["--dtype", "float64", "--kind", "forward"], "no case"),
        (["--python", "nowhere"], "nowhere"),
        (["--update-readme", "plain.md"], "must hold"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_wrong_arguments_end_with_2_before_anything_runs(run, tmp_path, arguments, words):
    (tmp_path / "plain.md").write_text("no markers")
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "nblora-bench").exists()


def test_help_explains_itself(run):
    result = run("bench", "--help")
    assert result.exit_code == 0
    for word in ("--quick", "--full", "--update-readme", "a wrong peer is reported"):
        assert word in " ".join(result.output.split())


@pytest.mark.slow
def test_warmup_says_what_took_how_long(run):
    result = run("warmup", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for name in (
        "LoRALayer",
        "Dense, relu",
        "LoRAAdapter on FullyConnected, gelu",
        "DeltaLoRAAdapter on Dense, identity",
        "DeltaLoRAAdapter on Conv2d",
        "LoRAAdapter on Embedding",
        "RMSNorm",
        "BatchNorm2d",
        "attention, gates",
        "nblora merge",
    ):
        assert any(f" s  float32  {name}" in line for line in lines)
    assert "float64" not in result.output
    assert str(cache_folder()) in lines[-1]
    assert run("warmup", "--dtype", "float16").exit_code == 2
