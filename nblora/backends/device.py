"""One CUDA device: what is missing to use it, its memory, and launches. Only the CUDA backend imports this."""

import contextlib
import functools
import importlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from nblora.errors import DeviceUnavailableError
from nblora.kernels.common.cuda.simulated import from_bfloat16, to_bfloat16
from nblora.kernels.common.cuda.target import COMPILED, SIMULATED
from nblora.kernels.common.cuda.target import module as cuda

from . import dlpack


def missing() -> str | None:
    """What keeps CUDA from running here, with the remedy; None where nothing does."""
    if SIMULATED:
        return None
    if not COMPILED:
        return "the package numba-cuda is not installed: pip install 'nblora[cuda12]' or 'nblora[cuda13]'"
    if cuda.is_available():
        return None
    error = getattr(cuda, "cuda_error", lambda: None)()
    if error is None:
        return (
            "the driver answers, but the compiler NVVM is not there, or older than Python's packages expect: "
            "pip install 'nblora[cuda12]' or 'nblora[cuda13]'"
        )
    if "NO_DEVICE" not in str(error):
        return "no NVIDIA driver answers: install one, and look at what nvidia-smi says"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return f"the driver finds no GPU{hidden}: look at what nvidia-smi says, and at CUDA_VISIBLE_DEVICES"


def device_count() -> int:
    """The number of CUDA devices, the simulated one included."""
    return 0 if missing() is not None else len(cuda.gpus)


