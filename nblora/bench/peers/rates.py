"""The machine's limits as a library reaches them: plain matrix products, and copies from memory to memory."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PRODUCT_SIZES = (512, 1024, 2048)
COPY_BYTES = 256 * 2**20


def measure(dtype: str, threads: int, seconds: float, with_torch: bool) -> dict:
    """Return the best `flops` (flop/s) and `bandwidth` (bytes read plus bytes written a second), best of all repeats.

    NumPy's BLAS and copies in `threads` Python threads, or PyTorch's product and copy.
    """
    product, copy = _torch_calls(threads) if with_torch else _numpy_calls(threads)
    rng = np.random.default_rng(0)
    flops = 0.0
    for size in PRODUCT_SIZES:
        a, b = (rng.standard_normal((size, size)).astype(dtype) for _ in range(2))
        flops = max(flops, 2 * size**3 / _least(product(a, b, np.zeros_like(a)), seconds))
    source = np.ones(COPY_BYTES // np.dtype(dtype).itemsize, dtype)
    bandwidth = 2 * source.nbytes / _least(copy(source, np.zeros_like(source)), seconds)
    return {"flops": flops, "bandwidth": bandwidth}


def _least(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the repeats that fit into `seconds`, three at least."""
    call()
    least, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - begin)
        count += 1
    return least


def _numpy_calls(threads: int) -> tuple[Callable, Callable]:
    pool = ThreadPoolExecutor(threads)

    def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], object]:
        return lambda: np.dot(a, b, out)

    def copy(source: np.ndarray, target: np.ndarray) -> Callable[[], object]:
        parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
        return lambda: list(pool.map(lambda pair: np.copyto(*pair), parts))

    return product, copy


def _torch_calls(threads: int) -> tuple[Callable, Callable]:
    import torch

    torch.set_num_threads(threads)

    def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[], object]:
        left, right, target = (torch.from_numpy(array) for array in (a, b, out))
        return lambda: torch.mm(left, right, out=target)

    def copy(source: np.ndarray, target: np.ndarray) -> Callable[[], object]:
        to, of = torch.from_numpy(target), torch.from_numpy(source)
        return lambda: to.copy_(of)

    return product, copy
