"""Blocks of CUDA threads in one Python thread: every thread of a block is a greenlet that runs to its next barrier.

The order of the threads is chosen (forward, reverse, random), shared memory begins as NaN, accesses outside an array
and misaligned vectors raise, threads that wait at different barriers raise, tensor-core products gather their warp, and
all global loads and stores are counted. Kernels run as written: only the names `cuda`, the types used as casts, device
functions and intrinsics are bound to stand-ins.
"""

import contextvars
import random
import weakref
from collections import Counter
from types import CellType, FunctionType, SimpleNamespace

import numpy as np
from greenlet import getcurrent, greenlet
from numba import types
from numba.np.numpy_support import as_dtype

from nblora.kernels.common.cuda import simulated, target

ORDERS = ("forward", "reverse", "random")
CASTS = {types.int32: int, types.int64: int, types.float32: np.float32, types.float64: np.float64}


OWNERS: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
"""The array that owns the memory at an address, for kernels that are given addresses."""


def _owner(address):
    """The memory that an array at this address lies in: its beginning, or a part of it."""
    found = OWNERS.get(address)
    if found is None:
        for memory in list(OWNERS.values()):
            if memory.ctypes.data <= address < memory.ctypes.data + memory.nbytes:
                return memory
        raise IndexError(f"no array lies at {address}")
    return found


class Divergence(RuntimeError):
    """Threads of a block, or of a warp, wait for each other at different places."""


