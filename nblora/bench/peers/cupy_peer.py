"""CuPy: the formulas of the NumPy peer on arrays of a GPU."""

from typing import Any

import cupy
import numpy as np

from .clock import Clock, event_clock
from .numpy_peer import NumpyPeer
from .peer import Tools


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

    @classmethod
    def clock(cls, device: str) -> Clock:
        cupy.cuda.Device(int(device.partition(":")[2] or 0)).use()  # "cuda" is the first
        return event_clock(cupy.cuda.Event, cupy.cuda.get_elapsed_time)

    @classmethod
    def tools(cls, device: str, threads: int) -> Tools:
        return Tools(cupy.asarray, cupy.empty_like, cupy.matmul, lambda source, target: cupy.copyto(target, source))

    def set_up(self, arrays: dict) -> None:
        self.clock(self.device)
        super().set_up({name: cupy.asarray(array) for name, array in arrays.items()})

    @staticmethod
    def to_numpy(array: Any) -> np.ndarray:
        found: np.ndarray = cupy.asnumpy(array)
        return found
