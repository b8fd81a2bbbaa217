"""The process of one peer: reads commands and writes answers, one JSON object a line.

Started by `process.Worker` with the peer's module and class. Commands (`do`): "start" (import), "set_up", "check",
"warm", "burst", "rates", "memory", "drop". An exception becomes an answer with `error`; a module that is not
installed one with `missing`; a device that the library cannot use one with `unavailable`.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from . import rates
from .clock import Clock
from .memory import peak_bytes, reset_peak, resident_bytes


class Driver:
    """Holds the peer's class and the case at hand."""

    def __init__(self, module: str, cls: str) -> None:
        self.module, self.cls = module, cls
        self.peer: Any = None

    def start(self, distributions: list, device: str = "cpu") -> dict:
        """Import the peer, and say how long that took, which versions it found, and what the device is."""
        begin = time.perf_counter()
        try:
            module = importlib.import_module(self.module, __package__)
        except ModuleNotFoundError as error:
            return {"missing": error.name or str(error)}
        self.make = getattr(module, self.cls)
        seconds = time.perf_counter() - begin
        problem = self.make.unavailable(device)
        if problem:
            return {"unavailable": problem}
        versions = {}
        for name in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        python = sys.version.split()[0]
        return {"seconds": seconds, "versions": versions, "python": python, "device": self.make.describe(device)}

    def set_up(self, case: dict, arrays: str) -> dict:
        """Make the peer for `case`, of the arrays in the file at `arrays`."""
        self.peer = None
        self.peer = self.make(case, load(arrays))
        return {}

    def check(self, lr: float, results: str) -> dict:
        """Do the case once and save what came out."""
        self.peer.bound(lr)()
        got = self.peer.results()
        np.savez(results, **got)
        return {}

    def warm(self, lr: float, seconds: float, least: int) -> dict:
        """Repeat for `seconds` and at least `least` times; say how long the last quarter took each."""
        times = repeat(self.peer.clock(), self.peer.bound(lr), seconds, least)
        tail = sorted(times[-max(1, len(times) // 4) :])
        return {"seconds": tail[len(tail) // 2]}

    def burst(self, lr: float, count: int) -> dict:
        """Repeat `count` times; the median of what each took."""
        call, clock = self.peer.bound(lr), self.peer.clock()
        call()  # brings the arrays back into cache after another peer's turn
        gc.collect()
        gc.disable()
        times = clock.times(call, count)
        gc.enable()
        times.sort()
        return {"seconds": (times[(count - 1) // 2] + times[count // 2]) / 2}

    def rates(self, dtype: str, threads: int, seconds: float, device: str = "cpu") -> dict:
        """Measure the rates of matrix products and copies that this peer's library reaches."""
        return rates.measure(self.module.strip(".").partition("_")[0], dtype, threads, seconds, device)

    def memory(self, case: dict, small: dict, arrays: str, small_arrays: str, lr: float) -> dict:
        """Peak memory of three steps beyond the case's own arrays, without imports and compilation."""
        warm = self.make(small, load(small_arrays))
        warm.bound(lr)()
        warm.bound(lr)()
        del warm
        gc.collect()
        before = resident_bytes()
        own = load(arrays)
        size = sum(array.nbytes for array in own.values())
        peer = self.make(case, own)
        del own
        gc.collect()
        if not reset_peak():
            return {"bytes": None}
        call = peer.bound(lr)
        for _ in range(3):
            call()
        return {"bytes": peak_bytes() - before - size, "arrays": size}

    def drop(self) -> dict:
        """Free the case."""
        self.peer = None
        gc.collect()
        return {}


def load(path: str) -> dict:
    """Read all arrays of an .npz file."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def repeat(clock: Clock, call: Callable[[], None], seconds: float, least: int) -> list[float]:
    """Call for `seconds` and at least `least` times; what each call took."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        times += clock.times(call, 1)
    return times


def once(answers: TextIO, driver: Driver, case: dict, arrays: str, lr: float) -> None:
    """Import, set up, make the first step, and answer at once: whoever started the process reads the clock then.

    A second answer tells what each part took, and what a step takes when nothing is left to compile.
    """
    clock = time.perf_counter
    begin = clock()
    started = driver.start([], case["device"])
    if "missing" in started or "unavailable" in started:
        _answer(answers, started)
        return
    marks = [begin, clock()]
    driver.set_up(case, arrays)
    call = driver.peer.bound(lr)
    marks.append(clock())
    driver.peer.clock().times(call, 1)  # to its end, on a device too
    marks.append(clock())
    _answer(answers, {})
    parts = [after - before for before, after in itertools.pairwise(marks)]
    steady = sorted(repeat(driver.peer.clock(), call, 0.2, 5))
    _answer(answers, {"import": parts[0], "set_up": parts[1], "first": parts[2], "steady": steady[len(steady) // 2]})


def serve(commands: TextIO, answers: TextIO, driver: Driver) -> None:
    """Answer commands until the input ends."""
    for line in commands:
        message = json.loads(line)
        try:
            answer = getattr(driver, message.pop("do"))(**message)
        except Exception:  # whatever a peer raises is reported, and it goes on
            answer = {"error": traceback.format_exc(limit=-6)}
        _answer(answers, answer)


def _answer(answers: TextIO, answer: dict) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def private_output() -> TextIO:
    """Return a stream to the real standard output, and send what libraries print to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def main(module: str, cls: str, *only_once: str) -> None:
    """Serve commands from standard input; or, given the JSON of `once`'s arguments, do that and end."""
    answers = private_output()
    driver = Driver(module, cls)
    if only_once:
        try:
            once(answers, driver, **json.loads(only_once[0]))
        except Exception:  # whatever a peer raises is reported
            _answer(answers, {"error": traceback.format_exc(limit=-6)})
    else:
        serve(sys.stdin, answers, driver)