class Launch:
    """One launch of one kernel; also what stands for the module `cuda` inside it."""

    def __init__(self, grid, block, order, seed, traffic):
        self.gridDim, self.blockDim = _dim3(grid), _dim3(block)
        self.order, self.random, self.traffic = order, random.Random(seed), traffic
        self.shared = SimpleNamespace(array=self._shared_array)
        self._bound = {}
        self._stand_ins = self._intrinsics()

    # --- the module `cuda` as kernels see it

    threadIdx = property(lambda self: self.current.index)
    blockIdx = property(lambda self: self.block)

    def grid(self, dimensions):
        assert dimensions == 1
        return self.block.x * self.blockDim.x + self.current.index.x

    def gridsize(self, dimensions):
        assert dimensions == 1
        return self.gridDim.x * self.blockDim.x

    def syncthreads(self):
        import sys

        caller = sys._getframe(1)
        self.current.waits = (caller.f_code, caller.f_lasti)
        self.scheduler.switch()

    def _shared_array(self, shape, dtype, alignment=None):
        import sys

        caller = sys._getframe(1)
        key = caller.f_code, caller.f_lasti
        if key not in self.memory:
            kind = as_dtype(dtype) if isinstance(dtype, types.Type) else dtype
            self.memory[key] = np.full(shape, np.nan if np.dtype(kind).kind == "f" else -0x5A5A5A5A, kind)
        return self.memory[key]

    # --- intrinsics that differ from their simulated form

    def _intrinsics(self):
        def load(array, offset, valid, aligned, lanes):
            self.traffic[id(simulated.flat(array).base), "read"] += max(0, min(int(valid), lanes))
            return simulated.load(array, offset, valid, aligned, lanes)

        def store(array, offset, valid, aligned, values):
            self.traffic[id(simulated.flat(array).base), "written"] += max(0, min(int(valid), len(values)))
            simulated.store(array, offset, valid, aligned, values)

        def memory(address, count, zero):
            owner = _owner(int(address))
            begin = (int(address) - owner.ctypes.data) // owner.itemsize
            return owner[begin : begin + int(count)]

        names = {name: f for name, f in vars(simulated).items() if isinstance(f, FunctionType)}
        return names | {"load": load, "store": store, "memory": memory, "tensor_accumulate": self._tensor_accumulate}

    def _tensor_accumulate(self, sums, p0, p1, q0, q1):
        """PTX ISA, mma.m16n8k8 with .tf32: where each lane's elements of the fragments lie."""
        warp = self._gather(((p0, p1), (q0, q1)))
        wiring = list(simulated.mma_wiring())
        if "products" not in warp:
            warp["products"] = [self._mma(warp["values"], a, b) for a, b, _ in wiring]
        group, member = divmod(self.current.lane % 32, 4)
        held = np.array(sums)
        for (_, _, places), product in zip(wiring, warp["products"], strict=True):
            for index, place in enumerate(places):
                held[place] += product[group + index // 2 * 8, 2 * member + index % 2]
        return held

    @staticmethod
    def _mma(lanes, a_wiring, b_wiring):
        """(16, 8) x (8, 8) of the values that the wiring picks from every lane of a warp."""
        a, b = np.zeros((16, 8)), np.zeros((8, 8))
        for lane, (p, q) in enumerate(lanes):
            group, member = divmod(lane, 4)
            for index, (which, element) in enumerate(a_wiring):
                a[group + index % 2 * 8, member + index // 2 * 4] = p[which][element]
            for index, (which, element) in enumerate(b_wiring):
                b[member + index * 4, group] = q[which][element]
        return (a @ b).astype(np.float32)

    def _gather(self, value):
        """Wait until the whole warp has brought a value; the dict that all its lanes share."""
        thread = self.current
        thread.brings = value
        self.scheduler.switch()
        return thread.warp

    # --- binding and running

    def bind(self, function):
        """The Python function of a kernel or device function, its global and enclosed names bound to stand-ins."""
        if function in self._bound:
            return self._bound[function]
        used = function.__code__.co_names
        names = {name: self._replace(name, v) for name, v in function.__globals__.items() if name in used}
        names["__builtins__"] = function.__globals__["__builtins__"]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        closure = tuple(CellType(self._replace(name, cell.cell_contents)) for name, cell in cells)
        copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
        self._bound[function] = copy
        return copy

    def _replace(self, name, value):
        if value is target.cuda:
            return self
        if isinstance(value, types.Type) and value in CASTS:
            return CASTS[value]
        if hasattr(value, "py_func"):
            return self.bind(value.py_func)
        return self._stand_ins.get(name, value)

    def run(self, kernel, args):
        function = self.bind(kernel.py_func)
        self.scheduler = getcurrent()
        with np.errstate(all="ignore"):
            for z in range(self.gridDim.z):
                for y in range(self.gridDim.y):
                    for x in range(self.gridDim.x):
                        self.block = SimpleNamespace(x=x, y=y, z=z)
                        self.memory = {}
                        self._run_block(function, args)

    def _run_block(self, function, args):
        threads = []
        for lane in range(self.blockDim.x):
            index = SimpleNamespace(x=lane, y=0, z=0)
            run = greenlet(lambda: function(*args))
            run.gr_context = contextvars.copy_context()  # NumPy's silence about infinities and NaN
            threads.append(SimpleNamespace(lane=lane, index=index, waits=None, brings=None, run=run))
        ready = list(threads)
        while ready:
            self._arrange(ready)
            for thread in ready:
                thread.waits = thread.brings = None
                self.current = thread
                thread.run.switch()
            ready = self._released(threads)

    def _arrange(self, ready):
        if self.order == "random":
            self.random.shuffle(ready)
        else:
            ready.sort(key=lambda thread: thread.lane, reverse=self.order == "reverse")

    def _released(self, threads):
        """Threads that may go on: whole warps at a gathering first, else the whole block at one barrier."""
        alive = [thread for thread in threads if not thread.run.dead]
        ready = []
        for first in range(0, len(threads), 32):
            warp = threads[first : first + 32]
            if any(thread.brings is not None for thread in warp):
                if any(thread.brings is None for thread in warp):
                    raise Divergence("part of a warp is at a tensor-core product, part elsewhere")
                shared = {"values": [thread.brings for thread in warp]}
                for thread in warp:
                    thread.warp = shared
                ready += warp
        if ready or not alive:
            return ready
        if len(alive) < len(threads):
            raise Divergence(f"{len(threads) - len(alive)} threads ended while {len(alive)} wait at a barrier")
        if len({thread.waits for thread in alive}) > 1:
            raise Divergence("threads wait at different barriers")
        return alive


def _dim3(size):
    x, y, z = (*size, 1, 1)[:3] if isinstance(size, tuple) else (size, 1, 1)
    return SimpleNamespace(x=x, y=y, z=z)


def emulate(kernel, grid, block, args, order="forward", seed=0, traffic=None):
    """Run a kernel on NumPy arrays; `traffic` counts elements by (id of the array that owns the memory, direction)."""
    traffic = Counter() if traffic is None else traffic
    Launch(grid, block, order, seed, traffic).run(kernel, args)
    return traffic
