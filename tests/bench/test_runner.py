"""Small runs with real processes: right peers are timed; wrong, missing, failing and silent ones are reported."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from nblora.bench.cases import KINDS, Case, make_arrays
from nblora.bench.peers import PEERS, PeerSpec
from nblora.bench.process import POOLS, PeerError, PeerMissingError, Worker, environment
from nblora.bench.runner import Bench, Effort, run_cases
from nblora.bench.sections import busy_core, growth, growth_curves, memory, neighbour, startup

LITTLE = Effort(rounds=3, burst=0.002, warm=0.005, rates=0.005)
HERE = {name: PEERS[name] for name in ("nblora", "numpy")}

STRANGE = '''
from nblora_peers.numpy_peer import NumpyPeer

class Wrong(NumpyPeer):
    """Forgets the velocity's (1 - m)."""
    def step(self, lr):
        V = self.V.copy()
        super().step(lr)
        self.V = V * self.m + (self.V - V * self.m) / (1 - self.m)

class Failing(NumpyPeer):
    def step(self, lr):
        raise ArithmeticError("cannot divide")

class Ending(NumpyPeer):
    def step(self, lr):
        import os, sys
        print("gave up", file=sys.stderr, flush=True)
        os._exit(3)

class Silent(NumpyPeer):
    def step(self, lr):
        import time
        time.sleep(60)

class Talking(NumpyPeer):
    def step(self, lr):
        print("a library that writes to standard output")
        super().step(lr)
