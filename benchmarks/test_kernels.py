"""Single operations of the CPU backend, without the classes around them: `pytest benchmarks`.

Every operation is verified against float64 NumPy before it is timed. `nblora bench` is the comparison with other
libraries; these files are for work on one kernel (`--benchmark-autosave`, then `--benchmark-compare`).
"""

import numpy as np
import pytest

from nblora.backends import resolve
from nblora.backends.protocol import Base, Delta, LowRank, Operands
from nblora.bench.cases import (
    CHECKED_LR,
    DELTA_SCALING,
    DTYPES,
    LAYOUTS,
    MOMENTUM,
    SCALING,
    TIMED_LR,
    TOLERANCE,
    Case,
    faults,
    make_arrays,
    reference,
)

SHAPES = [(1, 768, 768), (64, 768, 768), (256, 1024, 1024), (256, 1000, 997), (16, 4096, 4096)]
UPDATED = (1024, 4096)
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01

pytestmark = [pytest.mark.parametrize("dtype", DTYPES)]
of_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def backend():
    return resolve("cpu")


class Problem:
    """A case's arrays as a backend takes them."""

    def __init__(self, shape, dtype, layout, kind="step"):
        self.case = Case(kind, *shape, dtype=dtype, layout=layout)
        self.arrays = make_arrays(self.case)
        self.right = reference(self.case, self.arrays)
        held = {name: array.copy() for name, array in self.arrays.items()}
        self.x, self.g = held["x"], held["g"]
        self.operands = Operands(
            Base(held["W"], held["b"], layout == "fullyconnected"),
            LowRank(held["A"], held["B"], SCALING),
            Delta(held["D"], held["V"], DELTA_SCALING, MOMENTUM),
            0,
            False,
        )
        self.held = held

    def verify(self, **got):
        """Compare what is given; what is not given is taken as right."""
        right = {name: self.right[name] for name in got}
        assert faults(self.case, self.arrays, right, got) == []


def relative_error(got, right):
    return np.max(np.abs(got - right)) / np.max(np.abs(right))


@of_shapes
@of_layouts
def test_forward(benchmark, backend, shape, dtype, layout):
    problem = Problem(shape, dtype, layout, "forward")
    y, _ = backend.forward(problem.x, problem.operands, None, False)
    problem.verify(y=y)
    benchmark(backend.forward, problem.x, problem.operands, None, False)


@of_shapes
@of_layouts
def test_backward(benchmark, backend, shape, dtype, layout):
    problem = Problem(shape, dtype, layout)
    _, saved = backend.forward(problem.x, problem.operands, None, True)
    found = backend.backward(problem.g, saved, problem.operands)
    lr, held = CHECKED_LR, problem.held
    V = MOMENTUM * held["V"].astype(np.float64) + (1 - MOMENTUM) * found.delta
    assert relative_error(V, problem.right["V"]) < TOLERANCE[dtype]
    steps = {name: held[name] - np.asarray(lr, dtype) * getattr(found, name) for name in ("A", "B")}
    problem.verify(grad_input=found.x, **steps)
    benchmark(backend.backward, problem.g, saved, problem.operands)


@of_shapes
@of_layouts
def test_backward_update(benchmark, backend, shape, dtype, layout):
    problem = Problem(shape, dtype, layout)
    _, saved = backend.forward(problem.x, problem.operands, None, True)
    found = backend.backward_update(problem.g, saved, problem.operands, CHECKED_LR, CHECKED_LR)
    problem.verify(grad_input=found.x, D=problem.held["D"], V=problem.held["V"])
    benchmark(backend.backward_update, problem.g, saved, problem.operands, TIMED_LR, TIMED_LR)


@of_shapes
@of_layouts
def test_merge(benchmark, backend, shape, dtype, layout):
    problem = Problem(shape, dtype, layout)
    held = {name: array.astype(np.float64) for name, array in problem.arrays.items()}
    change = SCALING * (held["A"] @ held["B"])
    right = held["W"] + (change.T if layout == "fullyconnected" else change) + DELTA_SCALING * held["D"]
    assert relative_error(backend.merge(problem.operands), right) < TOLERANCE[dtype]
    benchmark(backend.merge, problem.operands)


def draw(dtype, count):
    """Arrays of the updated shape, all positive: as square roots want second moments."""
    rng = np.random.default_rng(0)
    return [rng.uniform(0.1, 1.0, UPDATED).astype(dtype) for _ in range(count)]


def test_sgd_update(benchmark, backend, dtype):
    parameter, gradient = draw(dtype, 2)
    right = parameter - CHECKED_LR * gradient.astype(np.float64)
    backend.sgd_update(parameter, gradient, CHECKED_LR)
    assert relative_error(parameter, right) < TOLERANCE[dtype]
    benchmark(backend.sgd_update, parameter, gradient, TIMED_LR)


def test_momentum_update(benchmark, backend, dtype):
    delta, velocity, gradient = draw(dtype, 3)
    V = MOMENTUM * velocity.astype(np.float64) + (1 - MOMENTUM) * gradient
    D = delta - CHECKED_LR * V
    backend.momentum_update(delta, velocity, gradient, MOMENTUM, CHECKED_LR)
    assert relative_error(velocity, V) < TOLERANCE[dtype]
    assert relative_error(delta, D) < TOLERANCE[dtype]
    benchmark(backend.momentum_update, delta, velocity, gradient, MOMENTUM, TIMED_LR)


def test_adamw_update(benchmark, backend, dtype):
    parameter, gradient, first, second = draw(dtype, 4)
    m = BETAS[0] * first.astype(np.float64) + (1 - BETAS[0]) * gradient
    v = BETAS[1] * second.astype(np.float64) + (1 - BETAS[1]) * gradient.astype(np.float64) ** 2
    step, lr = 3, CHECKED_LR
    right = parameter * (1 - lr * DECAY) - lr * (m / (1 - BETAS[0] ** step)) / (
        np.sqrt(v / (1 - BETAS[1] ** step)) + EPS
    )
    backend.adamw_update(parameter, gradient, first, second, lr, BETAS, EPS, DECAY, step)
    # Differences of numbers of order 1 that nearly cancel: measured against 1, not against what is left.
    assert np.max(np.abs(parameter - right)) < 10 * TOLERANCE[dtype]
    benchmark(backend.adamw_update, parameter, gradient, first, second, TIMED_LR, BETAS, EPS, DECAY, step)
