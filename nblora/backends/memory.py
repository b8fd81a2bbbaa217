"""Memory of a GPU: arrays as kernels see them, and blocks that serve again once nothing refers to them.

A driver's allocation costs 40 µs of the host and a free waits for the device, so blocks are kept by size. Everything
runs on one stream: whoever is given a block comes after all that used it before.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

SMALLEST = 512


def bucket(size: int) -> int:
    """The size of the block for `size` bytes: four steps an octave, so at most a quarter is idle."""
    if size <= SMALLEST:
        return SMALLEST
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


class Block:
    """One allocation, which goes back to its pool when the last array in it is gone.

    `lent`: others may write to it. `elsewhere`: they do so on streams that do not wait for ours, nor ours for them.
    """

    __slots__ = ("_pool", "address", "elsewhere", "lent", "size")

    def __init__(self, address: int, size: int, pool: "Pool") -> None:
        self.address, self.size, self._pool = address, size, pool
        self.lent = self.elsewhere = False

    def __del__(self) -> None:
        # A collection may run this anywhere, even while the pool is at work: it only leaves a note.
        self._pool.returned.append((self.size, self.address, self.elsewhere))


class Pool:
    """Blocks by size. `bound` bytes may lie idle; all idle ones are freed before the device is called full."""

    def __init__(self, allocate: Callable[[int], int | None], free: Callable[[int], None], bound: int) -> None:
        self._allocate, self._free, self._bound = allocate, free, bound
        self.returned: deque[tuple[int, int, bool]] = deque()
        self._idle: defaultdict[int, list[int]] = defaultdict(list)
        self._idle_bytes = 0
        self._lock = threading.RLock()

    def take(self, size: int) -> Block | None:
        """A block of at least `size` bytes; None where the device has no room."""
        wanted = bucket(size)
        with self._lock:
            self._collect()
            idle = self._idle.get(wanted)
            if idle:
                self._idle_bytes -= wanted
                return Block(idle.pop(), wanted, self)
            address = self._allocate(wanted)
            if address is None:
                self.empty()
                address = self._allocate(wanted)
        return None if address is None else Block(address, wanted, self)

    def empty(self) -> None:
        """Give everything idle back to the driver."""
        with self._lock:
            self._collect(0)

    def _collect(self, bound: int | None = None) -> None:
        while self.returned:
            size, address, elsewhere = self.returned.popleft()
            if elsewhere:  # the driver waits for every stream before it frees
                self._free(address)
                continue
            self._idle[size].append(address)
            self._idle_bytes += size
        bound = self._bound if bound is None else bound
        while self._idle_bytes > bound:
            size = max(size for size, addresses in self._idle.items() if addresses)
            self._free(self._idle[size].pop())
            self._idle_bytes -= size


class Memory:
    """A C-contiguous array in a GPU's memory. `owner` keeps it alive; `parameters` are what a kernel is given of it."""

    __slots__ = ("address", "dtype", "kind", "owner", "parameters", "shape", "size")

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype, owner: Any) -> None:
        self.address, self.shape, self.dtype, self.owner = address, shape, dtype, owner
        size, strides, stride = 1, [], dtype.itemsize
        for extent in reversed(shape):
            strides.append(stride)
            stride *= extent
            size *= extent
        self.size = size
        self.kind = dtype.char, len(shape)
        # Numba's array: two pointers that only Python's arrays have, elements, bytes of one, address, shape, strides.
        self.parameters = (0, 0, size, dtype.itemsize, address, *shape, *reversed(strides))

    def reshape(self, shape: tuple[int, ...]) -> "Memory":
        """The same memory in another shape."""
        return Memory(self.address, shape, self.dtype, self.owner)

    def __getitem__(self, part: slice) -> "Memory":
        """Some elements of a vector."""
        begin, end, _ = part.indices(self.size)
        return Memory(self.address + begin * self.dtype.itemsize, (end - begin,), self.dtype, self.owner)
