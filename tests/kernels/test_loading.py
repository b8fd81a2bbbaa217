"""Cached kernels: loaded without what compiling needs, and as good as compiled ones."""

import pytest

from nblora.kernels.common import jit
from tests.kernels.support import CALL, call
from tests.processes import run

pytestmark = pytest.mark.skipif(jit.JIT_DISABLED, reason="compiles nothing under NUMBA_DISABLE_JIT=1")

PREPARED = "import sys\nprint(int('numba.np.npyimpl' in sys.modules))\n"
"""Whether Numba has registered its implementations, which takes several times as long as loading a step's kernels."""

FIRST_STEP = """
import numpy as np
import nblora
adapter = nblora.DeltaLoRAAdapter(nblora.Dense.random(70, 50), 4)
adapter.forward(np.ones((40, 70)))
adapter.backward_update(np.ones((40, 50)), 0.1)
"""


def test_a_first_step_from_the_cache_prepares_no_compilation():
    run(FIRST_STEP)  # which may compile
    assert run(FIRST_STEP + PREPARED).stdout == "0\n"


CALLER = """
from numba import njit
from package.main import total
@njit
def twice(a, b):
    return 2 * total(a, b)
total(2, 3)
assert twice(2, 3) == 10
"""


def test_a_loaded_kernel_is_linked_into_what_is_compiled_later(package):
    call(package)
    assert call(package, CALLER + CALL)[:3] == (5, 1, 0)


def kernels(package, body):
    """Replace the package's kernel by one of this body, of two integers."""
    header = "import numpy as np\nfrom .common.jit import kernel\n@kernel\ndef total(a, b):\n"
    (package / "main.py").write_text(header + body)


def test_a_kernel_that_allocates(package):
    """It calls Numba's allocator, which is nowhere before it is asked for."""
    kernels(package, "    found = np.empty(2)\n    found[0], found[1] = a, b\n    return int(found.sum())\n")
    assert call(package)[:3] == (5, 0, 1)
    assert call(package)[:3] == (5, 1, 0)


def test_a_kernel_that_needs_what_only_numbas_implementations_bring(package):
    """Such as the secrets of hashing: then they are imported after all."""
    kernels(package, "    return a + b + 0 * hash(str(a))\n")
    assert call(package)[:3] == (5, 0, 1)
    assert call(package)[:3] == (5, 1, 0)
    assert call(package, CALL + "assert 'numba.cpython.hashing' in __import__('sys').modules\n")[:3] == (5, 1, 0)


PARALLEL = """
from numba import prange
from .common.jit import kernel
@kernel(parallel=True)
def add(a, b):
    found = 0
    for i in prange(2):
        found += a if i else b
    return found
"""


def test_what_calls_a_loaded_parallel_kernel_starts_its_threads_too(package):
    """Compiled in a process that had loaded its callee, and then loaded itself."""
    (package / "helper.py").write_text(PARALLEL)
    of_floats = CALL.replace("print(total(2, 3)", "print(int(total(2.0, 3.0))")
    assert call(package)[:3] == (5, 0, 1)
    assert call(package, of_floats)[:3] == (5, 0, 1)
    assert call(package, of_floats)[:3] == (5, 1, 0)


def test_code_that_calls_what_is_nowhere_is_compiled_again(package):
    nowhere = "from package.common import loading\n"
    nowhere += "pack = loading.pack\ndef packed(c):\n    library, needed, rest = pack(c)\n"
    nowhere += "    return library, [*needed, 'nblora_nowhere'], rest\nloading.pack = packed\n"
    assert call(package, nowhere + CALL)[:3] == (5, 0, 1)
    assert call(package)[:3] == (5, 0, 1)
    assert call(package)[:3] == (5, 1, 0)


def test_an_error_in_a_loaded_kernel_is_raised(package):
    kernels(package, "    if a > 2:\n        raise ValueError('more than two', a)\n    return a + b\n")
    code = "import contextlib\nfrom package.main import total\n"
    code += "try: total(3, 3)\nexcept ValueError as error: assert error.args == ('more than two', 3), error.args\n"
    code += "else: assert False\n"
    assert call(package, code + CALL)[:3] == (5, 0, 1)
    assert call(package, code + CALL)[:3] == (5, 1, 0)
