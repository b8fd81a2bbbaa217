"""Reports of made-up figures: what the files and tables say, losses included."""

import csv
import io
import json
import os

import pytest

from nblora.bench import machine
from nblora.bench.cases import Case
from nblora.bench.chart import draw_cases, draw_growth
from nblora.bench.limits import Machine
from nblora.bench.machine import describe_machine, usable_cores
from nblora.bench.peers import PEERS
from nblora.bench.report import BEGIN, END, Report, replace_between_markers
from nblora.bench.runner import Bench, Effort
from nblora.bench.suites import LIMIT, Group
from nblora.bench.summary import CaseResult, spread
from nblora.bench.tables import (
    comparison_table,
    full_text,
    goals_table,
    growth_tables,
    memory_table,
    milliseconds,
    neighbour_table,
    readme_text,
    table,
)

WIN, LOSS = Case("step", 64, 128, 128, threads=2), Case("step", 8, 128, 128, threads=2)


@pytest.fixture
def report():
    """nblora takes 1 ms; NumPy 3 ms of the first case and 0.5 ms of the second, where JAX is wrong."""
    win = CaseResult(WIN, {"nblora": [1e-3] * 5, "numpy": [3e-3] * 5, "jax": [2e-3] * 5})
    loss = CaseResult(LOSS, {"nblora": [1e-3] * 5, "numpy": [5e-4] * 5}, {"jax": "wrong result: y is off"})
    start = {"median": 1.0, "q1": 1.0, "q3": 1.0}
    bench = Bench(
        {name: PEERS[name] for name in ("nblora", "numpy", "jax")},
        Effort(rounds=5),
        print,
        skipped={"peft": "peft is not installed"},
        versions={"numpy": {"numpy": "9.9"}},
        machines={("float32", 2): Machine(1e10, 1e10, "numpy", "numpy")},
    )
    return Report(
        suite="quick",
        bench=bench,
        machine=describe_machine(),
        groups=[Group("both", (WIN, LOSS), {"numpy": 1.5, LIMIT: 0.1})],
        results=[win, loss],
        startup=[
            {
                "peer": "nblora",
                "cache": "warm",
                **dict.fromkeys(("seconds", "import", "set_up", "first", "steady"), start),
            },
            {"peer": "jax", "cache": "warm", "fault": "no"},
        ],
        memory=[
            {"peer": "nblora", "kind": "step", "sizes": [64, 128, 128], "bytes": 3 * 2**20, "arrays": 2**20},
            {"peer": "jax", "kind": "step", "sizes": [64, 128, 128], "fault": "no"},
        ],
        growth={"N": [loss, win]},
        neighbour={"quiet": win, "busy": loss},
    )


def test_table_is_markdown():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---:|\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1234, "123"), (0.01234, "12.3"), (0.001234, "1.23"), (0.0096, "9.60"), (1.234e-4, "0.123"), (None, "–")],
)
def test_milliseconds_have_three_digits(seconds, text):
    assert milliseconds(seconds and spread([seconds])) == text


def test_full_text_shows_wins_losses_wrong_and_missing_peers(report):
    text = full_text(report)
    assert "3.00 (3.00–3.00)" in text
    assert "**0.50** (0.50–0.50)" in text
    assert "wrong" in text
    assert "Not compared: peft, peft is not installed" in text
    assert "numpy 9.9" in text
    assert "P = 10 GFLOP/s (numpy), BW = 10.0 GB/s" in text


def test_readme_text_shows_the_range(report):
    assert "| both (2) |" in readme_text(report)
    assert "**0.50** – 3.00" in readme_text(report)


def test_goals_table_names_the_worst_case(report):
    row = next(line for line in goals_table(report).splitlines() if "numpy" in line)
    assert [part.strip() for part in row.split("|")][3:7] == ["1.50", "0.50", "8 × 128 × 128, r 8", "1 of 2"]


def test_empty_parts_leave_no_heading(report):
    report.growth, report.neighbour, report.memory, report.startup = {}, {}, [], []
    text = full_text(report)
    for title in ("Growth", "A busy neighbour", "Memory", "Start-up", "Pairs of cases"):
        assert title not in text
    assert neighbour_table(report) == memory_table(report) == ""


def test_comparisons_are_for_each_element(report):
    """997 columns in the time of 1000 cost 1000/997 an element; one thread at half the speed takes 2."""
    odd, even = Case("step", 64, 1000, 997, threads=2), Case("step", 64, 1000, 1000, threads=2)
    alone, flipped = Case("step", 64, 1000, 1000), Case("step", 64, 1000, 1000, layout="fullyconnected", threads=2)
    taken = {odd: 1.0, even: 1.0, alone: 2.0, flipped: 1.1}
    report.results = [CaseResult(case, {"nblora": [seconds]}) for case, seconds in taken.items()]
    rows = {
        line.split("|")[1].split(",")[0].strip(): line.split("|")[2].strip()
        for line in comparison_table(report).splitlines()
    }
    assert rows["out = 997 against 1000"] == "1.00"
    assert rows["FullyConnected against Dense"] == "1.10"
    assert rows["one thread against 2"] == "2.00"


