"""Processes that compile the same kernel at the same time leave a cache that holds both results."""

import subprocess
import sys

import pytest

from nblora.kernels.common import jit
from tests.processes import ROOT

KERNEL = """
import sys
import numpy as np
from nblora.kernels.common.jit import kernel

@kernel
def half(a):
    a[0] = a[0] / a.dtype.type(2)

for dtype in sys.argv[1:]:
    array = np.array([3], dtype)
    half(array)
    assert array[0] == 1.5, array
print(sum(half.stats.cache_hits.values()))
"""


@pytest.mark.skipif(jit.JIT_DISABLED, reason="nothing is compiled")
def test_several_writers_lose_nothing(tmp_path, monkeypatch):
    script = tmp_path / "program.py"
    script.write_text(KERNEL)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(*dtypes):
        return subprocess.Popen([sys.executable, script, *dtypes], stdout=subprocess.PIPE, text=True)

    for process in [start(dtype) for dtype in ("float32", "float64", "float32")]:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert start("float32", "float64").communicate(timeout=120)[0] == "2\n"
