"""What every operation on a GPU stands on: its memory, grids, small tables, and numbers that are read together."""

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nblora.kernels.masks import cuda as masks
from nblora.kernels.update.cuda import elementwise

from ..device import Device, DeviceArray
from ..protocol import Array, Number
from .shapes import NAMES, PLAIN, SIMULATED, TENSOR, base_aligned


class Pending:
    """A number on the device, which `read` or `float` brings to the host: sums of a few elements, each with a factor.

    Times a float, and added to another or to a float, it is one more.
    """

    __slots__ = ("constant", "terms")

    def __init__(self, terms: Sequence[tuple[float, DeviceArray, int, int]], constant: float = 0.0) -> None:
        self.terms, self.constant = terms, constant

    def __mul__(self, factor: float) -> "Pending":
        return Pending([(factor * share, *where) for share, *where in self.terms], factor * self.constant)  # type: ignore[misc]  # three follow the share

    def __add__(self, other: "Pending | float") -> "Pending":
        if isinstance(other, Pending):
            return Pending([*self.terms, *other.terms], self.constant + other.constant)
        return Pending(self.terms, self.constant + other)

    __rmul__, __radd__ = __mul__, __add__

    def value(self, hosts: Mapping[DeviceArray, np.ndarray]) -> float:
        """The number, from the buffers' values."""
        return self.constant + sum(share * float(hosts[held][i:j].sum()) for share, held, i, j in self.terms)

    def __float__(self) -> float:
        return read_together([self])[0]


def read_together(numbers: Sequence[Number]) -> list[float]:
    """The numbers as floats, by one copy to the host of each buffer that they lie in."""
    ends: dict[DeviceArray, int] = {}
    for number in numbers:
        for _, held, _, end in number.terms if isinstance(number, Pending) else ():
            ends[held] = max(ends.get(held, 0), end)
    hosts = {held: held.part(0, end).copy_to_host() for held, end in ends.items()}
    return [number.value(hosts) if isinstance(number, Pending) else float(number) for number in numbers]


