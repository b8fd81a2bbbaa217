"""The comparison of two checkouts: its interval, and what it says of cases beyond 3 %."""

import importlib.util
import math

import pytest
from click.testing import CliRunner

from tests.processes import ROOT

spec = importlib.util.spec_from_file_location("compare_checkouts", ROOT / "benchmarks" / "compare_checkouts.py")
comparison = importlib.util.module_from_spec(spec)
spec.loader.exec_module(comparison)

CASE = {"kind": "step", "n": 8, "in_features": 4, "out_features": 2, "rank": 1}
CASE |= {"dtype": "float32", "layout": "dense", "threads": 2}


def test_the_interval_is_students_of_the_logarithms():
    """Ratios 1.1 and 1.21: the mean of the logarithms is 1.5 ln 1.1, their standard error 0.5 ln 1.1, t is 12.7062."""
    middle, low, high = comparison.interval([1.0, 2.0], [1.1, 2.42])
    assert middle == pytest.approx(1.1**1.5)
    assert low == pytest.approx(1.1 ** (1.5 - 0.5 * 12.70620474), rel=1e-6)
    assert high == pytest.approx(1.1 ** (1.5 + 0.5 * 12.70620474), rel=1e-6)


def test_only_a_whole_interval_beyond_three_percent_gets_a_line():
    rounds = range(5)
    noise = [math.exp(0.001 * (-1) ** turn) for turn in rounds]
    old = [{"same": 1.0, "slow": 1.0, "fast": 1.0, "wild": 1.0, "gone": 1.0} for _ in rounds]
    new = [{"same": n, "slow": 1.05 * n, "fast": 0.9 * n, "wild": 1.1 * n**200} for n in noise]
    lines, slower = comparison.report(old, new)
    assert slower
    assert [line.split(",")[0] for line in lines if line.startswith(("SLOWER", "faster"))] == [
        "SLOWER: slow",
        "faster: fast",
    ]
    assert "gone: not in every run, not compared" in lines
    assert comparison.report(old, [found | {"gone": 1.0} for found in old]) == (
        [f"{name}: 1000.000 ms, then 1000.000 ms: 1.000 (1.000 to 1.000)" for name in old[0]]
        + ["No case lies wholly beyond 3%."],
        False,
    )


def test_runs_alternate_and_a_slower_case_ends_with_1(monkeypatch, tmp_path):
    runs = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()

    def measure(checkout, python, arguments):
        runs.append((checkout.name, *arguments))
        return {"case": 1.0 if checkout.name == "old" else 2.0}

    monkeypatch.setattr(comparison, "measure", measure)
    folders = [str(tmp_path / name) for name in ("old", "new")]
    done = CliRunner().invoke(comparison.main, [*folders, "--rounds", "3"])
    assert done.exit_code == 1, done.output
    assert "SLOWER: case, 2.000" in done.output
    assert runs[:2] == [("old", "--quick", "--rounds", "1"), ("new", "--quick", "--rounds", "1")]
    assert [name for name, _ in runs[2:]] == ["old", "new", "new", "old", "old", "new"]
    runs.clear()
    CliRunner().invoke(comparison.main, [*folders, "--rounds", "2", "--", "--case", "1,2,2"])
    assert runs[-1] == ("old", "--case", "1,2,2")
    assert CliRunner().invoke(comparison.main, [*folders, "--rounds", "1"]).exit_code == 2


def test_a_case_has_a_name_that_tells_it_from_others():
    assert comparison.label(CASE) == "step 8 × 4 × 2, r 1, float32, dense, 2t"


def test_a_checkout_that_fails_is_said_so(tmp_path):
    (tmp_path / "nblora").mkdir()
    (tmp_path / "nblora" / "__init__.py").write_text("raise ImportError('broken checkout')")
    done = CliRunner().invoke(comparison.main, [str(tmp_path), str(tmp_path), "--rounds", "2"])
    assert done.exit_code == 1
    assert "broken checkout" in done.output
