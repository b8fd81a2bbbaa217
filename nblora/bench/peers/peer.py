"""`Peer`: what a peer's class offers to the worker that drives it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .clock import Call, Clock, host_clock

RESULTS = ("y", "grad_input", "A", "B", "D", "V")


class Tools(NamedTuple):
    """How a library multiplies and copies: what the machine's limits are measured by.

    `bring` takes a NumPy array to the device, `like` makes a new array there, `product(a, b, out)` and
    `copy(source, target)` work on such arrays.
    """

    bring: Callable[[np.ndarray], Any]
    like: Callable[[Any], Any]
    product: Callable[[Any, Any, Any], object]
    copy: Callable[[Any, Any], object]


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

    if TYPE_CHECKING:  # the case's arrays under their names, for peers that keep them so

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

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

    @classmethod
    def clock(cls, device: str) -> Clock:
        """What takes the time of calls on the device."""
        return host_clock

    @classmethod
    def tools(cls, device: str, threads: int) -> Tools:
        """The library's own products and copies."""
        raise NotImplementedError  # of those that the runner asks for the machine's limits

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
        """What the last call left under the names of `RESULTS`, in logical or stored shapes."""
        return {name: self.to_numpy(getattr(self, name)) for name in RESULTS if hasattr(self, name)}

    @staticmethod
    def to_numpy(array: Any) -> np.ndarray:
        """The library's array as NumPy's."""
        return np.asarray(array)

    def bound(self, lr: float) -> Call:
        """Return the call that does the case once."""
        return self.forward if self.case["kind"] == "forward" else lambda: self.step(lr)
