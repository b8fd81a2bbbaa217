"""The process of one peer: reads commands and writes answers until its input ends.

Started by `process.Worker` with the peer's module and class. A command is the name of a method of `Driver`, under
`do`, with its arguments. An answer is "done" with what the method returned, or its arrays; "missing" where a module is
not installed, "unavailable" where the library cannot use the device, "error" where the peer raised, each with words.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import os
import sys
import time
import traceback
from statistics import median
from typing import Any, BinaryIO

import numpy as np

from . import rates
from .memory import fresh_peak, peak_bytes
from .messages import receive, send


class Refusal(Exception):
    """The peer cannot work here: the answer's first word, and why."""


class Driver:
    """Holds the peer's class and the case at hand."""

    def __init__(self, module: str, cls: str) -> None:
        self.module, self.cls = module, cls
        self.peer: Any = None

    def start(self, device: str = "cpu") -> dict:
        """Import the peer, and say how long that took, and what the device is."""
        begin = time.perf_counter()
        try:
            self.make = getattr(importlib.import_module(self.module, __package__), self.cls)
        except ModuleNotFoundError as error:
            raise Refusal("missing", f"{error.name or error} is not installed") from None
        seconds = time.perf_counter() - begin
        problem = self.make.unavailable(device)
        if problem:
            raise Refusal("unavailable", problem)
        return {"seconds": seconds, "device": self.make.describe(device)}

    def versions(self, distributions: tuple[str, ...]) -> dict[str, str]:
        """The versions of Python and of those distributions that are installed."""
        found = {"python": sys.version.split()[0]}
        for name in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found

    def set_up(self, case: dict, arrays: dict) -> float:
        """Make the peer for `case`; the seconds that it took."""
        self.drop()
        own = taken_over(arrays)
        begin = time.perf_counter()
        self.peer = self.make(case, own)
        self.clock = self.make.clock(case["device"])
        return time.perf_counter() - begin

    def check(self, lr: float) -> dict[str, np.ndarray]:
        """Do the case once and return what came out."""
        self.peer.bound(lr)()
        results: dict[str, np.ndarray] = self.peer.results()
        return results

    def first(self, lr: float) -> float:
        """Do the case once, to its end on a device too; the seconds that it took."""
        return self.clock(self.peer.bound(lr), 1)[0]

    def warm(self, lr: float, seconds: float, least: int) -> float:
        """Repeat for `seconds` and at least `least` times; the seconds that one of the last quarter took."""
        times = rates.repeat(self.clock, self.peer.bound(lr), seconds, least)
        return median(times[-max(1, len(times) // 4) :])

    def burst(self, lr: float, count: int) -> float:
        """Repeat `count` times; the median of what each took."""
        call = self.peer.bound(lr)
        call()  # brings the arrays back into cache after another peer's turn
        gc.collect()
        gc.disable()
        times = self.clock(call, count)
        gc.enable()
        return median(times)

    def rates(self, **settings: Any) -> dict[str, float]:
        """Measure the rates of matrix products and copies that this peer's library reaches."""
        return rates.measure(self.make, **settings)

    def memory(self, case: dict, arrays: dict, lr: float) -> dict[str, int]:
        """Peak bytes of three steps beyond the case's own arrays, outputs included, and the bytes of those arrays.

        What the process held before does not count: imports, and what a case set up before had compiled.
        """
        self.drop()
        own = taken_over(arrays)
        size, before = sum(array.nbytes for array in own.values()), fresh_peak()
        peer = self.make(case, own)
        del own
        gc.collect()
        fresh_peak()
        call = peer.bound(lr)
        for _ in range(3):
            call()
        return {"bytes": peak_bytes() - (before or 0), "arrays": size}

    def drop(self) -> None:
        """Free the case."""
        self.peer = None
        gc.collect()


def taken_over(arrays: dict) -> dict:
    """The arrays; the message's own dict is left empty, so that what a peer has copied into its own form is freed."""
    own = dict(arrays)
    arrays.clear()
    return own


def serve(commands: BinaryIO, answers: BinaryIO, driver: Driver) -> None:
    """Answer commands until the input ends."""
    while True:
        try:
            message = receive(commands)
        except EOFError:
            return
        do = message.pop("do")
        try:
            answer = {"arrays" if do == "check" else "done": getattr(driver, do)(**message)}
        except Refusal as error:
            answer = dict([error.args])
        except Exception:  # whatever a peer raises is reported, and it goes on
            answer = {"error": traceback.format_exc(limit=-6).strip()}
        send(answers, answer)


def main(module: str, cls: str) -> None:
    """Serve commands from standard input on standard output, and send what libraries print to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers, Driver(module, cls))
