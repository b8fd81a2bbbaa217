"""What Python adds to a step on a tiny layer: the whole step, and its kernels alone on the tasks laid out for them.

The difference is to stay below 30 µs. Of the kernels' own time about 6 µs are Numba's: it takes each task apart.
"""

import numpy as np
import pytest

from nblora import DeltaLoRAAdapter, Dense

SAMPLES, FEATURES, RANK = 8, 16, 2
LR = 1e-7


@pytest.fixture
def step():
    """A step of an adapter on a tiny layer, and its backend."""
    rng = np.random.default_rng(0)
    adapter = DeltaLoRAAdapter(Dense.random(FEATURES, FEATURES, seed=0), RANK, seed=0)
    x, grad = (rng.normal(size=(SAMPLES, FEATURES)).astype(np.float32) for _ in range(2))

    def run():
        adapter.forward(x)
        adapter.backward_update(grad, LR)

    run()
    return run, adapter._backend


def test_a_tiny_step(benchmark, step):
    run, _ = step
    benchmark(run)


def test_the_kernels_of_a_tiny_step(benchmark, step, monkeypatch):
    run, backend = step
    calls = []

    def keep(kernel, *arguments):
        calls.append((kernel, arguments, getattr(arguments[0], "counters", np.zeros(0, np.int64))))
        kernel(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(backend._pool, "run", keep)
        run()
    assert [kernel.__name__ for kernel, _, _ in calls] == ["forward", "sweep", "update", "update"]

    def kernels():
        for kernel, arguments, counters in calls:
            counters[:] = 0  # nothing drawn yet; else there is nothing left to do
            kernel(*arguments)

    benchmark(kernels)
