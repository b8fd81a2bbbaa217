"""Threads, processes, memory and machine settings of the CPU backend."""

import os
import subprocess
import sys
import threading
import tracemalloc

import numba
import numpy as np
import pytest

from nblora.backends.cpu import CPUBackend
from nblora.backends.protocol import Base, Delta, LowRank, Operands
from nblora.kernels.common.machine import VECTOR_BITS

SHAPES = [(2, 90, 110), (40, 500, 300), (300, 200, 310)]


def problem(N, inputs, outputs, transposed=False, dtype="float32", seed=0):
    generator = np.random.default_rng(seed)

    def draw(*shape):
        return generator.standard_normal(shape).astype(dtype)

    stored = (outputs, inputs) if transposed else (inputs, outputs)
    operands = Operands(
        Base(draw(*stored), draw(outputs), transposed),
        LowRank(draw(inputs, 4), draw(4, outputs), 0.5),
        Delta(draw(*stored), draw(*stored), 0.1, 0.9),
        0,
        True,
    )
    return draw(N, inputs), draw(N, outputs), operands


def step(backend, x, gy, operands):
    """Every result of a step, as one list of arrays."""
    y, saved = backend.forward(x, operands, None, True)
    gradients = backend.backward_update(gy, saved, operands, 0.01, 0.02)
    changed = operands.base.weight, operands.delta.delta, operands.delta.velocity
    return [y, gradients.x, gradients.A, gradients.B, gradients.bias, *changed]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_repeat_bit_for_bit_for_a_number_of_threads(shape, transposed):
    backend = CPUBackend()
    before = numba.get_num_threads()
    results = {}
    try:
        for threads in (1, before, before, 1, before):
            numba.set_num_threads(threads)
            got = step(backend, *problem(*shape, transposed))
            for one, two in zip(results.setdefault(threads, got), got, strict=True):
                np.testing.assert_array_equal(one, two)
    finally:
        numba.set_num_threads(before)
    for one, two in zip(results[1], results[before], strict=True):
        assert np.abs(one - two).max() <= 1e-5 * np.abs(two).max()


def test_several_python_threads_at_once():
    backend = CPUBackend()
    expected = [step(backend, *problem(*shape)) for shape in SHAPES]
    failures = []

    def work(index):
        for _ in range(5):
            got = step(backend, *problem(*SHAPES[index]))
            if not all(np.array_equal(a, b) for a, b in zip(got, expected[index], strict=True)):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i % len(SHAPES),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_read_only_arrays_need_no_second_compilation():
    from nblora.kernels.linear.cpu import forward, sweep

    backend = CPUBackend()
    x, gy, operands = problem(*SHAPES[1])
    step(backend, x, gy, operands)
    counted = [len(k.signatures) for k in (forward.forward, sweep.sweep)]
    frozen = operands._replace(train_base=False)
    for array in (x, gy, operands.base.weight, operands.base.bias, operands.low_rank.A, operands.low_rank.B):
        array.flags.writeable = False
    step_of_frozen, _ = backend.forward(x, frozen, None, True)
    y, saved = backend.forward(x, frozen, None, True)
    backend.backward_update(gy, saved, frozen, 0.01, 0.02)
    np.testing.assert_array_equal(y, step_of_frozen)
    assert [len(k.signatures) for k in (forward.forward, sweep.sweep)] == counted


def test_a_step_allocates_nothing_of_the_size_of_the_weight():
    backend = CPUBackend()
    x, gy, operands = problem(8, 1500, 1400)
    step(backend, x, gy, operands)
    tracemalloc.start()
    try:
        step(backend, x, gy, operands)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < operands.base.weight.nbytes / 10


def test_element_wise_updates():
    backend = CPUBackend()
    generator = np.random.default_rng(0)
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-14)):
        for shape in ((0, 3), (3, 5), (300, 301)):
            p, g, m, v = (generator.standard_normal(shape).astype(dtype) for _ in range(4))
            v = np.abs(v)
            P, G, M, V = (a.astype(np.float64) for a in (p, g, m, v))
            backend.sgd_update(p, g, 0.3)
            P -= 0.3 * G
            backend.momentum_update(p, m, g, 0.9, 0.2)
            M = 0.9 * M + (1 - 0.9) * G
            P -= 0.2 * M
            backend.adamw_update(p, g, m, v, 0.01, (0.8, 0.95), 1e-8, 0.1, 3)
            M = 0.8 * M + (1 - 0.8) * G
            V = 0.95 * V + (1 - 0.95) * G * G
            P -= 0.01 * 0.1 * P
            P -= 0.01 / (1 - 0.8**3) * M / (np.sqrt(V / (1 - 0.95**3)) + 1e-8)
            backend.add(p, g)
            P += G
            backend.scale(p, -2.5)
            P *= -2.5
            for one, two in ((p, P), (m, M), (v, V)):
                np.testing.assert_allclose(one, two, rtol=10 * tolerance, atol=10 * tolerance)
            assert backend.sum_of_squares(p) == pytest.approx((p.astype(np.float64) ** 2).sum(), rel=1e-12)


FORK = """
import os, numpy as np
from test_kernels_pool import SHAPES, problem, step
from nblora.backends.cpu import CPUBackend
backend = CPUBackend()
expected = step(backend, *problem(*SHAPES[1]))
child = os.fork()
if child == 0:
    again = step(backend, *problem(*SHAPES[1]))
    os._exit(0 if all(np.array_equal(a, b) for a, b in zip(expected, again)) else 7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run_python(code, *arguments, **environment):
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, os.path.dirname(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_works_after_its_parent_started_the_pool():
    run_python(FORK)


VECTORS = """
import sys
import test_kernels as t
for shape in [(1, 33, 17, 2), (16, 100, 97, 5), (64, 270, 133, 4), (300, 65, 129, 17)]:
    for transposed in (False, True):
        t.run(shape, sys.argv[1], transposed, t.Case(train=True, activation=t.RELU))
"""


LENGTHS = [
    pytest.param(bits, dtype, marks=[] if bits == VECTOR_BITS else pytest.mark.slow)  # others compile kernels anew
    for bits in (128, 256, 512)
    for dtype in ("float32", "float64")
]


@pytest.mark.parametrize(("bits", "dtype"), LENGTHS)
def test_every_vector_length(bits, dtype):
    # The machine's own length needs no name, and under no name its kernels are in the cache.
    chosen = {} if bits == VECTOR_BITS else {"NBLORA_VECTOR_BITS": str(bits)}
    run_python(VECTORS, dtype, **chosen)
