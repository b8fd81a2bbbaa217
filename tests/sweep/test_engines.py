"""Sweeps in processes and on Dask: the serial sweep's results bit for bit, whatever is killed on the way."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nblora.sweep import Sweep, read_results
from nblora.sweep.engines import run_in_processes

from .conftest import results_only

PATIENCE = 120  # seconds until a test gives up waiting

pytestmark = pytest.mark.filterwarnings(
    # Dask's own, when a cluster whose worker was killed is taken down.
    "default::ResourceWarning",
    "default::pytest.PytestUnraisableExceptionWarning",
    "default::pytest.PytestUnhandledThreadExceptionWarning",
)


@pytest.fixture
def serial(sweep, tmp_path):
    """The records of the 64 runs, one after the other in this process."""
    return sweep.run(tmp_path / "serial.jsonl", workers=1)


@pytest.fixture
def long_sweep(sweep, data, base):
    """The 64 runs, each long enough to be killed in the middle."""
    return Sweep(data, [settings | {"epochs": 40} for settings in sweep.runs.values()], base=base)


@pytest.fixture
def cluster():
    """A Dask cluster of two worker processes on this machine."""
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
    )
    with cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(2)
        yield cluster, client


def wait_for_lines(path, count, process=None):
    """Wait until the results file has `count` lines."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process is None or process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError(f"no {count} results within {PATIENCE} s")


def kill_when(path, count, choose, killed):
    """In a thread: SIGKILL the process that `choose` returns once the file has `count` lines."""

    def act():
        wait_for_lines(path, count)
        killed.append(choose())
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def assert_each_run_once(path, sweep):
    keys = [record["key"] for record in read_results(path)]
    assert sorted(keys) == sorted(sweep.runs)


def test_processes_equal_serial(sweep, serial, tmp_path):
    path = tmp_path / "results.jsonl"
    records = sweep.run(path, workers=2)
    assert results_only(records) == results_only(serial)
    assert len({record["process"] for record in records} - {os.getpid()}) == 2
    assert_each_run_once(path, sweep)


@pytest.mark.slow
def test_killed_worker_process_loses_nothing(long_sweep, tmp_path):
    path, killed = tmp_path / "results.jsonl", []
    thread = kill_when(path, 8, lambda: multiprocessing.active_children()[0].pid, killed)
    records = long_sweep.run(path, workers=2)
    thread.join(PATIENCE)
    assert len(killed) == 1
    assert len({record["process"] for record in records}) > 2
    assert_each_run_once(path, long_sweep)
    assert results_only(records) == results_only(long_sweep.run(tmp_path / "serial.jsonl", workers=1))


def test_workers_that_never_come_up_are_given_up(sweep, monkeypatch):
    """Without an end to the attempts, a machine on which no worker can live would be tried for ever."""
    monkeypatch.setattr("nblora.sweep.engines._start_worker", os._exit)  # the task as exit status: a worker's death
    runs = dict(list(sweep.runs.items())[:2])
    records = list(run_in_processes(1, runs, 2))
    assert [record["status"] for record in records] == ["failed", "failed"]
    assert "a worker process died" in records[0]["error"]


@pytest.mark.slow
def test_dask_equals_serial(sweep, serial, cluster, tmp_path):
    path = tmp_path / "results.jsonl"
    records = sweep.run(path, client=cluster[1])
    assert len(records) == 64
    assert results_only(records) == results_only(serial)
    assert len({record["process"] for record in records}) == 2
    assert_each_run_once(path, sweep)


@pytest.mark.slow
def test_dask_by_address_and_by_cluster_name(sweep, serial, cluster, tmp_path):
    some = dict(list(sweep.runs.items())[:5])
    sweep.runs = some
    expected = results_only(record for record in serial if record["key"] in some)
    by_address = sweep.run(tmp_path / "address.jsonl", scheduler=cluster[0].scheduler_address)
    by_name = sweep.run(tmp_path / "name.jsonl", cluster="dask", workers=1)
    assert results_only(by_address) == results_only(by_name) == expected


