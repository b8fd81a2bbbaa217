"""What a step costs beside its arithmetic: Python's calls, memory, and nobody's thread settings."""

import gc
import sys
import threading

import numba
import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - its BLAS, which Numba loads where it compiles, has settings too
from threadpoolctl import threadpool_info, threadpool_limits

import nblora
from nblora.backends import cpu
from nblora.kernels.common import jit
from tests.processes import run

pytestmark = pytest.mark.skipif(jit.JIT_DISABLED, reason="of compiled kernels")


def made(samples=64, features=300):
    """An adapter, an input and a gradient."""
    rng = np.random.default_rng(0)
    adapter = nblora.DeltaLoRAAdapter(nblora.Dense.random(features, features, seed=0), 2, seed=0)
    return adapter, *(rng.normal(size=(samples, features)).astype(np.float32) for _ in range(2))


def step(adapter, x, grad):
    adapter.forward(x)
    return adapter.backward_update(grad, 0.01)


# --- Python's part -----------------------------------------------------------------------------------------------

CALLS = 240
"""Of Python and C functions in a step. There were 182 where Python's part of it took 27 µs, 281 where it took 44 µs."""


def test_a_step_makes_few_calls():
    problem = made(8, 16)
    step(*problem)
    counted = 0

    def count(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    gc.disable()  # finalizers of other tests' objects are none of its calls
    sys.setprofile(count)
    try:
        step(*problem)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert counted <= CALLS


# --- memory ------------------------------------------------------------------------------------------------------

GROWTH = """
import resource, sys
import numpy as np
import nblora
from nblora.adapters import DeltaLoRAAdapter

def step(features, samples, layout):
    weight = np.full((features, features), 0.01, np.float32)
    adapter = DeltaLoRAAdapter(layout(weight), 8)
    adapter.delta[...] = adapter.velocity[...] = 0.01  # their memory is not there before it is written
    x = np.full((samples, features), 0.1, np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        adapter.forward(x)
        adapter.backward_update(x, 0.1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

layout = getattr(nblora, sys.argv[1])
step(300, 64, layout)  # loads the kernels and starts the threads
print(step(4096, 64, layout))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("layout", ["Dense", "FullyConnected"])
def test_steps_need_at_most_16_mib_beside_their_arrays(layout):
    """Outputs included; one weight of 4096 x 4096 is 64 MiB."""
    assert int(run(GROWTH, layout).stdout) <= 16 * 1024


@pytest.fixture
def backend():
    return cpu.CPUBackend()


def held(backend):
    """Bytes of scratch that a backend keeps, of workers and of packed activations."""
    scratch = backend._scratch
    return tuple(sum(a.nbytes for arrays in kept.values() for a in arrays) for kept in (scratch._free, scratch._packed))


def placed(backend, samples=64, features=300):
    adapter, x, grad = made(samples, features)
    adapter._move(backend)
    return adapter, x, grad


def test_scratch_is_taken_again_and_does_not_grow(backend):
    problem = placed(backend)
    step(*problem)
    once = held(backend)
    assert min(once) > 0
    for _ in range(5):
        step(*problem)
    assert held(backend) == once


def test_scratch_is_bounded_by_the_callers_at_once(backend):
    problems = [placed(backend) for _ in range(3)]
    step(*problems[0])
    once = held(backend)
    for _ in range(3):
        threads = [threading.Thread(target=step, args=problem) for problem in problems]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(kept <= len(problems) * one for kept, one in zip(held(backend), once, strict=True))


def test_scratch_of_another_number_of_threads_is_dropped():
    scratch, dtype, kept = cpu._Scratch(), np.dtype("float32"), []
    for workers in (2, 1, 3, 1):  # small calls run on one thread, whatever the others do
        scratch.give(*scratch.take(dtype, workers, 100))
        kept.append(sorted(workers for _, workers in scratch._free))
    assert kept == [[2], [1, 2], [1, 3], [1, 3]]


def test_activations_of_many_samples_are_not_kept(backend, monkeypatch):
    monkeypatch.setattr(cpu, "KEPT", 1 << 16)
    step(*placed(backend, samples=2000))
    assert held(backend)[1] <= 1 << 16


# --- threads -----------------------------------------------------------------------------------------------------


def settings():
    """The thread settings of Numba, and of every BLAS and OpenMP in the process."""
    pools = sorted((library["filepath"], library["num_threads"]) for library in threadpool_info())
    return numba.get_num_threads(), numba.get_parallel_chunksize(), pools


@pytest.fixture(params=[1, 2])
def chosen(request):
    """Thread settings of the user's, other than those that the test began with."""
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("needs two threads")
    before = numba.get_num_threads()
    step(*made())  # what is loaded first
    numba.set_num_threads(request.param)
    with threadpool_limits(3 - request.param):
        yield settings()
    numba.set_num_threads(before)


def test_a_step_changes_no_thread_setting(chosen):
    adapter, x, grad = made()
    step(adapter, x, grad)
    adapter.forward(x)
    adapter.backward(grad)
    adapter.update_parameters(0.1)
    adapter.merge_to_original_layer()
    assert settings() == chosen


def test_an_error_changes_no_thread_setting_and_the_next_step_works(chosen, monkeypatch):
    adapter, x, grad = made(samples=300)
    adapter.forward(x)
    with pytest.raises(ValueError, match="grad_output"):
        adapter.backward_update(grad[:, 1:], 0.1)
    assert settings() == chosen

    def fails(*arguments):
        raise KeyboardInterrupt

    for name in ("forward", "sweep"):
        module = getattr(cpu, f"{name}_kernel")
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(KeyboardInterrupt):
                step(adapter, x, grad)
        assert settings() == chosen
    step(adapter, x, grad)
    assert settings() == chosen
