"""One NVIDIA GPU by its driver: memory, copies, launches. Numba compiles the kernels and has no part in a launch.

Its own launches take 40 to 80 µs of the host, its allocations 40; here both are a few.
"""

import ctypes
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver
from numba.core import types

from nblora.errors import DeviceMemoryError

from . import dlpack
from .cubins import machine_code
from .device import Device, DeviceArray
from .memory import Block, Memory, Pool

STREAM = 1  # CUDA's name of the legacy default stream, which every launch and copy is on
_WAITING = (None, 1, 2)  # streams that wait for that one, and that one for them: itself, and the default of each thread
_OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
_SUCCESS = driver.CUresult.CUDA_SUCCESS
_ATTRIBUTE = driver.CUdevice_attribute


class CUDAError(RuntimeError):
    """The driver refused something."""


def check(answer: tuple[Any, ...], what: str) -> Any:
    """What the driver answered; CUDAError where it is an error."""
    if answer[0] != _SUCCESS:
        _, name = driver.cuGetErrorName(answer[0])
        raise CUDAError(f"{what} failed: {name.decode() if isinstance(name, bytes) else answer[0]}")
    return answer[1] if len(answer) == 2 else answer[1:]


class Launcher:
    """One kernel for arguments of given types: where its parameters lie, from one launch to the next."""

    def __init__(self, function: Any, formats: Sequence[str]) -> None:
        self.function = function
        self._pack = struct.Struct("@" + "".join(formats)).pack_into
        offsets, end = [], 0
        for letter in "".join(formats):
            size = struct.calcsize(letter)
            offsets.append(-(-end // size) * size)
            end = offsets[-1] + size
        self._values = ctypes.create_string_buffer(end)
        begin = ctypes.addressof(self._values)
        self._places = (ctypes.c_void_p * len(offsets))(*(begin + offset for offset in offsets))
        self._address = ctypes.addressof(self._places)
        self._lock = threading.Lock()

    def __call__(self, grid: tuple[int, int, int], threads: int, values: list[Any]) -> None:
        """Launch; the driver has read all values when this returns."""
        with self._lock:
            self._pack(self._values, 0, *values)
            answer = driver.cuLaunchKernel(self.function, *grid, threads, 1, 1, 0, STREAM, self._address, 0)
        if answer[0] != _SUCCESS:
            check(answer, f"a launch of {grid} blocks")


class Borrowed:
    """Memory of another library. It is handed back once what uses it here has run, for its owner may write there next,
    on a stream of its own."""

    __slots__ = ("_foreign", "_leaving")

    def __init__(self, foreign: dlpack.Foreign, leaving: "deque[dlpack.Foreign]") -> None:
        self._foreign, self._leaving = foreign, leaving

    def __del__(self) -> None:
        self._leaving.append(self._foreign)  # a collection may run this anywhere: it only leaves a note


class GPU(Device):
    """One GPU. Everything runs in the order of the calls, and a thread has the GPU's context current once it came."""

    def __init__(self, index: int) -> None:
        self.index, self.name, self._deferred = index, f"cuda:{index}", []
        check(driver.cuInit(0), "starting the driver")
        self._ordinal = check(driver.cuDeviceGet(index), "looking for the GPU")
        self._context = check(driver.cuDevicePrimaryCtxRetain(self._ordinal), "opening the GPU")
        self.multiprocessors = self._attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.compute_capability = (
            self._attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        self._enter()
        _, total = self.memory()
        # An eighth of the memory may lie idle: a step's arrays come and go, and others use the GPU too.
        self._pool = Pool(self._driver_allocate, self._driver_free, total // 8)
        self._launchers: dict[tuple[Any, ...], Launcher] = {}
        self._modules: list[Any] = []
        self._leaving: deque[dlpack.Foreign] = deque()
        self._parting: deque[tuple[Any, list[dlpack.Foreign]]] = deque()
        self._lock = threading.RLock()

    def _attribute(self, which: Any) -> int:
        return int(check(driver.cuDeviceGetAttribute(which, self._ordinal), "asking for an attribute"))

    def _enter(self) -> None:
        """Make the GPU's context this thread's: another library may have changed it."""
        driver.cuCtxSetCurrent(self._context)

    @property
    def description(self) -> str:
        """What the GPU is, for people."""
        name = check(driver.cuDeviceGetName(128, self._ordinal), "asking for the name")
        capability = ".".join(map(str, self.compute_capability))
        _, total = self.memory()
        return (
            f"{name.split(bytes(1))[0].decode()}, compute capability {capability}, {self.multiprocessors} "
            f"multiprocessors, {total / 2**30:.0f} GiB"
        )

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        self._enter()
        free, total = check(driver.cuMemGetInfo(), "asking for the memory")
        return free, total

    # --- memory ------------------------------------------------------------------------------------------------

    def _driver_allocate(self, size: int) -> int | None:
        answer = driver.cuMemAlloc(size)
        return None if answer[0] == _OUT_OF_MEMORY else int(check(answer, f"allocating {size} bytes"))

    def _driver_free(self, address: int) -> None:
        check(driver.cuMemFree(address), "freeing memory")

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> Memory:
        kind = np.dtype(dtype)
        size = kind.itemsize
        for extent in shape:
            size *= extent
        if not size:
            return Memory(0, tuple(shape), kind, None)
        self._enter()
        block = self._pool.take(size)
        if block is None:
            free, total = self.memory()
            raise DeviceMemoryError(self._full(size, free, total))
        return Memory(block.address, tuple(shape), kind, block)

    def address(self, memory: Memory) -> int:
        return memory.address

    def _to_device(self, target: Memory, host: np.ndarray) -> None:
        if target.size:
            self._enter()
            # From memory that the system may move the driver copies it first, so the host may change it afterwards.
            check(driver.cuMemcpyHtoDAsync(target.address, host.ctypes.data, host.nbytes, STREAM), "a copy to the GPU")

    def _to_host(self, source: Memory) -> np.ndarray:
        host = np.empty(source.shape, source.dtype)
        if host.size:
            self._enter()
            check(driver.cuMemcpyDtoHAsync(host.ctypes.data, source.address, host.nbytes, STREAM), "a copy to the host")
            self._wait()
        return host

    def _on_device(self, target: Memory, source: Memory) -> None:
        if target.size:
            self._enter()
            size = target.size * target.dtype.itemsize
            check(driver.cuMemcpyDtoDAsync(target.address, source.address, size, STREAM), "a copy on the GPU")

    def interface(self) -> dict[str, Any]:
        return {"stream": STREAM}

    def is_ours(self, array: DeviceArray) -> bool:
        owner = array.memory.owner
        return isinstance(owner, Block) and not owner.lent

    def release(self) -> None:
        """Give idle memory back to the driver."""
        self._enter()
        if self._leaving or self._parting:
            self._wait()
        self._pool.empty()

    # --- what other libraries hold -----------------------------------------------------------------------------

    @property
    def dlpack_device(self) -> tuple[int, int]:
        return dlpack.CUDA, self.index

    def lend(self, array: DeviceArray, stream: int | None) -> None:
        self.settle()
        owner = array.memory.owner
        if isinstance(owner, Block):
            owner.lent = True
            owner.elsewhere = owner.elsewhere or stream not in _WAITING
        if stream not in (*_WAITING, -1):  # DLPack's word for a consumer that sees to it itself
            self._enter()
            event = self._mark()
            check(driver.cuStreamWaitEvent(stream, event, 0), "having a stream wait")
            driver.cuEventDestroy(event)

    def _mark(self) -> Any:
        """An event that comes after everything launched so far."""
        flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event = check(driver.cuEventCreate(flags), "making an event")
        check(driver.cuEventRecord(event, STREAM), "marking a place in the stream")
        return event

    def _hand_back(self) -> None:
        """Hand memory of others back: what was let go of before now, once the launches so far have run."""
        while self._parting and driver.cuEventQuery(self._parting[0][0])[0] == _SUCCESS:
            driver.cuEventDestroy(self._parting.popleft()[0])
        leaving = [self._leaving.popleft() for _ in range(len(self._leaving))]
        if leaving:
            self._parting.append((self._mark(), leaving))

    def _foreign(self, value: Any) -> Memory | None:
        self._enter()
        if self._leaving or self._parting:
            self._hand_back()
        found = dlpack.take(value, STREAM, self._owner, self.index)
        if found is None:
            return None
        if found.is_contiguous:
            return Memory(found.address, found.shape, found.dtype, Borrowed(found, self._leaving))
        span = self._to_host(Memory(found.address, (found.span,), np.dtype(np.uint8), found))
        view = np.ndarray(found.shape, found.dtype, span.data, 0, found.strides)
        host = np.ascontiguousarray(view)
        copy = self._allocate(host.shape, host.dtype)
        self._to_device(copy, host)
        return copy

    def _owner(self, address: int) -> int:
        which = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return int(check(driver.cuPointerGetAttribute(which, address), "asking whose memory it is"))

    # --- launches ----------------------------------------------------------------------------------------------

    def launch(self, kernel: Any, grid: Any, threads: int, *arguments: Any) -> None:
        """Run a kernel; the host waits only where it reads."""
        key: list[Any] = [kernel]
        values: list[Any] = []
        for argument in arguments:
            if type(argument) is DeviceArray:
                memory = argument.memory
                key.append(memory.kind)
                values += memory.parameters
            else:
                key.append(type(argument))
                values.append(argument)
        launcher = self._launchers.get(tuple(key)) or self._prepare(tuple(key))
        self._enter()
        launcher(grid if type(grid) is tuple and len(grid) == 3 else _three(grid), threads, values)

    def _prepare(self, key: tuple[Any, ...]) -> Launcher:
        with self._lock:
            if key not in self._launchers:
                kinds = [_numba_type(part) for part in key[1:]]
                name, code = machine_code(key[0], kinds, self.compute_capability)
                self._enter()  # compiling has Numba open the GPU
                module = check(driver.cuModuleLoadData(code), "loading a kernel")
                function = check(driver.cuModuleGetFunction(module, name), "looking for a kernel")
                self._modules.append(module)
                self._launchers[key] = Launcher(function, [_format(part) for part in key[1:]])
            return self._launchers[key]

    def synchronize(self) -> None:
        """Wait until everything launched has run."""
        self.settle()
        self._enter()
        self._wait()

    def _wait(self) -> None:
        """Wait for the stream; nothing uses what was let go of before."""
        leaving = [self._leaving.popleft() for _ in range(len(self._leaving))]
        check(driver.cuStreamSynchronize(STREAM), "waiting for the GPU")
        leaving.clear()
        while self._parting:
            driver.cuEventDestroy(self._parting.popleft()[0])


def _three(grid: Any) -> tuple[int, int, int]:
    sizes = grid if isinstance(grid, tuple) else (grid,)
    return (*sizes, 1, 1)[:3]


def _numba_type(part: Any) -> Any:
    """Numba's type of an argument: an array's dtype and number of dimensions, or the type of a number."""
    if isinstance(part, tuple):
        letter, ndim = part
        return types.Array(getattr(types, np.dtype(letter).name), ndim, "C")
    return types.int32 if part is int else getattr(types, np.dtype(part).name)


def _format(part: Any) -> str:
    """The letters of `struct` for an argument's parameters."""
    if isinstance(part, tuple):
        return "q" * (5 + 2 * part[1])
    return "i" if part is int else np.dtype(part).char
