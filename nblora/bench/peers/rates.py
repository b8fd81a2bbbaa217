"""The machine's limits as a library reaches them: plain matrix products, and copies from memory to memory."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from .clock import Clock, HostClock

PRODUCT_SIZES = (512, 1024, 2048)
COPY_BYTES = 256 * 2**20
# A GPU needs larger products to be busy, and larger copies to leave its caches.
DEVICE_PRODUCT_SIZES = (2048, 4096, 8192)
DEVICE_COPY_BYTES = 2**30
SIMULATED_PRODUCT_SIZES, SIMULATED_COPY_BYTES = (32,), 2**16

Call = Callable[[], object]


class Library(NamedTuple):
    """How a library multiplies and copies.

    `bring` takes a NumPy array to the device, `like` makes a new array there; `product(a, b, out)` and
    `copy(source, target)` return calls on such arrays.
    """

    clock: Clock
    bring: Callable[[np.ndarray], Any]
    like: Callable[[Any], Any]
    product: Callable[[Any, Any, Any], Call]
    copy: Callable[[Any, Any], Call]
    sizes: tuple[int, ...]
    copied: int


def measure(name: str, dtype: str, threads: int, seconds: float, device: str = "cpu") -> dict:
    """Return the best `flops` (flop/s) and `bandwidth` (bytes read plus bytes written a second), best of all repeats.

    By the library of that name: on the CPU NumPy's BLAS, and copies in `threads` Python threads, or PyTorch; on a GPU
    PyTorch, CuPy, or nblora's own kernels.
    """
    library = _on_cpu(name, threads) if device == "cpu" else DEVICE_LIBRARIES[name](device)
    rng = np.random.default_rng(0)
    flops = 0.0
    for size in library.sizes:
        a, b = (library.bring(rng.standard_normal((size, size)).astype(dtype)) for _ in range(2))
        flops = max(flops, 2 * size**3 / _least(library.clock, library.product(a, b, library.like(a)), seconds))
    source = library.bring(np.ones(library.copied // np.dtype(dtype).itemsize, dtype))
    bandwidth = 2 * library.copied / _least(library.clock, library.copy(source, library.like(source)), seconds)
    return {"flops": flops, "bandwidth": bandwidth}


def _least(clock: Clock, call: Call, seconds: float) -> float:
    """The shortest of the repeats that fit into `seconds`, three at least."""
    call()
    least, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        least = min(least, *clock.times(call, 1))
        count += 1
    return least


def _on_cpu(name: str, threads: int) -> Library:
    product, copy = _torch_calls(threads) if name == "torch" else _numpy_calls(threads)
    return Library(HostClock(), lambda array: array, np.zeros_like, product, copy, PRODUCT_SIZES, COPY_BYTES)


def _numpy_calls(threads: int) -> tuple[Callable, Callable]:
    pool = ThreadPoolExecutor(threads)

    def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Call:
        return lambda: np.dot(a, b, out)

    def copy(source: np.ndarray, target: np.ndarray) -> Call:
        parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
        return lambda: list(pool.map(lambda pair: np.copyto(*pair), parts))

    return product, copy


def _torch_calls(threads: int) -> tuple[Callable, Callable]:
    import torch

    torch.set_num_threads(threads)

    def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Call:
        left, right, target = (torch.from_numpy(array) for array in (a, b, out))
        return lambda: torch.mm(left, right, out=target)

    def copy(source: np.ndarray, target: np.ndarray) -> Call:
        to, of = torch.from_numpy(target), torch.from_numpy(source)
        return lambda: to.copy_(of)

    return product, copy


def _torch_device(device: str) -> Library:
    import torch

    from .torch_device import clock

    def product(a: Any, b: Any, out: Any) -> Call:
        return lambda: torch.mm(a, b, out=out)

    def copy(source: Any, target: Any) -> Call:
        return lambda: target.copy_(source)

    def bring(array: np.ndarray) -> Any:
        return torch.from_numpy(array).to(device)

    return Library(clock(device), bring, torch.empty_like, product, copy, DEVICE_PRODUCT_SIZES, DEVICE_COPY_BYTES)


def _cupy_device(device: str) -> Library:
    import cupy

    from .cupy_peer import event_clock, select

    def product(a: Any, b: Any, out: Any) -> Call:
        return lambda: cupy.matmul(a, b, out=out)

    def copy(source: Any, target: Any) -> Call:
        return lambda: cupy.copyto(target, source)

    select(device)
    calls = (event_clock(), cupy.asarray, cupy.empty_like, product, copy)
    return Library(*calls, DEVICE_PRODUCT_SIZES, DEVICE_COPY_BYTES)


def _nblora_device(device: str) -> Library:
    """What stands where there is no other library: a plain layer's forward, and copies by the driver."""
    from numba.core import config

    import nblora
    from nblora.backends import resolve

    from .nblora_peer import device_clock

    backend = resolve(device)

    def product(a: Any, b: Any, out: Any) -> Call:
        layer = nblora.Dense(np.asarray(b)).to(device).eval()
        return lambda: layer.forward(a)

    def copy(source: Any, target: Any) -> Call:
        return lambda: target.__setitem__(..., source)

    calls = (device_clock(device), backend.from_host, backend.zeros_like, product, copy)
    if getattr(config, "ENABLE_CUDASIM", False):
        return Library(*calls, SIMULATED_PRODUCT_SIZES, SIMULATED_COPY_BYTES)
    return Library(*calls, DEVICE_PRODUCT_SIZES, DEVICE_COPY_BYTES)


DEVICE_LIBRARIES = {"torch": _torch_device, "cupy": _cupy_device, "nblora": _nblora_device}
