"""The machine's limits as a library reaches them: plain matrix products, and copies from memory to memory."""

import os
import time

import numpy as np

from .clock import Call, Clock
from .peer import Peer

# Sizes of the products and bytes of the copy. A GPU needs larger ones to be busy, and to leave its caches.
SIZES = {
    "cpu": ((512, 1024, 2048), 256 * 2**20),
    "cuda": ((2048, 4096, 8192), 2**30),
    "simulator": ((32,), 2**16),
}


def measure(peer: type[Peer], dtype: str, threads: int, seconds: float, device: str) -> dict[str, float]:
    """Return the best of all repeats: `flops` (flop/s) and `bandwidth` (bytes read plus bytes written a second)."""
    simulated = device != "cpu" and os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    sizes, copied = SIZES["simulator" if simulated else device.partition(":")[0]]
    clock, (bring, like, product, copy) = peer.clock(device), peer.tools(device, threads)
    rng = np.random.default_rng(0)
    flops = 0.0
    for size in sizes:
        a, b = (bring(rng.standard_normal((size, size)).astype(dtype)) for _ in range(2))
        out = like(a)
        flops = max(flops, 2 * size**3 / _least(clock, lambda: product(a, b, out), seconds))  # noqa: B023 - called at once
    source = bring(np.ones(copied // np.dtype(dtype).itemsize, dtype))
    target = like(source)
    return {"flops": flops, "bandwidth": 2 * copied / _least(clock, lambda: copy(source, target), seconds)}


def _least(clock: Clock, call: Call, seconds: float) -> float:
    """The shortest of the repeats that fit into `seconds`, three at least, after one that does not count."""
    return min(repeat(clock, call, seconds, 4)[1:])


def repeat(clock: Clock, call: Call, seconds: float, least: int) -> list[float]:
    """Call for `seconds` and at least `least` times; what each call took."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        times += clock(call, 1)
    return times
