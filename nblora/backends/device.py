"""One CUDA device: what is missing to use it, its memory, and launches. Only the CUDA backend imports this."""

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from nblora.errors import DeviceMemoryError, DeviceUnavailableError
from nblora.kernels.common.cuda.simulated import from_bfloat16, to_bfloat16
from nblora.kernels.common.cuda.target import COMPILED, SIMULATED
from nblora.kernels.common.cuda.target import module as cuda


def missing() -> str | None:
    """What keeps CUDA from running here, with the remedy; None where nothing does."""
    if SIMULATED:
        return None
    if not COMPILED:
        return "the package numba-cuda is not installed: pip install 'nblora[cuda12]' or 'nblora[cuda13]'"
    if cuda.is_available():
        return None
    if getattr(cuda, "cuda_error", lambda: None)() is not None:
        return "no NVIDIA driver answers: install one, and look at what nvidia-smi says"
    return "the driver finds no GPU: look at what nvidia-smi says, and at CUDA_VISIBLE_DEVICES"


def device_count() -> int:
    """The number of CUDA devices, the simulated one included."""
    return 0 if missing() is not None else len(cuda.gpus)


class DeviceArray:
    """An array in a GPU's memory, C-contiguous; what `forward` returns for what came from there.

    CuPy, PyTorch and Numba take it without a copy by `__cuda_array_interface__`, NumPy with one by `numpy.asarray`.
    Only whole arrays are written to: `array[...] = value`. bfloat16 ones read as float32 and are read-only.
    """

    def __init__(self, memory: Any, device: "Device", bfloat16: bool = False) -> None:
        self.memory, self._device, self.bfloat16 = memory, device, bfloat16
        self.shape = tuple(memory.shape)
        self.dtype = np.dtype(np.float32 if bfloat16 else memory.dtype)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

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
        kind = "<u2" if self.bfloat16 else self.dtype.str
        return {"shape": self.shape, "typestr": kind, "data": (self.address, False), "strides": None, "version": 3}

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
        if key is not Ellipsis:
            raise IndexError("a device array is written as a whole: array[...] = value")
        self._device.assign(self, value)

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
    """A CUDA device, or Numba's simulator of one."""

    simulated = SIMULATED
    waves = 2 if SIMULATED else 8
    """Blocks a multiprocessor where a grid strides over its work. To the simulator a thread is the dearest thing."""

    def __init__(self, index: int) -> None:
        self.index, self.name = index, f"cuda:{index}"
        self._gpu = cuda.gpus[index]
        if SIMULATED:
            self.multiprocessors, self.compute_capability = 1, (0, 0)
        else:
            with self._gpu:
                found = cuda.get_current_device()
                self.multiprocessors = found.MULTIPROCESSOR_COUNT
                self.compute_capability = tuple(found.compute_capability)

    @property
    def description(self) -> str:
        """What the device is, for people."""
        if SIMULATED:
            return "Numba's simulator of a GPU, whose times say nothing of any GPU"
        with self._gpu:
            found = cuda.get_current_device()
            total = cuda.current_context().get_memory_info()[1]
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        capability = ".".join(map(str, self.compute_capability))
        return (
            f"{name}, compute capability {capability}, {self.multiprocessors} multiprocessors, {total / 2**30:.0f} GiB"
        )

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        try:
            with self._gpu:
                return cuda.device_array(shape, dtype)
        except Exception as error:
            raise self._explained(error, int(np.prod(shape)) * np.dtype(dtype).itemsize) from error

    def _explained(self, error: Exception, wanted: int) -> Exception:
        """Out of memory, told with sizes; any other error as it is."""
        if "OUT_OF_MEMORY" not in str(error).upper():
            return error
        with self._gpu:
            free, total = cuda.current_context().get_memory_info()
        return DeviceMemoryError(
            f"{self.name} is out of memory: {wanted / 1e6:.1f} MB wanted, {free / 1e6:.1f} of {total / 1e6:.1f} MB "
            "free; take smaller batches or precision='bf16-base', close() what is not needed, or stay on the CPU"
        )

    def address(self, memory: Any) -> int:
        """Address of a piece of memory."""
        if SIMULATED:
            return int(memory.__array_interface__["data"][0])
        return int(memory.device_ctypes_pointer.value or 0)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """A new array whose values are undefined."""
        return DeviceArray(self._allocate(shape, dtype), self)

    def upload(self, host: np.ndarray, bfloat16: bool = False) -> DeviceArray:
        """A NumPy array, copied to the device; as bfloat16 where asked."""
        values = np.ascontiguousarray(to_bfloat16(host) if bfloat16 else host)
        memory = self._allocate(values.shape, values.dtype)
        if values.size:
            with self._gpu:
                memory.copy_to_device(values)
        return DeviceArray(memory, self, bfloat16)

    def download(self, array: DeviceArray) -> np.ndarray:
        """An array, copied to NumPy."""
        if not array.size:
            return np.zeros(array.shape, array.dtype)
        with self._gpu:
            host = array.memory.copy_to_host()
        return from_bfloat16(host) if array.bfloat16 else host

    def duplicate(self, array: DeviceArray) -> DeviceArray:
        """A copy on the device."""
        new = DeviceArray(self._allocate(array.shape, array.memory.dtype), self, array.bfloat16)
        if array.size:
            with self._gpu:
                new.memory.copy_to_device(array.memory)
        return new

    def assign(self, target: DeviceArray, value: Any) -> None:
        """Write a whole array in place: from a device array, a NumPy array or a number."""
        if not target.flags.writeable:
            raise ValueError("a bfloat16 array is read-only")
        if isinstance(value, DeviceArray):
            source = value.memory
        else:
            source = np.ascontiguousarray(np.broadcast_to(np.asarray(value, target.dtype), target.shape))
        if target.size:
            with self._gpu:
                target.memory.copy_to_device(source)

    def adopt(self, value: Any) -> DeviceArray | None:
        """A view of what another library holds on a GPU; None for what is on the host."""
        if isinstance(value, DeviceArray):
            return value
        if SIMULATED or not hasattr(value, "__cuda_array_interface__"):
            return None
        with self._gpu:
            memory = cuda.as_cuda_array(value)
            if not memory.is_c_contiguous():
                memory = cuda.to_device(np.ascontiguousarray(memory.copy_to_host()))
        return DeviceArray(memory, self)

    def launch(self, kernel: Any, grid: Any, threads: int, *arguments: Any) -> None:
        """Run a kernel on the default stream; the host waits only where it reads."""
        with self._gpu, _prompt_threads() if SIMULATED else contextlib.nullcontext():
            kernel[grid, threads](*map(as_argument, arguments))

    def release(self) -> None:
        """Give memory that nothing refers to back to the driver, which Numba otherwise puts off."""
        if not SIMULATED:
            with self._gpu:
                cuda.current_context().deallocations.clear()


def open_device(index: int) -> Device:
    """The device of that number; DeviceUnavailableError that says what is missing."""
    reason = missing()
    if reason is None and index >= len(cuda.gpus):
        count = len(cuda.gpus)
        reason = f"there {'is 1 GPU' if count == 1 else f'are {count} GPUs'}, numbered from 0"
    if reason is not None:
        raise DeviceUnavailableError(f"device 'cuda:{index}' is not available: {reason}; or use device='cpu'")
    return Device(index)
