"""The peers and their driver in this process: each gives what the reference gives, for every kind, layout and dtype."""

import io
import json

import numpy as np
import pytest

from nblora.bench.cases import CHECKED_LR, DTYPES, KINDS, LAYOUTS, TIMED_LR, Case, faults, make_arrays, reference
from nblora.bench.peers import PEERS, rates
from nblora.bench.peers import memory as process_memory
from nblora.bench.peers.worker import Driver, once, serve


def save(case, folder, name="arrays.npz"):
    arrays = make_arrays(case)
    np.savez(folder / name, **arrays)
    return arrays, str(folder / name)


def driver_of(name):
    driver = Driver(PEERS[name].module, PEERS[name].cls)
    if driver.start([]).keys() & {"missing", "unavailable"}:
        pytest.skip(f"the library of {name} is not installed, or has no CPU")
    return driver


@pytest.mark.parametrize("name", [name for name in PEERS if name != "torch-compile"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peer_gives_what_the_reference_gives(name, kind, layout, dtype, tmp_path):
    if kind not in PEERS[name].kinds:
        pytest.skip(f"{name} does not know the kind {kind}")
    driver = driver_of(name)
    case = Case(kind, 9, 24, 20, 4, dtype, layout)
    arrays, path = save(case, tmp_path)
    driver.set_up(case.settings(), path)
    driver.check(CHECKED_LR, str(tmp_path / "results.npz"))
    with np.load(tmp_path / "results.npz") as file:
        assert faults(case, arrays, reference(case, arrays), dict(file)) == []


def test_warm_and_burst_time_the_case(tmp_path):
    driver = driver_of("numpy")
    case = Case("step", 4, 12, 10, 2)
    driver.set_up(case.settings(), save(case, tmp_path)[1])
    assert driver.warm(TIMED_LR, 0.0, 3)["seconds"] > 0
    assert driver.burst(TIMED_LR, 4)["seconds"] > 0
    driver.drop()
    assert driver.peer is None


def test_memory_needs_a_system_that_tells(tmp_path, monkeypatch):
    driver = driver_of("numpy")
    case, small = Case("step", 4, 64, 64), Case("step", 2, 8, 8)
    paths = save(case, tmp_path)[1], save(small, tmp_path, "small.npz")[1]
    monkeypatch.setattr("nblora.bench.peers.worker.reset_peak", lambda: False)
    assert driver.memory(case.settings(), small.settings(), *paths, TIMED_LR) == {"bytes": None}
    monkeypatch.setattr("nblora.bench.peers.worker.reset_peak", lambda: True)
    monkeypatch.setattr("nblora.bench.peers.worker.resident_bytes", lambda: 1000)
    arrays = sum(array.nbytes for array in make_arrays(case).values())
    monkeypatch.setattr("nblora.bench.peers.worker.peak_bytes", lambda: 1000 + arrays + 77)
    assert driver.memory(case.settings(), small.settings(), *paths, TIMED_LR) == {"bytes": 77, "arrays": arrays}


def test_where_the_system_does_not_tell(monkeypatch):
    def refuse(*arguments):
        raise OSError("no such file")

    monkeypatch.setattr("builtins.open", refuse)
    assert process_memory.resident_bytes() == 0
    assert process_memory.reset_peak() is False


def test_rates_are_positive_and_finite(monkeypatch):
    monkeypatch.setattr(rates, "PRODUCT_SIZES", (16,))
    monkeypatch.setattr(rates, "COPY_BYTES", 2**16)
    for dtype in DTYPES:
        for threads in (1, 2):
            found = rates.measure("numpy", dtype, threads, 0.001)
            assert 0 < found["flops"] < 1e14
            assert 0 < found["bandwidth"] < 1e14


def test_a_copy_covers_the_whole_array():
    """Three threads on a length that three does not divide."""
    _, copy = rates._numpy_calls(3)
    source, target = np.arange(100.0), np.zeros(100)
    copy(source, target)()
    np.testing.assert_array_equal(target, source)


def test_serve_answers_line_by_line_and_survives_errors():
    commands = [{"do": "start", "distributions": ["numpy", "no-such-thing"]}, {"do": "burst", "lr": 0.0, "count": 1}]
    commands += [{"do": "no_such_command"}, {"do": "drop"}]
    answers = io.StringIO()
    lines = io.StringIO("".join(json.dumps(command) + "\n" for command in commands))
    serve(lines, answers, Driver(PEERS["numpy"].module, PEERS["numpy"].cls))
    started, failed, unknown, dropped = map(json.loads, answers.getvalue().splitlines())
    assert started["versions"] == {"numpy": np.__version__}
    assert "AttributeError" in failed["error"]
    assert "no_such_command" in unknown["error"]
    assert dropped == {}


def test_once_answers_at_the_end_of_the_first_step_and_then_with_the_parts(tmp_path):
    case = Case("step", 4, 12, 10, 2)
    answers = io.StringIO()
    driver = Driver(PEERS["numpy"].module, PEERS["numpy"].cls)
    once(answers, driver, case.settings(), save(case, tmp_path)[1], TIMED_LR)
    first, parts = map(json.loads, answers.getvalue().splitlines())
    assert first == {}
    assert set(parts) == {"import", "set_up", "first", "steady"}
    answers = io.StringIO()
    once(answers, Driver("no_such_module", "Nobody"), case.settings(), "", TIMED_LR)
    assert json.loads(answers.getvalue()) == {"missing": "no_such_module"}
