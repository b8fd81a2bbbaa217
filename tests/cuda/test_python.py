"""Kernels in the Pythons that nblora is for: what newer ones read differently in the shared rules, and compiling there.

Python 3.14 keeps small integers out of `co_consts`, so `typed` cannot give them a kernel's dtype: numbers in the rules
are floats.
"""

import ast
import inspect
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nblora.kernels.common import elementwise
from nblora.kernels.common.cuda import rules
from nblora.kernels.common.cuda.target import COMPILED

ROOT = Path(__file__).parents[2]
RULES = ("activate", "activation_slope", "momentum_step", "descend")

COMPILE = """
from tests.cuda.machine_code import pretended_device
from tests.cuda.recorded import record, record_updates, recording_backend
from nblora.backends.cubins import compile_kernel

found = record_updates(recording_backend(), "float32")
for dtype in ("float32", "float64"):
    found += record(recording_backend(), dtype, True, masked=True, train=True)
found += record(recording_backend("tf32"), "float32", False)
with pretended_device((9, 0)):
    for name, kernel, _, types in found:
        compile_kernel(kernel, types, (9, 0))
print(len(found))
"""


def whole_numbers(function):
    """Whole numbers that are computed with, or are a result; those that a code is compared with are none."""
    tree = ast.parse(inspect.getsource(function))
    numbers = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is int]
    compared = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "code"
        for part in ast.walk(node)
    }
    return [node.value for node in numbers if id(node) not in compared]


@pytest.mark.parametrize("name", RULES)
def test_numbers_of_the_rules_are_floats(name):
    assert whole_numbers(getattr(elementwise, name)) == []


def test_a_whole_number_is_found():
    assert sorted(whole_numbers(rules_with_whole_numbers)) == [1, 2]


def rules_with_whole_numbers(z, code):
    if code == 3:
        return z * (1 + z)
    return 2


@pytest.mark.parametrize("name", RULES)
def test_numbers_take_the_dtype_of_the_kernel(name):
    """What a rule computes with in float32 stays float32, in Python's own arithmetic too."""
    rule = rules.typed(getattr(elementwise, name), "float32")
    floats = [constant for constant in rule.__code__.co_consts if isinstance(constant, float)]
    assert all(isinstance(number, np.float32) for number in floats)
    assert not any(type(value) is float for value in rule.__globals__.values())


@pytest.mark.skipif(not COMPILED, reason="needs numba-cuda: pip install 'nblora[cuda12]'")
def test_a_value_of_another_dtype_is_not_stored():
    """Else a double that came in by mistake would be cut down in silence."""
    from numba import float32, float64
    from numba.core.errors import TypingError

    from nblora.backends.cubins import compile_kernel
    from nblora.kernels.common.cuda.intrinsics import store
    from nblora.kernels.common.cuda.target import kernel
    from tests.cuda.machine_code import pretended_device

    @kernel(32)
    def keep(value, out):
        store(out, 0, 1, 0, (value,))

    with pretended_device((9, 0)):
        compile_kernel(keep, (float32, float32[::1]), (9, 0))
        with pytest.raises(TypingError, match="values of float64 are stored in an array of float32"):
            compile_kernel(keep, (float64, float32[::1]), (9, 0))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_kernels_compile_in_other_pythons(version):
    """Where they are, with numba-cuda and what the emulator needs; `NBLORA_PYTHON_3_14` and the like name them."""
    python = os.environ.get(f"NBLORA_PYTHON_{version.replace('.', '_')}") or shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    needed = "import numba_cuda, greenlet, pytest"
    if subprocess.run([python, "-c", needed], capture_output=True, check=False).returncode:
        pytest.skip(f"Python {version} lacks numba-cuda, greenlet or pytest")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30
