"""Processes that compile the same kernel at the same time leave a cache that holds both results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nblora.kernels.common import jit

pytest.importorskip("fcntl")

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """
import sys, time
import numpy as np
from numba.core import caching
from nblora.kernels.common.jit import kernel

@kernel
def half(a):
    a[0] = a[0] / a.dtype.type(2)

read_index = caching.IndexDataCacheFile._load_index

def slow(self):
    found = read_index(self)
    time.sleep(float(sys.argv[2]))  # the other process reads the same index meanwhile
    return found

caching.IndexDataCacheFile._load_index = slow
array = np.array([3], sys.argv[1])
half(array)
assert array[0] == 1.5, array
print(sum(half.stats.cache_hits.values()))
"""


@pytest.mark.slow  # two processes sleep over each of their files
@pytest.mark.skipif(jit.JIT_DISABLED, reason="nothing is compiled")
def test_two_writers_do_not_take_the_same_file(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(KERNEL)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def start(dtype, seconds):
        command = [sys.executable, script, dtype, seconds]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    for seconds, hits in (("1", "0\n"), ("0", "1\n")):
        processes = [start(dtype, seconds) for dtype in ("float32", "float64")]
        for process in processes:
            printed, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            assert printed == hits
