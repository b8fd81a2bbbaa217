"""What is measured beside the cases: start-up, memory, growth, and the step with a busy neighbour."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from .cases import TIMED_LR, Case, make_arrays
from .peers import BASELINE
from .peers.memory import fresh_peak
from .process import PeerError, PeerMissingError
from .runner import Bench, run_cases
from .summary import CaseResult, spread

# Where compilers keep what they made, by peer: a cold start gets an empty folder there.
CACHES = {"nblora": "NUMBA_CACHE_DIR", "torch-compile": "TORCHINDUCTOR_CACHE_DIR"}
Row = dict[str, Any]
Sizes = tuple[int, int, int]


def _measured(bench: Bench, what: str, sizes: Sizes, rows: Iterable[Row], measure: Callable[[Row], Row]) -> list[Row]:
    """Complete each peer's row by what `measure` finds; one that fails has its `fault` there, a missing one no row."""
    found = []
    for row in rows:
        name = row["peer"]
        if bench.late(f"{what} of {name}"):
            continue
        row |= {"kind": "step" if "step" in bench.peers[name].kinds else "lora-step", "sizes": list(sizes)}
        try:
            row |= measure(row)
        except PeerMissingError:
            continue
        except PeerError as error:
            row["fault"] = str(error)
        found.append(row)
    return found


def startup(bench: Bench, threads: int, repeats: int, cold: bool, sizes: Sizes) -> list[Row]:
    """Time from the start of a process to the end of its first step, with a warm and an empty compile cache.

    Import, first step and a later step are told apart, so that compile time is first minus later.
    """

    def first_step(row: Row, extra: dict[str, str]) -> dict[str, float]:
        case = Case(row["kind"], *sizes, threads=threads, device=bench.device)
        arrays = make_arrays(case)
        begin = time.perf_counter()
        worker, imported = bench.start(row["peer"], threads, extra)
        with worker:
            parts = {
                "import": imported,
                "set_up": worker.ask("set_up", case=case.settings(), arrays=arrays),
                "first": worker.ask("first", lr=TIMED_LR),
                "seconds": time.perf_counter() - begin,
            }
            return parts | {"steady": worker.ask("warm", lr=TIMED_LR, seconds=0.2, least=5)}

    def measure(row: Row) -> Row:
        if row["cache"] == "warm":
            first_step(row, {})  # fills the caches, the disk's included
        taken = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="nblora-bench-") as empty:
                taken.append(first_step(row, {CACHES[row["peer"]]: empty} if row["cache"] == "cold" else {}))
        found: Row = {part: spread([parts[part] for parts in taken])._asdict() for part in taken[0]}
        seconds = found["seconds"]["median"]
        bench.say(f"start-up, {row['cache']} cache: {row['peer']} {seconds:.2f} s to the end of the first step")
        return found | {"repeats": repeats}

    states = ((name, cache) for name in bench.installed for cache in ("warm", "cold")[: 1 + (cold and name in CACHES)])
    return _measured(bench, "start-up", sizes, ({"peer": name, "cache": cache} for name, cache in states), measure)


def memory(bench: Bench, threads: int, sizes: Sizes) -> list[Row]:
    """Peak memory of three steps beyond the case's own arrays, in a process of each peer.

    Imports, and steps on a tiny layer, come first and do not count: what remains is what the peer allocates for the
    case, outputs included.
    """
    if fresh_peak() is None:
        bench.say("peak memory is not measured: this system does not let a process reset its peak")
        return []

    def measure(row: Row) -> Row:
        case, small = (Case(row["kind"], *of, threads=threads) for of in (sizes, (8, 16, 16)))
        with bench.start(row["peer"], threads)[0] as worker:
            worker.ask("set_up", case=small.settings(), arrays=make_arrays(small))
            worker.ask("warm", lr=TIMED_LR, seconds=0.0, least=2)
            found: Row = worker.ask("memory", case=case.settings(), arrays=make_arrays(case), lr=TIMED_LR)
        bench.say(f"memory: {row['peer']} {found['bytes'] / 2**20:.1f} MiB beyond the arrays")
        return found

    return _measured(bench, "memory", sizes, ({"peer": name} for name in bench.installed), measure)


def growth_curves(threads: int, full: bool, device: str = "cpu") -> dict[str, list[Case]]:
    """Cases in which one size doubles and the others stay; the number of threads, too, on the CPU."""
    top = 4096 if full else 2048
    middle = Case("step", 256, 1024, 1024, threads=threads, device=device)
    curves = {
        "N": [replace(middle, n=n) for n in _doublings(1, top)],
        "in": [replace(middle, in_features=n_in) for n_in in _doublings(256, top)],
        "out": [replace(middle, out_features=n_out) for n_out in _doublings(256, top)],
        "rank": [replace(middle, rank=rank) for rank in _doublings(1, 64)],
    }
    if device == "cpu":
        counts = sorted({*_doublings(1, threads), threads})
        curves["threads"] = [replace(middle, threads=count) for count in counts]
    return curves


def _doublings(low: int, high: int) -> list[int]:
    return [low << k for k in range((high // low).bit_length())]


def growth(bench: Bench, threads: int, full: bool) -> dict[str, list[CaseResult]]:
    """nblora's step as one size doubles."""
    curves = growth_curves(threads, full, bench.device)
    alone = replace(bench, peers={BASELINE: bench.peers[BASELINE]})
    wanted = list(dict.fromkeys(case for cases in curves.values() for case in cases))
    measured = {result.case: result for result in run_cases(alone, wanted)}
    return {name: [measured[case] for case in cases if case in measured] for name, cases in curves.items()}


def neighbour(bench: Bench, case: Case) -> dict[str, CaseResult]:
    """Measure `case` with all peers, first alone and then with a process that keeps the last core busy."""
    found = {}
    with bench.crew(case.threads) as crew:
        for state in ("quiet", "busy"):
            if bench.late("the busy neighbour"):
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
        "while True: pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()
