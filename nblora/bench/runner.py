"""Cases through all peers: verified first, then timed in alternating rounds, one process at work at a time."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .cases import CHECKED_LR, TIMED_LR, Case, faults, make_arrays, reference
from .limits import Machine, limit_seconds
from .peers import BASELINE, PEERS, PeerSpec
from .process import PeerError, PeerMissingError, Worker
from .summary import Spread, ratios, spread

LEAST_ROUNDS = 3  # of a case that time ran out on
SETTLE = 0.05  # seconds: thread pools of the peer before keep spinning for about as long


@dataclass(frozen=True)
class Effort:
    """How much work goes into a figure: rounds, seconds a burst, of warm-up, and for each of the machine's rates."""

    rounds: int = 15
    burst: float = 0.1
    warm: float = 0.3
    rates: float = 0.5


@dataclass
class CaseResult:
    """What one case gave: a peer's median seconds in every round, or why there are none."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def time(self, peer: str = BASELINE) -> Spread | None:
        """Median and quartiles of the peer's seconds."""
        return spread(self.seconds[peer]) if peer in self.seconds else None

    def ratio(self, peer: str) -> Spread | None:
        """Median and quartiles of the peer's time over nblora's, pair by pair; over 1, nblora is faster."""
        if peer not in self.seconds or BASELINE not in self.seconds:
            return None
        return spread(ratios(self.seconds[peer], self.seconds[BASELINE]))

    def fraction(self, machine: Machine | None, peer: str = BASELINE) -> float | None:
        """Fraction of the machine's limit that the peer reached."""
        taken = self.time(peer)
        return None if taken is None or machine is None else limit_seconds(self.case, machine) / taken.median

    def settings(self, machine: Machine | None) -> dict[str, Any]:
        """As JSON can carry it."""
        peers: dict[str, Any] = {name: {"fault": why} for name, why in self.faults.items()}
        for name, rounds in self.seconds.items():
            ratio, taken = self.ratio(name), spread(rounds)
            peers[name] = {
                "seconds": taken.settings(),
                "ratio": ratio.settings() if ratio else None,
                "fraction_of_limit": self.fraction(machine, name),
                "rounds": rounds,
            }
        limit = limit_seconds(self.case, machine) if machine else None
        return {"case": asdict(self.case), "limit_seconds": limit, "peers": peers}


