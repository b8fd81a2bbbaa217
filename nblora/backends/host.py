"""What every operation on the CPU begins with: arrays as kernels take them, and how many threads a call is worth."""

import numpy as np

from .crew import thread_count

SERIAL_WORK = 1 << 17
"""Multiply-adds below which a call runs in the calling thread: waking another costs 5 to 10 µs, 2^17 take 3 µs."""


class _Writable:
    """The memory of a read-only array, for `numpy.asarray`: Numba compiles every kernel anew for read-only types."""

    def __init__(self, array: np.ndarray) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self.owner = array


def plain(array: np.ndarray) -> np.ndarray:
    """The array itself, or a writable view of a read-only one's memory, for kernels that only read it."""
    return array if array.flags.writeable else np.asarray(_Writable(array))


def workers_for(work: int) -> int:
    """Shares for a call of `work` multiply-adds."""
    return 1 if work < SERIAL_WORK else thread_count()
