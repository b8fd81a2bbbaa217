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
    calls, original = [], backend._crew.run

    def keep(kernel, task, workers):
        calls.append((kernel, task, workers))
        original(kernel, task, workers)

    with monkeypatch.context() as patch:
        patch.setattr(backend._crew, "run", keep)
        run()
    assert [kernel.__name__ for kernel, _, _ in calls] == ["few_forward", "few_sweep", "update", "update"]
    board = np.zeros(1, np.int64)

    def kernels():
        for kernel, task, workers in calls:
            task.counters[:] = 0  # nothing drawn yet; else there is nothing left to do
            kernel(task, workers, board, 0)

    benchmark(kernels)
