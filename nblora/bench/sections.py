"""What is measured beside the cases: start-up, memory, growth, and the step with a busy neighbour."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .cases import TIMED_LR, Case, make_arrays
from .peers import BASELINE
from .process import PeerError, PeerMissingError, Worker
from .runner import Bench, CaseResult, run_cases
from .summary import spread

# Where compilers keep what they made, by peer: a cold start gets an empty folder in each.
CACHES = {"nblora": ("NUMBA_CACHE_DIR",), "torch-compile": ("TORCHINDUCTOR_CACHE_DIR",)}


def _kind_for(bench: Bench, name: str) -> str:
    """The step, of whatever kind the peer knows."""
    return "step" if "step" in bench.peers[name].kinds else "lora-step"


# --- start-up ----------------------------------------------------------------------------------------------------


def startup(bench: Bench, threads: int, repeats: int, cold: bool, sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Time from the start of a process to the end of its first step, with a warm and an empty compile cache.

    Import, first step and a later step are told apart, so that compile time is first minus later.
    """
    rows = []
    for name in bench.installed:
        if bench.late():
            bench.say("out of time: start-up left out for the remaining peers")
            break
        case = Case(_kind_for(bench, name), *sizes, threads=threads, device=bench.device)
        caches = ("warm", "cold") if cold and name in CACHES else ("warm",)
        for cache in caches:
            try:
                row = _startup_row(bench, name, case, cache, repeats)
            except PeerError as error:
                if not isinstance(error, PeerMissingError):
                    rows.append({"peer": name, "cache": cache, "fault": str(error)})
                continue
            rows.append(row)
            bench.say(f"start-up, {cache} cache: {name} {row['seconds']['median']:.2f} s to the end of the first step")
    return rows


def _startup_row(bench: Bench, name: str, case: Case, cache: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="nblora-bench-") as folder:
        arrays = Path(folder) / "arrays.npz"
        np.savez(arrays, **make_arrays(case))  # type: ignore[arg-type]
        if cache == "warm":
            _first_step(bench, name, case, arrays, {})  # fills the caches, the disk's included
        taken = []
        for number in range(repeats):
            empty = {}
            if cache == "cold":
                for variable in CACHES[name]:
                    place = Path(folder) / f"{variable}-{number}"
                    place.mkdir()
                    empty[variable] = str(place)
            taken.append(_first_step(bench, name, case, arrays, empty))
    row: dict[str, Any] = {"peer": name, "cache": cache, "kind": case.kind, "repeats": repeats}
    for key in ("seconds", "import", "set_up", "first", "steady"):
        row[key] = spread([parts[key] for parts in taken]).settings()
    return row


def _first_step(bench: Bench, name: str, case: Case, arrays: Path, extra: dict[str, str]) -> dict[str, float]:
    once = {"case": case.settings(), "arrays": str(arrays), "lr": TIMED_LR}
    begin = time.perf_counter()
    with Worker(bench.peers[name], case.threads, bench.python(name), once, extra) as worker:
        worker.answer()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, **worker.answer()}


# --- memory ------------------------------------------------------------------------------------------------------


def memory(bench: Bench, threads: int, sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Peak memory of three steps beyond the case's own arrays, in a process of each peer.

    Imports, and a step on a tiny layer, come first and do not count: what remains is what the peer allocates for the
    case, outputs included.
    """
    rows: list[dict[str, Any]] = []
    for name in bench.installed:
        if bench.late():
            bench.say("out of time: memory left out for the remaining peers")
            break
        kind = _kind_for(bench, name)
        case, small = Case(kind, *sizes, threads=threads), Case(kind, 8, 16, 16, threads=threads)
        try:
            with (
                tempfile.TemporaryDirectory(prefix="nblora-bench-") as folder,
                Worker(bench.peers[name], threads, bench.python(name)) as worker,
            ):
                paths = [str(Path(folder) / f"{of.n}-{of.in_features}.npz") for of in (case, small)]
                for path, of in zip(paths, (case, small), strict=True):
                    np.savez(path, **make_arrays(of))  # type: ignore[arg-type]
                worker.ask("start", distributions=[])
                got = worker.ask(
                    "memory",
                    case=case.settings(),
                    small=small.settings(),
                    arrays=paths[0],
                    small_arrays=paths[1],
                    lr=TIMED_LR,
                )
        except PeerError as error:
            if not isinstance(error, PeerMissingError):
                rows.append({"peer": name, "kind": kind, "fault": str(error)})
            continue
        if got["bytes"] is None:
            bench.say("peak memory is not measured: this system does not let a process reset its peak")
            return []
        rows.append({"peer": name, "kind": kind, "sizes": list(sizes), **got})
        bench.say(f"memory: {name} {got['bytes'] / 2**20:.1f} MiB beyond the arrays")
    return rows


# --- growth ------------------------------------------------------------------------------------------------------


def growth_curves(threads: int, full: bool, device: str = "cpu") -> dict[str, list[Case]]:
    """Cases in which one size doubles and the others stay; the number of threads, too, on the CPU."""
    top = 4096 if full else 2048
    step = partial(Case, "step", threads=threads, device=device)
    doubled = {
        "N": [step(n, 1024, 1024) for n in _doublings(1, top)],
        "in": [step(256, n_in, 1024) for n_in in _doublings(256, top)],
        "out": [step(256, 1024, n_out) for n_out in _doublings(256, top)],
        "rank": [step(256, 1024, 1024, rank) for rank in _doublings(1, 64)],
    }
    if device != "cpu":
        return doubled
    counts = [*_doublings(1, threads)]
    if counts[-1] != threads:
        counts.append(threads)
    doubled["threads"] = [Case("step", 256, 1024, 1024, threads=count) for count in counts]
    return doubled


def _doublings(low: int, high: int) -> list[int]:
    return [low << k for k in range((high // low).bit_length())]


def growth(bench: Bench, threads: int, full: bool) -> dict[str, list[CaseResult]]:
    """nblora's step as one size doubles."""
    curves = growth_curves(threads, full, bench.device)
    python = bench.python(BASELINE)
    own = {BASELINE: bench.peers[BASELINE]}
    alone = Bench(own, bench.effort, python, python, bench.say, bench.deadline, bench.device)
    alone.machines = bench.machines
    wanted = list(dict.fromkeys(case for cases in curves.values() for case in cases))
    measured = {result.case: result for result in run_cases(alone, wanted)}
    return {name: [measured[case] for case in cases if case in measured] for name, cases in curves.items()}


# --- a busy neighbour --------------------------------------------------------------------------------------------


def neighbour(bench: Bench, case: Case) -> dict[str, CaseResult]:
    """Measure `case` with all peers, first alone and then with a process that keeps the last core busy."""
    found = {}
    with bench.crew(case.threads) as crew:
        for state in ("quiet", "busy"):
            if bench.late():
                bench.say("out of time: the busy neighbour left out")
                return {}
            with busy_core() if state == "busy" else contextlib.nullcontext():
                found[state] = crew.run(case)
            own = found[state].time()
            bench.say(f"{state} neighbour: {'not timed' if own is None else f'{1e3 * own.median:.3f} ms'}")
    return found


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy while the block runs: the last one, where the system lets a process choose."""
    code = (
        "import os\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
        "print('busy', flush=True)\n"
        "while True: pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ))
    try:
        if process.stdout is not None:
            process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