class DeviceArray:
    """An array in a GPU's memory, C-contiguous; what `forward` returns for what came from there.

    CuPy, PyTorch, JAX and Numba take it without a copy: by `__dlpack__`, which has their stream wait for its values, or
    by `__cuda_array_interface__`; NumPy with one by `numpy.asarray`.
    Cut along its first axis, by a slice without steps, it is a view. Whole arrays and such parts are written to:
    `array[...] = value`, `array[2:4] = value`. bfloat16 ones read as float32 and are read-only.
    """

    def __init__(self, memory: Any, device: "Device", bfloat16: bool = False) -> None:
        self.memory, self._device, self.bfloat16 = memory, device, bfloat16
        self.shape: tuple[int, ...] = tuple(memory.shape)
        self.dtype: np.dtype = np.dtype(np.float32) if bfloat16 else np.dtype(memory.dtype)
        self.size: int = math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.size * int(self.memory.dtype.itemsize)

    @property
    def flags(self) -> SimpleNamespace:
        """As of a NumPy array."""
        return SimpleNamespace(c_contiguous=True, aligned=True, writeable=not self.bfloat16)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self._device.lend(self, None)
        kind = "<u2" if self.bfloat16 else self.dtype.str
        return {
            "shape": self.shape,
            "typestr": kind,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        } | self._device.interface()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device.dlpack_device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule; the consumer's `stream` waits for what is under way. Without one: CUDA's default stream.

        Raises
        ------
        BufferError
            For another device.
        """
        if dl_device is not None and tuple(map(int, dl_device)) != self._device.dlpack_device:
            raise BufferError(f"the array is on {self._device.name}: copy it first, as by numpy.asarray")
        given = self.copy() if copy else self
        self._device.lend(given, stream)
        dtype = np.dtype(given.memory.dtype)
        return dlpack.give(given.address, given.shape, dtype, given.bfloat16, self._device.dlpack_device, given.memory)

    @property
    def address(self) -> int:
        """Where the array begins in the device's memory."""
        return self._device.address(self.memory)

    @property
    def T(self) -> "DeviceArray":
        """The transpose, as a copy: a device array is contiguous."""
        return self._device.upload(np.ascontiguousarray(self.copy_to_host().T))

    def reshape(self, *shape: Any) -> "DeviceArray":
        """The same memory in another shape."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        known = np.empty(self.shape, np.bool_).reshape(sizes).shape if -1 in sizes else tuple(sizes)
        return DeviceArray(self.memory.reshape(known), self._device, self.bfloat16)

    def part(self, begin: int, end: int) -> "DeviceArray":
        """Some elements of a vector, in place."""
        return DeviceArray(self.memory[begin:end], self._device)

    def __getitem__(self, rows: slice) -> "DeviceArray":
        begin, end = self._range(rows)
        inner = math.prod(self.shape[1:])
        view = self.memory.reshape((self.size,))[begin * inner : end * inner].reshape((end - begin, *self.shape[1:]))
        return DeviceArray(view, self._device, self.bfloat16)

    def _range(self, rows: Any) -> tuple[int, int]:
        if not isinstance(rows, slice) or rows.step not in (None, 1) or not self.shape:
            raise IndexError(f"a device array is cut by a slice of its first axis, without steps, got {rows!r}")
        begin, end, _ = rows.indices(self.shape[0])
        return begin, max(begin, end)

    def copy(self) -> "DeviceArray":
        """A copy in the same memory."""
        return self._device.duplicate(self)

    def copy_to_host(self) -> np.ndarray:
        """A copy as a NumPy array."""
        return self._device.download(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a device array cannot become a NumPy array without a copy")
        host = self.copy_to_host()
        return host if dtype is None else host.astype(dtype, copy=False)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._device.assign(self if key is Ellipsis else self[key], value)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self._device.name}, {self.copy_to_host()!r})"


def as_argument(value: Any) -> Any:
    """What a kernel is given: memory, or a number of 32 bits, which is what kernels count with."""
    if isinstance(value, DeviceArray):
        return value.memory
    return np.int32(value) if isinstance(value, int) else value


@contextlib.contextmanager
def _prompt_threads() -> Iterator[None]:
    """Let Python's threads take turns of 0.1 ms: the simulator has one for each thread of a block, and another that
    looks in a loop whether all have come to a barrier, for 5 ms each time where nothing is changed."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class OneMaker(dict[Any, Any]):
    """What the simulator has allocated, by call site.

    It looks an array up and, where there is none, makes and enters it. Between these steps another thread of the block
    waits here, or each would have a shared array of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._making = threading.Lock()

    def get(self, key: Any, default: Any = None) -> Any:
        """The array; or None, and whoever looks next waits until it has been entered."""
        self._making.acquire()
        found = super().get(key, default)
        if found is not None:
            self._making.release()
        return found

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self._making.release()


def _share_arrays_safely() -> None:
    """Give every block of the simulator a `OneMaker`."""
    shared = importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared
    begin = shared.__init__

    def begin_safely(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self._allocations = OneMaker()

    shared.__init__ = begin_safely


if SIMULATED:
    _share_arrays_safely()


class Device:
    """One device: what is the same of a GPU, Numba's simulator of one, and the tests' emulator."""

    index: int
    name: str
    multiprocessors: int
    compute_capability: tuple[int, int]
    _deferred: list[Callable[[], None]]
    simulated = False
    waves = 8
    """Blocks a multiprocessor where a grid strides over its work."""
    busy = 512
    """Threads a multiprocessor that hide the memory's latency in a product: sixteen warps."""

    @property
    def description(self) -> str:
        """What the device is, for people."""
        raise NotImplementedError

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Memory whose values are undefined; DeviceMemoryError where there is no room."""
        raise NotImplementedError

    def address(self, memory: Any) -> int:
        """Address of a piece of memory."""
        raise NotImplementedError

    def _to_device(self, target: Any, host: np.ndarray) -> None:
        raise NotImplementedError

    def _to_host(self, source: Any) -> np.ndarray:
        raise NotImplementedError

    def _on_device(self, target: Any, source: Any) -> None:
        raise NotImplementedError

    def _foreign(self, value: Any) -> Any:
        """Memory of another library; None for what is on the host."""
        return None

    def interface(self) -> dict[str, Any]:
        """What an array's `__cuda_array_interface__` says beside itself: the stream that its values come on."""
        return {}

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """DLPack's kind and number of the device: what only stands for a GPU has its memory on the host."""
        return dlpack.CPU, 0

    def lend(self, array: DeviceArray, stream: int | None) -> None:
        """Before another library uses an array on `stream`, None for the default one: what it holds is there first, and
        the library may write to it from now on."""
        self.settle()

    def launch(self, kernel: Any, grid: Any, threads: int, *arguments: Any) -> None:
        """Run a kernel; the host waits only where it reads."""
        raise NotImplementedError

    def release(self) -> None:
        """Give memory that nothing refers to back to the driver."""

    def synchronize(self) -> None:
        """Wait until everything launched has run."""

    def settle(self) -> None:
        """Launch what was put off, before its results are looked at."""
        while self._deferred:
            self._deferred.pop()()

    def defer(self, flush: Callable[[], None]) -> None:
        """Have `flush` called when the device settles."""
        if flush not in self._deferred:
            self._deferred.append(flush)

    def is_ours(self, array: DeviceArray) -> bool:
        """Whether nobody else can write to the array's memory."""
        return True

    def _full(self, wanted: int, free: int, total: int) -> str:
        return (
            f"{self.name} is out of memory: {wanted / 1e6:.1f} MB wanted, {free / 1e6:.1f} of {total / 1e6:.1f} MB "
            "free; take smaller batches or precision='bf16-base', close() what is not needed, or stay on the CPU"
        )

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """A new array whose values are undefined."""
        return DeviceArray(self._allocate(shape, dtype), self)

    def upload(self, host: np.ndarray, bfloat16: bool = False) -> DeviceArray:
        """A NumPy array, copied to the device; as bfloat16 where asked."""
        values = np.ascontiguousarray(to_bfloat16(host) if bfloat16 else host).reshape(np.shape(host))
        memory = self._allocate(values.shape, values.dtype)
        self._to_device(memory, values)
        return DeviceArray(memory, self, bfloat16)

    def download(self, array: DeviceArray) -> np.ndarray:
        """An array, copied to NumPy."""
        self.settle()
        host = self._to_host(array.memory)
        return from_bfloat16(host) if array.bfloat16 else host

    def duplicate(self, array: DeviceArray) -> DeviceArray:
        """A copy on the device."""
        self.settle()
        new = DeviceArray(self._allocate(array.shape, array.memory.dtype), self, array.bfloat16)
        self._on_device(new.memory, array.memory)
        return new

    def assign(self, target: DeviceArray, value: Any) -> None:
        """Write a whole array in place: from a device array, a NumPy array or a number."""
        if not target.flags.writeable:
            raise ValueError("a bfloat16 array is read-only")
        self.settle()
        if isinstance(value, DeviceArray):
            if (value.shape, value.memory.dtype) != (target.shape, target.memory.dtype):
                raise ValueError(
                    f"an array of shape {target.shape} and {target.dtype} is written from one like it, "
                    f"got {value.shape} and {value.dtype}"
                )
            self._on_device(target.memory, value.memory)
        else:
            values = np.broadcast_to(np.asarray(value, target.dtype), target.shape)
            self._to_device(target.memory, np.ascontiguousarray(values))

    def write(self, target: DeviceArray, values: np.ndarray) -> None:
        """Copy to the device, in its order of launches, into memory that nothing put off reads."""
        self._to_device(target.memory, values)

    def adopt(self, value: Any) -> DeviceArray | None:
        """A view of what another library holds on this GPU; None for what is on the host.

        Raises
        ------
        ValueError
            For an array of another GPU.
        """
        if isinstance(value, DeviceArray):
            if value._device.index != self.index:
                raise ValueError(f"the array is on {value._device.name} and the layer on {self.name}: move one of them")
            return value
        memory = self._foreign(value)
        return None if memory is None else DeviceArray(memory, self)


