"""Cases through all peers: verified first, then timed in alternating rounds, one process at work at a time."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .cases import CHECKED_LR, TIMED_LR, Case, faults, make_arrays, reference
from .limits import Machine
from .peers import BASELINE, PEERS, PeerSpec
from .process import PeerError, PeerMissingError, Worker
from .summary import CaseResult

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
class Bench:
    """What is compared, and what was learned of the peers.

    Parameters
    ----------
    peers : mapping of str to PeerSpec
        In the order of the report; nblora's own among them.
    effort : Effort
    say : callable
        Takes one line of progress.
    python : str
        The interpreter of the other peers.
    deadline : float
        `time.monotonic()` after which no new case begins.
    device : str
        Where the cases run: "cpu", "cuda" or "cuda:N".
    """

    peers: Mapping[str, PeerSpec]
    effort: Effort
    say: Callable[[str], None]
    python: str = sys.executable
    deadline: float = float("inf")
    device: str = "cpu"
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    machines: dict[tuple[str, int], Machine] = field(default_factory=dict)
    device_description: str = ""

    @property
    def installed(self) -> list[str]:
        """Peers that are not known to be missing."""
        return [name for name in self.peers if name not in self.skipped]

    def late(self, left_out: str = "") -> bool:
        """Whether the time for new cases is over; says what is left out then."""
        over = time.monotonic() > self.deadline
        if over and left_out:
            self.say(f"out of time: {left_out} left out")
        return over

    def start(self, name: str, threads: int, extra: Mapping[str, str] | None = None) -> tuple[Worker, float]:
        """Start a peer's process; return it and the seconds that the import took.

        Raises
        ------
        PeerError
            Where it cannot start; a missing library is noted among `skipped`.
        """
        python = sys.executable if name == BASELINE else self.python
        worker = Worker(self.peers.get(name) or PEERS[name], threads, python, extra)
        try:
            about = worker.ask("start", device=self.device)
        except PeerError as error:
            worker.close()
            if isinstance(error, PeerMissingError) and name in self.installed:
                self.skipped[name] = f"{error} for {python}"
                self.say(f"skipping {name}: {self.skipped[name]}")
            raise
        self.device_description = about["device"] or self.device_description
        return worker, about["seconds"]

    def crew(self, threads: int, names: Sequence[str] | None = None) -> "Crew":
        """Processes of all installed peers (or of `names`), ended when the block ends."""
        return Crew(self, threads, self.installed if names is None else names)


class Crew(contextlib.ExitStack):
    """Processes of several peers with the same number of threads."""

    def __init__(self, bench: Bench, threads: int, names: Sequence[str]) -> None:
        super().__init__()
        self.bench, self.threads, self.names = bench, threads, names
        self._workers: dict[str, Worker] = {}

    def worker(self, name: str) -> Worker:
        """Return the peer's process, started (again) where there is none; PeerError where it cannot start."""
        if name not in self._workers or not self._workers[name].alive:
            worker, _ = self.bench.start(name, self.threads)
            self._workers[name] = self.enter_context(worker)
            self.bench.versions[name] = worker.ask("versions", distributions=self.bench.peers[name].distributions)
        return self._workers[name]

    def measure_machine(self, dtype: str) -> None:
        """Measure P and BW, by NumPy's BLAS and by PyTorch where installed (on a GPU by PyTorch, CuPy and nblora),
        and keep the best so far."""
        bench, threads = self.bench, self.threads
        for name in ("numpy", "torch-manual") if bench.device == "cpu" else ("torch-manual", "cupy", BASELINE):
            with contextlib.suppress(PeerError), bench.start(name, threads)[0] as worker:
                seconds, library = bench.effort.rates, PEERS[name].distributions[0]
                rates = worker.ask("rates", dtype=dtype, threads=threads, seconds=seconds, device=bench.device)
                found = Machine(**rates, flops_by=library, bandwidth_by=library)
                bench.machines[dtype, threads] = found.best(bench.machines.get((dtype, threads), found))

    def run(self, case: Case) -> CaseResult:
        """Set the case up with every peer, compare the results, and time those that are right."""
        result = CaseResult(case)
        arrays = make_arrays(case)
        right = reference(case, arrays)
        counts: dict[str, int] = {}
        for name in self.names:
            if case.kind in self.bench.peers[name].kinds and name not in self.bench.skipped:
                with self._noting(result, name):
                    counts[name] = self._prepare(name, case, arrays, right)
        self._time(result, counts)
        return result

    @contextlib.contextmanager
    def _noting(self, result: CaseResult, name: str) -> Iterator[None]:
        """A peer's failure becomes the result's, unless its library is missing, which was said before."""
        try:
            yield
        except PeerError as error:
            if name not in self.bench.skipped:
                result.faults[name] = str(error)
                self.bench.say(f"  {name} is not timed: {str(error).splitlines()[-1]}")

    def _prepare(self, name: str, case: Case, arrays: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> int:
        """Set up, verify and warm up; return how many repeats make a burst."""
        worker, effort = self.worker(name), self.bench.effort
        worker.ask("set_up", case=case.settings(), arrays=arrays)
        found = faults(case, arrays, right, worker.ask("check", lr=CHECKED_LR))
        if found:
            raise PeerError("wrong result: " + "; ".join(found))
        each = worker.ask("warm", lr=TIMED_LR, seconds=effort.warm, least=3)
        return max(1, min(20_000, round(effort.burst / max(each, 1e-7))))

    def _time(self, result: CaseResult, counts: dict[str, int]) -> None:
        rounds: dict[str, list[float]] = {name: [] for name in counts}
        for turn in range(self.bench.effort.rounds):
            if turn >= LEAST_ROUNDS and self.bench.late():
                break
            names = np.roll([name for name in counts if name not in result.faults], -turn)
            for name in names.tolist():
                time.sleep(SETTLE)
                with self._noting(result, name):
                    rounds[name].append(self.worker(name).ask("burst", lr=TIMED_LR, count=counts[name]))
        result.seconds = {name: taken for name, taken in rounds.items() if name not in result.faults}
        for name in result.seconds:
            self.worker(name).ask("drop")


def run_cases(bench: Bench, cases: Sequence[Case]) -> list[CaseResult]:
    """Measure the cases, number of threads by number of threads, the machine's limits before and after each lot."""
    results: list[CaseResult] = []
    for threads in sorted({case.threads for case in cases}, reverse=True):
        lot = [case for case in cases if case.threads == threads]
        dtypes = dict.fromkeys(case.dtype for case in lot)
        with bench.crew(threads) as crew:
            for dtype in dtypes if not bench.late() else ():
                bench.say(f"measuring the machine: {dtype}, {threads} thread(s)")
                crew.measure_machine(dtype)
            for number, case in enumerate(lot, 1):
                if bench.late(f"{len(lot) - number + 1} case(s) with {threads} thread(s)"):
                    break
                began = time.monotonic()
                results.append(crew.run(case))
                bench.say(f"[{number}/{len(lot)}] {_line(results[-1])} ({time.monotonic() - began:.1f} s)")
            for dtype in dtypes if not bench.late() else ():
                crew.measure_machine(dtype)
    return results


def _line(result: CaseResult) -> str:
    """One line of progress."""
    case, own = result.case, result.time()
    text = f"{case.kind} {case.shape} {case.dtype} {case.layout} {case.threads}t"
    if own is None:
        return f"{text}: nblora was not timed"
    against = (
        f"{name} {ratio.median:.2f}" for name in result.seconds if name != BASELINE and (ratio := result.ratio(name))
    )
    return f"{text}: {1e3 * own.median:.3f} ms; " + ", ".join(against)