def test_json_holds_everything(report):
    content = json.loads(report.to_json())
    first, second = content["groups"][0]["results"]
    assert first["peers"]["numpy"]["ratio"]["median"] == pytest.approx(3.0)
    assert first["peers"]["numpy"]["rounds"] == [3e-3] * 5
    assert second["peers"]["jax"] == {"fault": "wrong result: y is off"}
    assert content["limits"][0]["flops"] == 1e10
    assert first["limit_seconds"] / 1e-3 == pytest.approx(first["peers"]["nblora"]["fraction_of_limit"])
    assert content["skipped"] == {"peft": "peft is not installed"}


def test_csv_has_a_row_for_each_case_and_peer(report):
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [(row["n"], row["peer"]) for row in rows] == [
        ("64", "nblora"), ("64", "numpy"), ("64", "jax"), ("8", "nblora"), ("8", "numpy"), ("8", "jax"),
    ]  # fmt: skip
    assert float(rows[1]["ratio"]) == pytest.approx(3.0)
    assert rows[5]["fault"] == "wrong result: y is off"
    assert rows[5]["seconds"] == ""


def test_machine_is_described():
    about = describe_machine()
    assert about["cores"] == usable_cores() >= 1
    assert about["processor"]


def test_markers_are_kept_and_what_stood_between_goes(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for content in ("new", "newer\n\n"):
        replace_between_markers(path, "Some (model 1)", content)
        begin = "<!-- bench:begin Some (model 1) -->"
        assert path.read_text() == f"before\n{begin}\n{content.strip()}\n{END}\nafter\n"


def test_a_run_replaces_the_table_of_its_own_processor_alone(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    for processor, content in (("Intel 6", "one"), ("AMD 25", "two"), ("Intel 6", "three"), ("AMD 25", "four")):
        replace_between_markers(path, processor, content)
    tables = [
        f"<!-- bench:begin {name} -->\n{text}\n{END}" for name, text in (("Intel 6", "three"), ("AMD 25", "four"))
    ]
    assert path.read_text() == "before\n" + "\n\n".join(tables) + "\nafter\n"


@pytest.mark.parametrize("lines", [["nothing"], [BEGIN], [END, BEGIN], [BEGIN, BEGIN, END], [BEGIN, END, BEGIN]])
def test_a_file_without_markers_is_left_alone(tmp_path, lines):
    path = tmp_path / "README.md"
    text = "\n".join(lines)
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold"):
        replace_between_markers(path, "any", "new")
    assert path.read_text() == text


def test_charts_are_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_cases(report, tmp_path / "cases.png")
    assert draw_growth(report, tmp_path / "growth.png")
    for name in ("cases.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    report.results, report.growth = [], {}
    assert not draw_cases(report, tmp_path / "none.png")
    assert not draw_growth(report, tmp_path / "none.png")


def test_a_busy_machine_is_said_so(report):
    report.machine["load_before"] = 0.1
    assert report.busy == ""
    report.machine["load_before"] = 3.0
    assert "**The machine was busy with other work (load 3.0 before" in full_text(report)
    report.machine |= {"load_before": 0.1, "foreign_share": 0.08, "stolen_share": 0.01}
    assert "8.0% of the processor time taken by other processes" in report.busy
    assert "host" not in report.busy
    report.machine |= {"foreign_share": 0.0, "stolen_share": 0.5}
    assert "50.0% of the processor time taken by the machine's host" in report.busy


def ticks(user, idle, stolen):
    return f"cpu  {user} 0 0 {idle} 0 0 0 {stolen} 0 0\ncpu0 1 2 3\n"


def test_a_watch_tells_own_work_from_others_and_from_what_the_host_took(monkeypatch):
    """100 ticks: 30 at work, of which this process and its children did 20; 10 stolen."""
    hertz = os.sysconf("SC_CLK_TCK")
    moments = iter(
        [(ticks(1000, 0, 5), (1.0, 0.0, 2.0, 0.0)), (ticks(1030, 60, 15), (1.0 + 15 / hertz, 0.0, 2.0, 5 / hertz))]
    )

    def read(path):
        text, taken[:] = next(moments)
        return text

    taken = []
    monkeypatch.setattr(machine.Path, "read_text", read)
    monkeypatch.setattr(machine.os, "times", lambda: (*taken, 0.0))
    watch = machine.Watch()
    assert watch.shares() == {"foreign_share": pytest.approx(0.1), "stolen_share": pytest.approx(0.1)}


def test_a_watch_says_nothing_where_the_system_does_not_tell(monkeypatch):
    def refuse(path):
        raise OSError("no such file")

    monkeypatch.setattr(machine.Path, "read_text", refuse)
    assert machine.Watch().shares() == {}


def test_labels_tell_the_cases_of_a_group_apart():
    same, other = Case("step", 8, 16, 16, threads=2), Case("step", 8, 16, 16, dtype="float64", threads=1)
    assert Group("one", (same,)).label(same) == "8 × 16 × 16, r 8"
    assert Group("two", (same, other)).label(other) == "8 × 16 × 16, r 8, float64, 1t"


def test_growth_beyond_the_goal_is_in_bold(report):
    """64 to 128 samples in 2.5 times the time; 32 to 64 may cost what it will."""
    taken = {32: 1.0, 64: 2.5, 128: 2.5 * 2.5, 256: 2.5 * 2.5 * 2.0}
    report.growth = {
        "N": [CaseResult(Case("step", n, 128, 128, threads=2), {"nblora": [seconds]}) for n, seconds in taken.items()]
    }
    factors = [line.split("|")[3].strip() for line in growth_tables(report).splitlines() if line.startswith("| ")][1:]
    assert factors == ["–", "2.50", "**2.50**", "2.00"]