class Launching:
    """One GPU, and how its operations launch kernels.

    Everything runs on the default stream, in the order of the calls: a kernel that changes D comes after those that
    read it.
    """

    breadth = 16

    def __init__(self, device: Device, precision: str = "float32") -> None:
        self.device, self.precision = device.name, precision
        self._device, self.simulated = device, device.simulated
        self._plain = SIMULATED if device.simulated else PLAIN
        self._shapes = TENSOR if precision == "tf32" else self._plain
        self._zero_biases: dict[Any, DeviceArray] = {}
        self._numbers: tuple[DeviceArray, int] | None = None
        self._rings = {np.dtype(kind): (device.empty((4096,), kind), 0) for kind in ("int64", "float64")}
        self._known: dict[int, tuple[Any, DeviceArray]] = {}

    # --- memory ------------------------------------------------------------------------------------------------

    def adopt(self, value: Any) -> DeviceArray | None:
        """The array itself, or a view of it, where it is on a GPU; None for what is on the host."""
        return self._device.adopt(value)

    def from_host(self, array: Any) -> Array:
        """Bring a NumPy array to the device; what is there already stays."""
        return array if isinstance(array, DeviceArray) else self._device.upload(array)

    def base_from_host(self, array: Any) -> Array:
        """Bring the weight of a frozen base to the device: as bfloat16 with that precision."""
        if self.precision != "bf16-base" or array.dtype != np.float32:
            return self.from_host(array)
        return self._device.upload(np.asarray(array), bfloat16=True)

    def to_host(self, array: Array) -> np.ndarray:
        """Bring an array to NumPy."""
        return array.copy_to_host() if isinstance(array, DeviceArray) else array

    def release(self) -> None:
        """Free memory that nothing refers to any more."""
        self._device.settle()
        self._numbers = None
        self._device.release()

    def lending(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do: the device keeps a free list of its own."""
        return contextlib.nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array whose values are undefined."""
        return self._device.empty(shape, dtype)

    def zeros_like(self, array: Array) -> Array:
        """A new array of zeros, same shape and dtype."""
        return self.zeros(array.shape, array.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array of zeros."""
        new = self._device.empty(shape, dtype)
        self._stride(elementwise(NAMES[new.dtype], self._threads(new)).fill, new, new.dtype.type(0), 1)
        return new

    def dropout_mask(self, rng: np.random.Generator, shape: tuple[int, ...], share: float, dtype: np.dtype) -> Array:
        """0 for the share that is dropped, 1 / (1 - share) for the rest: by Philox, with a key that `rng` draws."""
        mask, key = self._device.empty(shape, dtype), int(rng.integers(2**64, dtype=np.uint64))
        if mask.size:
            threads = self._threads(mask)
            self._device.launch(
                masks.dropout_mask(NAMES[mask.dtype], threads),
                self._blocks(mask.size // 4 + 1, threads),
                threads,
                np.int64(key % 2**32),
                np.int64(key // 2**32),
                np.int64(share * 2**32),
                dtype.type(1 / (1 - share)),
                int(base_aligned(mask)),
                mask,
            )
        return mask

    def _threads(self, array: Array) -> int:
        return self._shapes[NAMES[array.dtype]].threads

    def _blocks(self, work: int, threads: int) -> int:
        """Blocks for a kernel whose grid strides over `work`."""
        return max(1, min(-(-work // threads), self._device.waves * self._device.multiprocessors))

    def _stride(self, kernel: Any, first: Array, *arguments: Any) -> None:
        """Launch an element-wise kernel over the vectors of `first`."""
        if first.size:
            threads = self._threads(first)
            self._device.launch(kernel, self._blocks(first.size // 4 + 1, threads), threads, first, *arguments)

    def _zero_bias(self, outputs: int, dtype: np.dtype) -> DeviceArray:
        key = outputs, dtype
        if key not in self._zero_biases:
            self._zero_biases[key] = self._device.upload(np.zeros(outputs, dtype))
        return self._zero_biases[key]

    # --- numbers, tables, indices ------------------------------------------------------------------------------

    def read(self, numbers: Sequence[Number]) -> list[float]:
        """The numbers as floats: one copy to the host."""
        found = read_together(numbers)
        self._numbers = None
        return found

    def _number(self, buffer: DeviceArray, begin: int, end: int) -> Pending:
        return Pending([(1.0, buffer, begin, end)])

    def _reserve(self, count: int) -> tuple[DeviceArray, int, DeviceArray]:
        """Room for `count` float64 beside those of other numbers that are read together: buffer, place, view."""
        buffer, begin = self._numbers or (self._device.empty((max(4096, count),), np.float64), 0)
        if begin + count > buffer.size:
            buffer, begin = self._device.empty((max(4096, count),), np.float64), 0
        self._numbers = buffer, begin + count
        return buffer, begin, buffer.part(begin, begin + count)

    def _upload(self, rows: Any, dtype: Any) -> DeviceArray:
        """A small table for a kernel. It goes round in one piece of memory: who writes there again comes later."""
        values = np.array(rows, dtype)
        ring, place = self._rings[np.dtype(dtype)]
        if values.size > ring.size:
            return self._device.upload(values)
        if place + values.size > ring.size:
            place = 0
        self._rings[values.dtype] = ring, place + values.size
        table = ring.part(place, place + values.size).reshape(values.shape)
        self._device.write(table, values)
        return table

    def _remembered(self, values: np.ndarray) -> DeviceArray:
        """An array of the host, brought over once: the same object finds its copy again for as long as it lives.

        Where sequences begin, and the angles of positions, every attention of a model asks for and none changes.
        """
        key = id(values)
        known = self._known.get(key)
        if known is not None and known[0]() is values:
            return known[1]
        array = self._device.upload(np.ascontiguousarray(values))
        self._known[key] = weakref.ref(values, lambda _: self._known.pop(key, None)), array
        return array

    def _before_reading(self, *arrays: Array) -> None:
        """Launch what was put off where it writes one of these arrays: a gradient, or a parameter."""
        self._device.settle()

    def _before_writing(self, *arrays: Array) -> None:
        """Launch what was put off where it reads, or writes, one of these arrays, which are to be changed in place."""
        self._device.settle()