@pytest.mark.slow
def test_killed_dask_worker_loses_nothing(long_sweep, cluster, tmp_path):
    path, killed = tmp_path / "results.jsonl", []
    thread = kill_when(path, 16, lambda: cluster[0].workers[0].pid, killed)
    records = long_sweep.run(path, client=cluster[1])
    thread.join(PATIENCE)
    assert len(killed) == 1
    assert killed[0] in {record["process"] for record in records}
    assert len(read_results(path)) == 64
    assert_each_run_once(path, long_sweep)
    assert results_only(records) == results_only(long_sweep.run(tmp_path / "serial.jsonl", workers=1))


@pytest.mark.slow
def test_all_dask_workers_killed_and_the_data_with_them(long_sweep, cluster, tmp_path):
    path = tmp_path / "results.jsonl"

    def kill_both():
        wait_for_lines(path, 4)
        for worker in list(cluster[0].workers.values()):
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(worker.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_both, daemon=True)
    thread.start()
    long_sweep.runs = dict(list(long_sweep.runs.items())[:24])
    records = long_sweep.run(path, client=cluster[1])
    thread.join(PATIENCE)
    assert {record["status"] for record in records} == {"done"}
    assert_each_run_once(path, long_sweep)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["--workers", "1"], ["--workers", "2"], ["--workers", "2", "--cluster", "dask"]])
def test_killed_sweep_goes_on_where_it_was(long_sweep, data, base, tmp_path, engine):
    if "dask" in engine:
        pytest.importorskip("distributed")
    np.savez(tmp_path / "data.npz", **vars(data))
    base.save(tmp_path / "base.safetensors")
    (tmp_path / "sweep.toml").write_text(
        '[data]\nfile = "data.npz"\n[base]\ncheckpoint = "base.safetensors"\n'
        '[grid]\nmethod = ["head", "lora", "delta", "full"]\nrank = [1, 2]\ndelta_scaling = [0.1, 0.5]\n'
        f"seed = {list(range(8))}\n[fixed]\nepochs = 40\nlr = 0.01\nlora_dropout = 0.1\n"
    )
    path = tmp_path / "sweep.jsonl"
    arguments = ["sweep", str(tmp_path / "sweep.toml"), *engine]
    command = [sys.executable, "-c", f"from nblora.cli import main; main({arguments!r})"]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_lines(path, 10, first)
    finally:
        first.kill()
        first.wait()
    wait_for_end_of_group(first.pid)
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    finished = [json.loads(line)["key"] for line in whole.splitlines()]
    assert 10 <= len(finished) < 64
    path.write_bytes(whole + b'{"format": "nblora.sweep", "versi')  # what a kill may leave of a line
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    assert path.read_bytes().startswith(whole)
    assert_each_run_once(path, long_sweep)
    by_key = {record["key"]: record for record in read_results(path)}
    serial = long_sweep.run(tmp_path / "serial.jsonl", workers=1)
    assert results_only(by_key[key] for key in long_sweep.runs) == results_only(serial)


def wait_for_end_of_group(group):
    """No worker outlives the sweep that it works for."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.05)
    raise AssertionError("processes of the killed sweep are still there")


@pytest.mark.slow
def test_ctrl_c_on_a_sweep_ends_it_with_130_and_no_traceback(tmp_path, rng):
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(4000, 8)).astype("float32"), y=rng.integers(2, size=4000))
    (tmp_path / "sweep.toml").write_text(
        '[data]\nfile = "a.npz"\n[grid]\nmethod = ["full"]\nseed = [0, 1, 2, 3]\n[fixed]\nepochs = 100000\n'
    )
    # A shell's background jobs ignore Ctrl-C, and what they start does too; a terminal's do not.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from nblora.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "sweep", "sweep.toml", "--workers", "2"], cwd=tmp_path, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "sweep.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(4)  # by now its workers train
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    try:
        _, text = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # has every process say where it stands
        pytest.fail(process.communicate()[1])
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "interrupted" in text
