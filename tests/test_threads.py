"""Threads and processes: helpers that come and that do not, several callers at once, and forked children."""

import os

import pytest

from nblora.backends.crew import Crew
from nblora.kernels.common import jit
from nblora.kernels.common.threads import SLOT
from tests.processes import run

pytestmark = pytest.mark.skipif(jit.JIT_DISABLED, reason="there are no threads under NUMBA_DISABLE_JIT=1")

PREPARE = """
import os, sys, threading
import numpy as np
import nblora

rng = np.random.default_rng(0)
def make(dtype="float64", size=300):
    base = nblora.Dense(rng.normal(size=(size, size)).astype(dtype) / 17, activation="tanh")
    adapter = nblora.DeltaLoRAAdapter(base, 8, seed=1)
    adapter.set_parameter("lora_B", rng.normal(size=(8, size)))
    adapter.set_parameter("delta", rng.normal(size=(size, size)))
    return adapter

x, grad = rng.normal(size=(64, 300)), rng.normal(size=(64, 300))
def step(adapter):
    adapter.forward(x)
    adapter.backward(grad)
    adapter.update_parameters(0.1)
    adapter.forward(x)
    adapter.backward_update(grad, 0.1)
    return adapter.get_parameters()

adapter = make()
z = x @ (adapter.base_layer.weight + 0.1 * adapter.delta) + x @ adapter.lora_layer.A @ adapter.lora_layer.B
expected = np.tanh(z)
"""

ALONE = """
got = adapter.forward(x)
assert np.abs(got - expected).max() <= 1e-12, np.abs(got - expected).max()
"""

TOGETHER = """
adapter.eval()
own = [adapter.clone().train() for _ in range(4)]
wanted = step(adapter.clone().train())
faults, barrier = [], threading.Barrier(8)
def work(place):
    try:
        barrier.wait()
        for _ in range(5):
            if place < 4:
                assert np.abs(adapter.forward(x) - expected).max() <= 1e-12
            else:
                twin = own[place - 4].clone()
                assert np.abs(step(twin) - wanted).max() <= 1e-12 * np.abs(wanted).max()
    except BaseException as error:
        faults.append(repr(error))
threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not faults, faults
"""

FORKED = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork beside threads: it is what we test
adapter.forward(x)
child = os.fork()
if child == 0:
    status = 1
    try:
        assert np.abs(adapter.forward(x) - expected).max() <= 1e-12
        step(adapter)
        status = 0
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert np.abs(adapter.forward(x) - expected).max() <= 1e-12
"""

POOL = """
import multiprocessing, sys, warnings
import numpy as np
import nblora

def work(seed):
    return float(nblora.Dense.random(300, 300, seed=seed)(np.ones((64, 300))).sum())

if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    here = [work(seed) for seed in range(3)]
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(work, range(3)) == here
"""

NO_LAYER = """
from numba.np.ufunc import parallel
assert not parallel._is_initialized
"""

NOBODY_COMES = """
from nblora.backends.crew import Crew
class Deserted(Crew):
    def _start(self, count):
        self._board = np.zeros((count + 1) * 16, np.int64)
        self._bells = [None] * count
adapter._backend._crew = Deserted()
"""


def test_numbas_own_threads_are_not_started():
    run(PREPARE + ALONE + NO_LAYER)


def test_helpers_that_never_get_a_core_hold_nothing_up():
    run(PREPARE + NOBODY_COMES + ALONE)


def test_several_callers_at_once():
    run(PREPARE + TOGETHER)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child():
    run(PREPARE + FORKED)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_a_child_forked_after_another_librarys_kernel(layer):
    """The parent's threads may have been started by any parallel function of Numba's, not by nblora."""
    other = """
import numba
@numba.njit(parallel=True)
def total(n):
    found = 0
    for i in numba.prange(n):
        found += i
    return found
assert total(1000) == 499500
"""
    code = PREPARE + other + FORKED.replace("adapter.forward(x)\nchild", "child", 1)
    run(code, NUMBA_THREADING_LAYER=layer)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method, tmp_path):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    script = tmp_path / "parent.py"  # a file, because a spawned child imports its parent's
    script.write_text(POOL)
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    run(code, script, method)


# --- forks, and systems without threads to spare -----------------------------------------------------------------

LIMITED = """
import os, signal, sys, threading
from threadpoolctl import threadpool_info
import scipy.linalg
from nblora.sweep.task import limit_threads

def blas():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

before = blas()
inside, held = threading.Event(), threading.Event()

def hold():
    with limit_threads._lock, held_open():
        pass

class held_open:
    def __enter__(self): inside.set(); held.wait()
    def __exit__(self, *error): pass

def stay():
    with limit_threads(1):
        inside.set()
        held.wait()

thread = threading.Thread(target={"lock": hold, "block": stay}[sys.argv[1]])
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    with limit_threads(1):
        assert blas() == {1}
    assert blas() == before, blas()
    os._exit(0)
held.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("what", ["lock", "block"])
def test_a_child_forked_while_another_thread_limits_threads(what):
    """It neither waits for a lock that nobody holds any more nor keeps the other's limits."""
    assert run(LIMITED, what, options=("-W", "error", "-W", "ignore::DeprecationWarning")).stdout == "0\n"


WITHOUT_THREADS = """
import threading
import numba, numpy as np
import nblora

def fails(self):
    raise RuntimeError("can't start new thread")

x = np.random.default_rng(0).normal(size=(300, 300)).astype("float32")
layer = nblora.Dense.random(300, 300, seed=0)
threading.Thread.start = fails
numba.set_num_threads(2)
y = layer(x)
assert np.allclose(y, x @ layer.weight + layer.bias, atol=1e-4)
assert np.array_equal(layer(x), y)
"""


def test_a_thread_that_cannot_start_fails_no_call():
    run(WITHOUT_THREADS, NUMBA_NUM_THREADS="2")


def test_the_first_call_gets_the_board_of_its_helpers():
    """With a smaller one it would post past the end of an array."""
    boards, crew = [], Crew()
    for workers in (2, 4, 3):
        crew.run(lambda task, workers, board, helpers: boards.append((len(board), helpers)), None, workers)
    assert boards == [(2 * SLOT, 1), (4 * SLOT, 3), (4 * SLOT, 2)]