class SimulatedDevice(Device):
    """Numba's simulator of a GPU."""

    simulated = True
    waves, busy = 2, 32  # to the simulator a thread is the dearest thing

    def __init__(self, index: int) -> None:
        self.index, self.name, self._deferred = index, f"cuda:{index}", []
        self.multiprocessors, self.compute_capability = 1, (0, 0)
        self._gpu = cuda.gpus[index]

    @property
    def description(self) -> str:
        return "Numba's simulator of a GPU, whose times say nothing of any GPU"

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cuda.device_array(shape, dtype)

    def address(self, memory: Any) -> int:
        return int(memory.__array_interface__["data"][0])

    def _to_device(self, target: Any, host: np.ndarray) -> None:
        if target.size:
            target.copy_to_device(host)

    def _to_host(self, source: Any) -> np.ndarray:
        return source.copy_to_host() if source.size else np.zeros(source.shape, source.dtype)

    def _on_device(self, target: Any, source: Any) -> None:
        if target.size:
            target.copy_to_device(source)

    def launch(self, kernel: Any, grid: Any, threads: int, *arguments: Any) -> None:
        with self._gpu, _prompt_threads():
            kernel[grid, threads](*map(as_argument, arguments))


@functools.cache
def open_device(index: int) -> Device:
    """The device of that number; DeviceUnavailableError that says what is missing."""
    reason = missing()
    if reason is None and index >= len(cuda.gpus):
        count = len(cuda.gpus)
        reason = f"there {'is 1 GPU' if count == 1 else f'are {count} GPUs'}, numbered from 0"
    if reason is not None:
        raise DeviceUnavailableError(f"device 'cuda:{index}' is not available: {reason}; or use device='cpu'")
    if SIMULATED:
        return SimulatedDevice(index)
    from .gpu import GPU

    return GPU(index)
