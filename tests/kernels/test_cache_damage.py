"""Damaged files of the kernel cache: none crashes a process, none changes a result, each is compiled again."""

import os
from pathlib import Path

import pytest

from nblora.kernels.common import jit
from tests.kernels.support import call
from tests.processes import run

pytestmark = [
    pytest.mark.skipif(jit.JIT_DISABLED, reason="compiles nothing under NUMBA_DISABLE_JIT=1"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
]

DAMAGE = """
import os, random, sys
from pathlib import Path
import numba  # here, and not in each child
from package.common import jit

folder, count, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
files = {path: path.read_bytes() for path in folder.glob("*.kernel")}
assert files

def spoiled(data):
    place = rng.randrange(len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + rng.randbytes(rng.randrange(1, 64)) + data[place:]
    if kind == 3:
        return data[:place] + bytes(min(512, len(data) - place)) + data[place + 512 :]
    return rng.choice(list(files.values()))[: len(data) // 2] + data[len(data) // 2 :]

recompiled = 0
for trial in range(count):
    path = rng.choice(list(files))
    path.write_bytes(damaged := spoiled(files[path]))
    number = os.fork()
    if not number:
        from package.main import total
        right = total(2, 3) == 5 and total(2.5, 3.0) == 5.5
        os._exit(10 + sum(total.stats.cache_misses.values()) if right else 1)
    status = os.waitpid(number, 0)[1]
    assert os.WIFEXITED(status), (trial, path.name, status)
    code = os.WEXITSTATUS(status)
    assert code == 10 + (damaged != files[path] and "total" in path.name), (trial, path.name, code)
    recompiled += code - 10
    path.write_bytes(files[path])
print(recompiled)
"""


@pytest.mark.parametrize("count", [4, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_files_neither_crash_nor_change_a_result(package, count):
    code = "from package.main import total\nfrom package.common.cache import cache_folder\ntotal(2.5, 3.0)\n"
    call(package, code + "print(total(2, 3), 0, 0, cache_folder())")
    folder = Path(call(package)[3])
    environment = {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": str(package.parent / "user")}
    done = run(DAMAGE, folder, count, 3, path=package.parent, timeout=1500, **environment)
    assert int(done.stdout) >= count // 2
