"""`Peer`: what a peer's class offers to the worker that drives it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .clock import Clock, HostClock


class Peer:
    """One case in one library's hands.

    Parameters
    ----------
    case : dict
        `kind`, `n`, `in_features`, `out_features`, `rank`, `dtype`, `layout`, `threads`, `device`, `delta_scaling`,
        `momentum`, `scaling`.
    arrays : dict of ndarray
        x, g, W, b, A, B and, but for "lora-step", D and V; W, D, V as stored. The peer may take them over.
    """

    # The arrays under their names, for peers that keep them so.
    x: Any
    g: Any
    W: Any
    b: Any
    A: Any
    B: Any
    D: Any
    V: Any

    def __init__(self, case: dict, arrays: dict) -> None:
        self.case = case
        self.device: str = case["device"]
        self.transposed = case["layout"] == "fullyconnected"
        self.has_delta = case["kind"] != "lora-step"
        self.c, self.m, self.s = case["delta_scaling"], case["momentum"], case["scaling"]
        self.set_up(arrays)

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """What keeps the library from the device; None where nothing does."""
        return None if device == "cpu" else f"it does not run on {device}"

    @classmethod
    def describe(cls, device: str) -> str:
        """What the device is, where the library tells."""
        return ""

    def clock(self) -> Clock:
        """What takes the time of the case's calls."""
        return HostClock()

    def set_up(self, arrays: dict) -> None:
        """Take the arrays in, in the library's own form."""
        raise NotImplementedError  # every peer has its own

    def forward(self) -> None:
        """Compute y, in evaluation mode."""
        raise NotImplementedError  # every peer has its own

    def step(self, lr: float) -> None:
        """Forward, backward with the gradient of the input, and update."""
        raise NotImplementedError  # every peer has its own

    def results(self) -> dict[str, np.ndarray]:
        """What the last call left: y, and after a step grad_input, A, B, D, V in their logical or stored shapes."""
        raise NotImplementedError  # every peer has its own

    def bound(self, lr: float) -> Callable[[], None]:
        """Return the call that does the case once."""
        if self.case["kind"] == "forward":
            return self.forward
        return lambda: self.step(lr)
