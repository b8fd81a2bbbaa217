"""A library's process on a driver that computes nothing: what it counts, and what a script prints there.

`data/driver_stub.c` says what the driver is. Values are the emulator's business.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc")

needs_driver = [
    pytest.mark.skipif(COMPILER is None, reason="the stub of a driver needs a C compiler, cc"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stub of a driver is built for Linux"),
    pytest.mark.skipif(
        importlib.util.find_spec("numba_cuda") is None, reason="needs numba-cuda: pip install 'nblora[cuda12]'"
    ),
]

BEGIN = """
import ctypes, json, warnings
warnings.simplefilter("error")
import numpy as np
import nblora
from nblora.backends import cubins

driver = ctypes.CDLL("libcuda.so.1")
NAMES = "alloc free free_noctx launch h2d d2h d2d push sync event depth bytes".split()


def counts():
    buffer = (ctypes.c_long * 12)()
    driver.stub_counts(buffer)
    return dict(zip(NAMES, buffer))


def counted(function):
    before = counts()
    function()
    after = counts()
    return {name: after[name] - before[name] for name in NAMES}


def log():
    # What streams were told since the last time.
    rows = ((ctypes.c_long * 3) * 4096)()
    return [tuple(row) for row in rows[: driver.stub_log(rows, 4096)]]


def say(**what):
    print(json.dumps(what))


rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)
"""


def build(folder):
    """Compile the driver into a folder, where the cache of its processes will be too."""
    source = Path(__file__).parent / "data" / "driver_stub.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O2", "-o", folder / "libcuda.so.1", source, "-ldl"], check=True)


def script(folder, code, **variables):
    """What a script prints, as JSON, run with the driver."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": str(ROOT),
        "NUMBA_CACHE_DIR": str(folder / "cache"),
    }
    environment.pop("NUMBA_ENABLE_CUDASIM", None)
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        capture_output=True,
        text=True,
        env=environment | variables,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