class Bench:
    """The peers' processes and what was learned of them.

    Parameters
    ----------
    peers : mapping of str to PeerSpec
        In the order of the report; nblora's own among them.
    effort : Effort
    python, own_python : str
        The interpreter of the other peers, and nblora's.
    say : callable
        Takes one line of progress.
    deadline : float, optional
        `time.monotonic()` after which no new case begins.
    device : str
        Where the cases run: "cpu", "cuda" or "cuda:N".
    """

    def __init__(
        self,
        peers: Mapping[str, PeerSpec],
        effort: Effort,
        python: str,
        own_python: str,
        say: Callable[[str], None],
        deadline: float | None = None,
        device: str = "cpu",
    ) -> None:
        self.peers, self.effort, self.say, self.device = dict(peers), effort, say, device
        self._python, self._own_python, self.deadline = python, own_python, deadline
        self.skipped: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.device_description = ""
        self.machines: dict[tuple[str, int], Machine] = {}

    def python(self, name: str) -> str:
        """The interpreter of a peer."""
        return self._own_python if name == BASELINE else self._python

    @property
    def installed(self) -> list[str]:
        """Peers that are not known to be missing."""
        return [name for name in self.peers if name not in self.skipped]

    def late(self) -> bool:
        """Whether the time for new cases is over."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @contextlib.contextmanager
    def crew(self, threads: int, names: Sequence[str] | None = None) -> Iterator["Crew"]:
        """Processes of all installed peers (or of `names`), ended when the block ends."""
        crew = Crew(self, threads, self.installed if names is None else names)
        try:
            with tempfile.TemporaryDirectory(prefix="nblora-bench-") as folder:
                crew.folder = Path(folder)
                yield crew
        finally:
            crew.stop()


class Crew:
    """Processes of several peers with the same number of threads."""

    folder: Path

    def __init__(self, bench: Bench, threads: int, names: Sequence[str]) -> None:
        self.bench, self.threads, self.names = bench, threads, list(names)
        self._workers: dict[str, Worker] = {}

    def worker(self, name: str) -> Worker:
        """Return the peer's process, started (again) where there is none.

        Raises
        ------
        PeerError
            Where it cannot start; a missing library is noted among `Bench.skipped`.
        """
        running = self._workers.get(name)
        if running is not None:
            if running.alive:
                return running
            running.stop()
        spec = self.bench.peers[name]
        worker = Worker(spec, self.threads, self.bench.python(name))
        try:
            about = worker.ask("start", distributions=list(spec.distributions), device=self.bench.device)
        except PeerError as error:
            worker.stop()
            if isinstance(error, PeerMissingError) and name not in self.bench.skipped:
                self.bench.skipped[name] = f"{error} for {self.bench.python(name)}"
                self.bench.say(f"skipping {name}: {self.bench.skipped[name]}")
            raise
        self._workers[name] = worker
        self.bench.versions[name] = {"python": about["python"], **about["versions"]}
        self.bench.device_description = about["device"] or self.bench.device_description
        return worker

    def stop(self) -> None:
        """End all processes."""
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()

    def measure_machine(self, dtype: str) -> Machine | None:
        """Measure P and BW, by NumPy's BLAS and by PyTorch where installed (on a GPU by PyTorch, CuPy and nblora),
        and keep the best so far."""
        key, device = (dtype, self.threads), self.bench.device
        for name in ("numpy", "torch-manual") if device == "cpu" else ("torch-manual", "cupy", BASELINE):
            spec = self.bench.peers.get(name, PEERS[name])
            try:
                with Worker(spec, self.threads, self.bench.python(name)) as worker:
                    worker.ask("start", distributions=[], device=device)
                    seconds = self.bench.effort.rates
                    got = worker.ask("rates", dtype=dtype, threads=self.threads, seconds=seconds, device=device)
            except PeerError:
                continue
            label = spec.distributions[0]
            found = Machine(got["flops"], got["bandwidth"], label, label)
            self.bench.machines[key] = found.best(self.bench.machines.get(key, found))
        return self.bench.machines.get(key)

    def run(self, case: Case) -> CaseResult:
        """Set the case up with every peer, compare the results, and time those that are right."""
        result = CaseResult(case)
        arrays = make_arrays(case)
        right = reference(case, arrays)
        path = self.folder / "arrays.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]
        counts: dict[str, int] = {}
        for name in self.names:
            if name in self.bench.skipped or case.kind not in self.bench.peers[name].kinds:
                continue
            try:
                fault = self._verify(name, case, path, arrays, right)
                if fault:
                    result.faults[name] = fault
                    continue
                counts[name] = self._warm(name)
            except PeerError as error:
                if name not in self.bench.skipped:
                    result.faults[name] = str(error)
        for name, why in result.faults.items():
            self.bench.say(f"  {name} is not timed: {why.splitlines()[-1]}")
        self._time(result, counts)
        return result

    def _verify(
        self, name: str, case: Case, path: Path, arrays: dict[str, np.ndarray], right: dict[str, np.ndarray]
    ) -> str:
        worker = self.worker(name)
        worker.ask("set_up", case=case.settings(), arrays=str(path))
        results = self.folder / "results.npz"
        worker.ask("check", lr=CHECKED_LR, results=str(results))
        with np.load(results) as file:
            found = faults(case, arrays, right, {key: file[key] for key in file.files})
        results.unlink()
        return "wrong result: " + "; ".join(found) if found else ""

    def _warm(self, name: str) -> int:
        """Warm up, and return how many repeats make a burst."""
        effort = self.bench.effort
        each = self.worker(name).ask("warm", lr=TIMED_LR, seconds=effort.warm, least=3)["seconds"]
        return max(1, min(20_000, round(effort.burst / max(each, 1e-7))))

    def _time(self, result: CaseResult, counts: dict[str, int]) -> None:
        names = list(counts)
        rounds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(self.bench.effort.rounds):
            if turn >= LEAST_ROUNDS and self.bench.late():
                break
            start = turn % max(1, len(names))
            for name in names[start:] + names[:start]:
                if name in result.faults:
                    continue
                time.sleep(SETTLE)
                try:
                    taken = self.worker(name).ask("burst", lr=TIMED_LR, count=counts[name])["seconds"]
                except PeerError as error:
                    result.faults[name] = str(error)
                    continue
                rounds[name].append(taken)
        for name in names:
            if name not in result.faults:
                result.seconds[name] = rounds[name]
            with contextlib.suppress(PeerError):
                self.worker(name).ask("drop")


def run_cases(bench: Bench, cases: Sequence[Case]) -> list[CaseResult]:
    """Measure the cases, number of threads by number of threads, the machine's limits before and after each lot."""
    results: list[CaseResult] = []
    for threads in sorted({case.threads for case in cases}, reverse=True):
        lot = [case for case in cases if case.threads == threads]
        with bench.crew(threads) as crew:
            dtypes = list(dict.fromkeys(case.dtype for case in lot))
            for dtype in [] if bench.late() else dtypes:
                bench.say(f"measuring the machine: {dtype}, {threads} thread(s)")
                crew.measure_machine(dtype)
            for number, case in enumerate(lot, 1):
                if bench.late():
                    bench.say(f"out of time: {len(lot) - number + 1} case(s) with {threads} thread(s) left out")
                    break
                began = time.monotonic()
                result = crew.run(case)
                results.append(result)
                bench.say(f"[{number}/{len(lot)}] {_line(result)} ({time.monotonic() - began:.1f} s)")
            for dtype in [] if bench.late() else dtypes:
                crew.measure_machine(dtype)
    return results


def _line(result: CaseResult) -> str:
    """One line of progress."""
    case, own = result.case, result.time()
    text = f"{case.kind} {case.shape} {case.dtype} {case.layout} {case.threads}t"
    if own is None:
        return f"{text}: nblora was not timed"
    found = ((name, result.ratio(name)) for name in result.seconds if name != BASELINE)
    against = (f"{name} {ratio.median:.2f}" for name, ratio in found if ratio)
    return f"{text}: {1e3 * own.median:.3f} ms; " + ", ".join(against)