'''


def make_bench(peers, said=None, **settings):
    lines = [] if said is None else said
    return Bench(peers, LITTLE, lines.append, **settings)


@pytest.fixture
def strange(tmp_path):
    (tmp_path / "strange.py").write_text(STRANGE)
    return lambda cls: PeerSpec("strange", cls, ("numpy",), "not to be trusted", folders=(str(tmp_path),))


@pytest.mark.parametrize("layout", ["dense", "fullyconnected"])
def test_right_peers_are_verified_and_timed(layout):
    cases = [Case(kind, 8, 24, 20, 4, dtype, layout) for kind in KINDS for dtype in ("float32", "float64")]
    bench = make_bench(HERE)
    with bench.crew(1) as crew:
        results = [crew.run(case) for case in cases]
    for result in results:
        assert result.faults == {}
        assert set(result.seconds) == set(HERE)
        for rounds in result.seconds.values():
            assert len(rounds) == LITTLE.rounds
            assert min(rounds) > 0
    assert bench.versions["numpy"]["numpy"] == np.__version__


def test_cases_are_measured_with_the_machines_limits():
    cases = [Case("step", 8, 24, 20, 4)]
    bench = make_bench(HERE)
    (result,) = run_cases(bench, cases)
    machine = bench.machines["float32", 1]
    assert result.case == cases[0]
    assert machine.flops > 1e8
    assert machine.bandwidth > 1e8
    assert 0 < result.fraction(machine) < 1


def test_a_wrong_peer_is_reported_and_not_timed(strange):
    said = []
    bench = make_bench(HERE | {"wrong": strange("Wrong")}, said)
    with bench.crew(1) as crew:
        result = crew.run(Case("step", 8, 24, 20, 4))
    assert set(result.seconds) == {"nblora", "numpy"}
    assert result.faults["wrong"].startswith("wrong result: ")
    assert "V is off by" in result.faults["wrong"]
    assert any("wrong is not timed" in line for line in said)


@pytest.mark.parametrize(("cls", "words"), [("Failing", "cannot divide"), ("Ending", "gave up")])
def test_a_peer_that_fails_is_reported_and_the_others_go_on(strange, cls, words):
    bench = make_bench({**HERE, "bad": strange(cls)})
    with bench.crew(1) as crew:
        for kind in ("step", "forward"):  # the forward of the bad peer is fine: its process is started again
            result = crew.run(Case(kind, 8, 24, 20, 4))
            assert {"nblora", "numpy"} <= set(result.seconds)
            assert ("bad" in result.faults) == (kind == "step")
            assert words in result.faults.get("bad", words)


def test_a_silent_peer_is_given_up(strange):
    case = Case("step", 4, 12, 10, 2)
    with Worker(strange("Silent"), 1) as worker:
        worker.ask("start")
        worker.ask("set_up", case=case.settings(), arrays=make_arrays(case))
        with pytest.raises(PeerError, match=r"no answer for 0\.2 s"):
            worker.ask("check", lr=0.0, timeout=0.2)
        assert not worker.alive


def test_what_a_library_prints_does_not_disturb(strange):
    bench = make_bench({"talking": strange("Talking")})
    with bench.crew(1) as crew:
        result = crew.run(Case("step", 4, 12, 10, 2))
    assert result.faults == {}
    assert len(result.seconds["talking"]) == LITTLE.rounds


def test_a_missing_peer_is_skipped_saying_so():
    said = []
    missing = PEERS["numpy"]._replace(module="a_library_that_nobody_has")
    bench = make_bench({**HERE, "absent": missing}, said)
    with bench.crew(1) as crew:
        for _ in range(2):
            result = crew.run(Case("forward", 4, 12, 10, 2))
            assert set(result.seconds) == {"nblora", "numpy"}
            assert result.faults == {}
    assert bench.installed == ["nblora", "numpy"]
    assert "a_library_that_nobody_has is not installed" in bench.skipped["absent"]
    assert sum("skipping absent" in line for line in said) == 1
    with Worker(missing, 1) as worker, pytest.raises(PeerMissingError):
        worker.ask("start")


def test_environment_sets_every_pool():
    for threads in (1, 2):
        found = environment(PEERS["numpy"], threads)
        assert {found[pool] for pool in POOLS} == {str(threads)}
    assert environment(PEERS["numpy"], 1, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_no_case_begins_when_time_is_over():
    said = []
    bench = make_bench(HERE, said, deadline=0.0)
    assert run_cases(bench, [Case("step", 4, 12, 10, 2)]) == []
    assert any("out of time: 1 case(s)" in line for line in said)
    assert startup(bench, 1, 1, False, (4, 12, 10)) == []
    assert memory(bench, 1, (4, 12, 10)) == []
    assert neighbour(bench, Case("step", 4, 12, 10, 2)) == {}


def test_startup_tells_import_and_first_step_apart():
    (own, other) = startup(make_bench(HERE), 1, 1, False, (4, 12, 10))
    assert (own["peer"], other["peer"]) == ("nblora", "numpy")
    for row in (own, other):
        parts = sum(row[part]["median"] for part in ("import", "set_up", "first"))
        assert 0 < parts < row["seconds"]["median"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not reset a process's peak")
def test_memory_finds_what_the_plain_formulas_allocate():
    """NumPy's plain step holds several weight-sized temporaries."""
    rows = {row["peer"]: row for row in memory(make_bench(HERE), 1, (4, 1024, 1024))}
    weight = 4 * 1024 * 1024
    assert rows["numpy"]["arrays"] > 3 * weight
    assert weight < rows["numpy"]["bytes"] < 8 * weight


def test_growth_doubles_one_size_at_a_time():
    curves = growth_curves(2, False)
    assert set(curves) == {"N", "in", "out", "rank", "threads"}
    for name, attribute in (("N", "n"), ("in", "in_features"), ("out", "out_features"), ("rank", "rank")):
        sizes = [getattr(case, attribute) for case in curves[name]]
        assert all(after == 2 * before for before, after in itertools.pairwise(sizes))
    assert [case.threads for case in curves["threads"]] == [1, 2]
    assert [case.threads for case in growth_curves(3, False)["threads"]] == [1, 2, 3]


def test_growth_measures_nblora_alone(monkeypatch):
    cases = [Case("step", n, 12, 10, 2) for n in (2, 4)]
    monkeypatch.setattr("nblora.bench.sections.growth_curves", lambda *_: {"N": cases})
    found = growth(make_bench(HERE), 1, False)
    assert [result.case for result in found["N"]] == cases
    assert all(set(result.seconds) == {"nblora"} for result in found["N"])


def test_neighbour_measures_alone_and_beside_a_busy_process():
    found = neighbour(make_bench(HERE), Case("step", 4, 12, 10, 2))
    assert set(found) == {"quiet", "busy"}
    assert all(set(result.seconds) == set(HERE) for result in found.values())


def test_busy_core_ends_its_process(monkeypatch):
    made, start = [], subprocess.Popen

    def spy(*arguments, **settings):
        made.append(start(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", spy)
    with busy_core():
        assert made[0].poll() is None
    assert made[0].poll() is not None


def test_a_peers_process_does_not_import_nblora(tmp_path):
    """An import of nblora, of Numba above all, would cost every peer start-up time and memory."""
    (tmp_path / "curious.py").write_text(
        "import sys\nfrom nblora_peers.numpy_peer import NumpyPeer\n"
        "class Curious(NumpyPeer):\n"
        "    def forward(self):\n"
        "        assert not {'nblora', 'numba'} & set(sys.modules), 'imported'\n"
        "        super().forward()\n"
    )
    spec = PeerSpec("curious", "Curious", (), "looks around", folders=(str(tmp_path),))
    with make_bench({"curious": spec}).crew(1) as crew:
        assert crew.run(Case("forward", 4, 12, 10, 2)).faults == {}
