"""The peers and their driver in this process: each gives what the reference gives, for every kind, layout and dtype."""

import io

import numpy as np
import pytest

from nblora.bench.cases import CHECKED_LR, DTYPES, KINDS, LAYOUTS, TIMED_LR, Case, faults, make_arrays, reference
from nblora.bench.peers import PEERS, rates
from nblora.bench.peers import memory as process_memory
from nblora.bench.peers.messages import receive, send
from nblora.bench.peers.worker import Driver, Refusal, serve, taken_over


def driver_of(name):
    driver = Driver(PEERS[name].module, PEERS[name].cls)
    try:
        driver.start()
    except Refusal:
        pytest.skip(f"the library of {name} is not installed, or has no CPU")
    return driver


@pytest.mark.parametrize("name", [name for name in PEERS if name != "torch-compile"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peer_gives_what_the_reference_gives(name, kind, layout, dtype):
    if kind not in PEERS[name].kinds:
        pytest.skip(f"{name} does not know the kind {kind}")
    driver = driver_of(name)
    case = Case(kind, 9, 24, 20, 4, dtype, layout)
    arrays = make_arrays(case)
    driver.set_up(case.settings(), dict(arrays))
    assert faults(case, arrays, reference(case, arrays), driver.check(CHECKED_LR)) == []


def test_first_warm_and_burst_time_the_case():
    driver = driver_of("numpy")
    case = Case("step", 4, 12, 10, 2)
    assert driver.set_up(case.settings(), make_arrays(case)) > 0
    assert driver.first(TIMED_LR) > 0
    assert driver.warm(TIMED_LR, 0.0, 3) > 0
    assert driver.burst(TIMED_LR, 4) > 0
    driver.drop()
    assert driver.peer is None


def test_memory_is_the_peak_beyond_the_cases_arrays(monkeypatch):
    driver = driver_of("numpy")
    case = Case("step", 4, 64, 64)
    monkeypatch.setattr("nblora.bench.peers.worker.fresh_peak", lambda: 1000)
    monkeypatch.setattr("nblora.bench.peers.worker.peak_bytes", lambda: 1077)
    size = sum(array.nbytes for array in make_arrays(case).values())
    assert driver.memory(case.settings(), make_arrays(case), TIMED_LR) == {"bytes": 77, "arrays": size}


def test_where_the_system_does_not_tell(monkeypatch):
    def refuse(*arguments):
        raise OSError("no such file")

    monkeypatch.setattr("builtins.open", refuse)
    assert process_memory.fresh_peak() is None


def test_a_set_up_leaves_nothing_of_the_message():
    """What a peer has copied into its own form is freed: memory would count it twice otherwise."""
    arrays = {"x": np.ones(3)}
    own = taken_over(arrays)
    assert arrays == {}
    np.testing.assert_array_equal(own["x"], np.ones(3))


def test_rates_are_positive_and_finite(monkeypatch):
    monkeypatch.setitem(rates.SIZES, "cpu", ((16,), 2**16))
    for dtype in DTYPES:
        for threads in (1, 2):
            found = driver_of("numpy").rates(dtype=dtype, threads=threads, seconds=0.001, device="cpu")
            assert 0 < found["flops"] < 1e14
            assert 0 < found["bandwidth"] < 1e14


def test_a_copy_covers_the_whole_array():
    """Three threads on a length that three does not divide."""
    source, target = np.arange(100.0), np.zeros(100)
    driver_of("numpy").make.tools("cpu", 3).copy(source, target)
    np.testing.assert_array_equal(target, source)


def test_serve_answers_one_by_one_and_survives_errors():
    commands = [("start", {}), ("versions", {"distributions": ["numpy", "no-such-thing"]})]
    commands += [("burst", {"lr": 0.0, "count": 1}), ("no_such_command", {}), ("drop", {})]
    asked, answers = io.BytesIO(), io.BytesIO()
    for do, arguments in commands:
        send(asked, {"do": do, **arguments})
    asked.seek(0)
    serve(asked, answers, Driver(PEERS["numpy"].module, PEERS["numpy"].cls))
    answers.seek(0)
    started, versions, failed, unknown, dropped = (receive(answers) for _ in commands)
    assert "done" in started
    assert versions["done"]["numpy"] == np.__version__
    assert "no-such-thing" not in versions["done"]
    assert "AttributeError" in failed["error"]
    assert "no_such_command" in unknown["error"]
    assert dropped == {"done": None}


def test_a_message_brings_its_arrays_as_they_were_and_half_a_message_is_the_end():
    stream = io.BytesIO()
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 2))}
    send(stream, {"do": "check", "lr": 0.1, "arrays": arrays})
    whole = stream.getvalue()
    got = receive(io.BytesIO(whole))
    assert (got["do"], got["lr"]) == ("check", 0.1)
    for name, array in arrays.items():
        np.testing.assert_array_equal(got["arrays"][name], array)
        assert got["arrays"][name].dtype == array.dtype
    for cut in (0, 5, len(whole) - 1):
        with pytest.raises(EOFError):
            receive(io.BytesIO(whole[:cut]))
