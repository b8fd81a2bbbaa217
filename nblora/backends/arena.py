"""`Arena`: memory that arrays are lent from, and that serves again once nobody holds them.

A fresh array costs a fault for every page that is first touched: 1.5 ms for 3 MB, where writing it again takes 0.08 ms.
While somebody keeps the arena open (`fit`, `encode`), what one step gave back the next one takes.
"""

import contextlib
import math
import mmap
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SMALL = 1 << 16
"""Bytes below which an array comes from NumPy, which is as fast."""
_LOOSE = 1.5
"""Memory that an array may take, over what it needs: batches of texts have as many sizes as there are batches."""
_SPARE = 1.25
"""Memory that is held, over the most that was lent at once: sizes that come no more are given back."""


class Arena:
    """Lends arrays of any shape and dtype, their values undefined. Several threads may use it.

    Attributes
    ----------
    empty : callable
        From a shape and a dtype to an array, as `numpy.empty`, which it is while nobody keeps the arena open.
    """

    def __init__(self) -> None:
        self.empty: Callable[..., np.ndarray] = np.empty
        self._users = 0
        self._free: dict[int, list[mmap.mmap]] = {}
        self._lent: dict[int, tuple[Any, mmap.mmap]] = {}
        self._held = self._out = self._most = 0

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Keep what comes back; outside, arrays are NumPy's own, and the memory is given back at the end."""
        self._users += 1
        self.empty = self._empty
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self.empty, self._free = np.empty, {}
                self._held, self._most = self._out, 0

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array whose memory comes back when no array looks at it any more."""
        kind = np.dtype(dtype)
        count = math.prod(shape) * kind.itemsize
        if count < SMALL:
            return np.empty(shape, kind)
        memory = self._taken(_rounded(count))
        size = len(memory)
        self._out += size
        self._most = max(self._most, self._out)
        # Every view of the array, and every view of a view, holds this one in the end: memory that is no array itself
        # is where NumPy stops to look for whose it is.
        lease = np.frombuffer(memory, np.uint8)
        reference = weakref.ref(lease, self._back)
        self._lent[id(reference)] = reference, memory
        return lease[:count].view(kind).reshape(shape)

    def _taken(self, size: int) -> mmap.mmap:
        """Free memory of so many bytes, or of as few more as there is; else new."""
        for other in sorted(self._free):
            if size <= other <= _LOOSE * size:
                with contextlib.suppress(IndexError):  # empty, or another thread took the last
                    return self._free[other].pop()
        return self._new(size)

    def _new(self, size: int) -> mmap.mmap:
        """Memory of so many bytes; what is free beyond need makes room."""
        bound = _SPARE * max(self._most, self._out + size)
        for other in sorted(self._free, reverse=True):
            while self._held + size > bound and self._free[other]:
                self._free[other].pop()
                self._held -= other
        self._held += size
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _back(self, reference: Any) -> None:
        """Called when a lease ends, in whatever thread that happens."""
        _, memory = self._lent.pop(id(reference))
        size = len(memory)
        self._out -= size
        if self._users:
            self._free.setdefault(size, []).append(memory)
        else:
            self._held -= size


def _rounded(count: int) -> int:
    """Bytes in steps of an eighth of their power of two, so that batches of nearly one size share memory."""
    step = 1 << max(count.bit_length() - 4, 12)
    return -(-count // step) * step
