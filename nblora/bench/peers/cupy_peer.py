"""CuPy: the formulas of the NumPy peer on arrays of a GPU."""

from typing import Any

import cupy
import numpy as np

from .clock import Clock, EventClock
from .numpy_peer import NumpyPeer


def select(device: str) -> None:
    """Make "cuda:N" CuPy's current device; "cuda" is the first."""
    cupy.cuda.Device(int(device.partition(":")[2] or 0)).use()


def event_clock() -> Clock:
    """The clock of the current device."""
    return EventClock(cupy.cuda.Event, cupy.cuda.get_elapsed_time)


class CupyPeer(NumpyPeer):
    """Every product by cuBLAS, every sum a kernel of its own, parameters updated in place."""

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        if device == "cpu":
            return "CuPy has no CPU"
        try:
            return None if cupy.cuda.runtime.getDeviceCount() else "CuPy finds no CUDA device"
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return f"CuPy finds no CUDA device: {error}"

    def set_up(self, arrays: dict) -> None:
        select(self.device)
        super().set_up({name: cupy.asarray(array) for name, array in arrays.items()})

    def clock(self) -> Clock:
        return event_clock()

    def results(self) -> dict[str, np.ndarray]:
        found: dict[str, Any] = super().results()
        return {name: cupy.asnumpy(array) for name, array in found.items()}
