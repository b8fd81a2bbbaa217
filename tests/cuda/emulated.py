"""The CUDA backend on the emulator: the host code as it is, its device replaced by NumPy memory and greenlets."""

from collections import Counter

import numpy as np

from nblora.backends.cuda import CUDABackend
from nblora.backends.cuda.attention import TINY_ATTENTION
from nblora.backends.cuda.shapes import Shapes
from nblora.backends.device import Device, DeviceArray
from nblora.kernels.linear.cuda.tiles import Tile
from tests.cuda.emulator import OWNERS, emulate

# Small tiles: a few threads each, so that small arrays have many blocks with edges on every side.
SMALL = {
    "float32": Shapes(Tile(16, 16, 4), Tile(8, 16, 4), Tile(16, 8, 4, groups=4), Tile(8, 8, 4, groups=2), 64, 16),
    "float64": Shapes(
        Tile(8, 8, 2, "float64"),
        Tile(4, 8, 2, "float64"),
        Tile(8, 4, 2, "float64", groups=2),
        Tile(4, 8, 2, "float64", groups=4),
        32,
        16,
    ),
}
TENSOR = {
    "float32": Shapes(
        Tile(32, 32, 8, tensor=True),
        Tile(32, 32, 8, tensor=True),
        Tile(16, 8, 4, groups=4),
        Tile(32, 32, 8, tensor=True, groups=2),
        32,
        16,
    )
}


class EmulatedDevice(Device):
    """A device of two multiprocessors whose memory is NumPy's; new memory is NaN.

    With `aligned=False` no array begins at a multiple of 16 bytes, so no vector may be used.
    """

    busy = 8  # blocks of the small tiles have 4 or so

    def __init__(self, order="forward", aligned=True):
        self.index, self.name, self.order, self.aligned = 0, "cuda:0", order, aligned
        self.multiprocessors, self.compute_capability = 2, (8, 0)
        self._deferred = []
        self.traffic, self.launches = Counter(), []

    def _allocate(self, shape, dtype):
        size, dtype = int(np.prod(shape)), np.dtype(dtype)
        lanes = 16 // dtype.itemsize
        memory = np.empty(size + 2 * lanes, dtype)
        start = -memory.ctypes.data % 16 // dtype.itemsize + (0 if self.aligned else 1)
        array = memory[start : start + size].reshape(shape)
        OWNERS[array.ctypes.data] = memory
        array.fill(np.nan if dtype.kind == "f" else 0xAB)
        return array

    def address(self, memory):
        return memory.ctypes.data

    def _to_device(self, target, host):
        target[...] = host

    def _to_host(self, source):
        return np.array(source)

    def _on_device(self, target, source):
        target[...] = source

    def launch(self, kernel, grid, threads, *arguments):
        given = [a.memory if isinstance(a, DeviceArray) else a for a in arguments]
        self.launches.append((kernel, grid, threads, given))
        emulate(kernel, grid, threads, given, order=self.order, traffic=self.traffic)


def make_backend(order="forward", aligned=True, precision="float32", shapes=None):
    """A CUDA backend that runs emulated, on small tiles."""
    backend = CUDABackend(EmulatedDevice(order, aligned), precision)
    backend._plain, backend._attention = SMALL, TINY_ATTENTION
    backend._shapes = shapes or (SMALL | TENSOR if precision == "tf32" else SMALL)
    return backend
