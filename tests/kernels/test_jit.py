"""The cache of compiled kernels: found again, never stale, never in the way. Each case is a fresh process.

`jit.py` and what it needs know their folder alone, so copies beside two small kernels stand in for the real ones.
"""

import os
import shutil
from pathlib import Path

import pytest

from nblora.kernels.common import jit
from tests.kernels.support import CALL, HELPER, call
from tests.processes import run

pytestmark = pytest.mark.skipif(jit.JIT_DISABLED, reason="compiles nothing under NUMBA_DISABLE_JIT=1")


def read_only(package):
    """Let nothing be made beside the sources, not even by root: the folder's name is taken by a file."""
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    (package / "__pycache__").touch()


def test_a_second_process_compiles_nothing(package):
    first, second = call(package), call(package)
    assert first[:3] == (5, 0, 1)
    assert second[:3] == (5, 1, 0)
    assert first[3] == second[3]
    assert first[3].startswith(str(package / "__pycache__" / "nblora-"))


def test_a_changed_helper_leaves_no_stale_kernel(package):
    before = call(package)
    (package / "helper.py").write_text(HELPER.replace("a + b", "a * b"))
    after = call(package)
    assert (before[0], after[0]) == (5, 6)
    assert after[1:3] == (0, 1)
    assert after[3] != before[3]


def test_a_new_file_and_a_new_name_change_the_digest(package):
    folders = {call(package)[3]}
    (package / "more").mkdir()
    (package / "more" / "kernels.py").write_text("")
    folders.add(call(package)[3])
    (package / "more" / "kernels.py").rename(package / "more" / "others.py")
    folders.add(call(package)[3])
    assert len(folders) == 3


def test_settings_that_shape_the_machine_code_change_the_digest(package):
    plain, checked, slow = call(package), call(package, NUMBA_BOUNDSCHECK="1"), call(package, NUMBA_OPT="1")
    assert len({plain[3], checked[3], slow[3]}) == 3


def test_the_users_choice_comes_first(package, tmp_path):
    chosen = tmp_path / "chosen"
    assert call(package, NUMBA_CACHE_DIR=str(chosen))[3].startswith(str(chosen))
    assert call(package, NUMBA_CACHE_DIR=str(chosen))[:3] == (5, 1, 0)


def test_a_read_only_install_uses_the_users_cache_folder(package, tmp_path):
    read_only(package)
    first, second = call(package), call(package)
    assert first[3].startswith(str(package.parent / "user" / "nblora" / "nblora-"))
    assert (first[:3], second[:3]) == ((5, 0, 1), (5, 1, 0))


def test_an_unwritable_choice_is_passed_over(package):
    assert call(package, NUMBA_CACHE_DIR="/proc/nowhere")[3].startswith(str(package / "__pycache__"))


COUNT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from package.main import total
    from package.helper import add
    results = total(2, 3), total(2.0, 3.0), add(2, 3)
told = [w for w in caught if w.category is RuntimeWarning and "NUMBA_CACHE_DIR" in str(w.message)]
print(int(sum(results)), len(told), len(caught), None)
"""


def test_nowhere_writable_is_one_warning_and_works(package):
    read_only(package)
    assert call(package, COUNT, XDG_CACHE_HOME="/proc/nowhere")[:3] == (15, 1, 1)


def test_a_user_without_a_home_is_no_error(package):
    read_only(package)
    code = "import pathlib\ndef home(): raise RuntimeError\npathlib.Path.home = home\n" + COUNT
    assert call(package, code, XDG_CACHE_HOME=None)[:3] == (15, 1, 1)


def test_a_full_disk_is_no_error(package):
    code = "from package.common import cache\nimport contextlib\n@contextlib.contextmanager\ndef full(path, mode):\n"
    code += "    raise OSError(28, 'full')\n    yield\ncache.replace_whole = full\n" + CALL
    assert call(package, code)[:3] == (5, 0, 1)


def kernel_files(package):
    """The cache's files, warm."""
    call(package)
    return sorted(Path(call(package)[3]).glob("*.kernel"))


def test_a_damaged_cache_is_compiled_again(package):
    for file in kernel_files(package):
        file.write_bytes(b"")
    assert call(package)[:3] == (5, 0, 1)
    assert call(package)[:3] == (5, 1, 0)


DAMAGED = """
import random, sys
from pathlib import Path
from package.common import cache
from package.common.cache import read_checked

rng = random.Random(int(sys.argv[1]))
(path,) = Path(sys.argv[2]).glob("package.main.total*.kernel")
whole = path.read_bytes()
assert read_checked(path) == whole[32:]
for trial in range(int(sys.argv[3])):
    spoiled = bytearray(whole)
    kind = trial % 3
    if kind == 0:
        spoiled[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del spoiled[rng.randrange(len(whole)):]
    else:
        start = rng.randrange(len(whole))
        spoiled[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    if bytes(spoiled) != whole:
        path.write_bytes(spoiled)
        assert read_checked(path) is None, trial
path.write_bytes(whole)
other = path.with_name("other.kernel")
other.write_bytes(whole)
assert read_checked(other) is None  # machine code of another function
print(0, 0, 0, None)
"""


def test_no_damage_is_ever_run(package):
    folder = kernel_files(package)[0].parent
    run(DAMAGED, 0, folder, 2000, path=package.parent)
    assert call(package)[:3] == (5, 1, 0)


# --- whose folder ------------------------------------------------------------------------------------------------

PLANTED = """
import os, pickle, sys
from pathlib import Path
from package.common import cache
class Planted:
    def __reduce__(self):
        return Path(sys.argv[2]).write_text, ("run",)
for path in Path(sys.argv[1]).glob("*.kernel"):
    cache.write_checked(path, pickle.dumps(Planted()))
"""
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and permissions of POSIX")


@posix
@pytest.mark.parametrize("why", ["others may write", "the group may write", "a link", "others may put it there"])
def test_a_folder_that_others_can_write_to_is_never_read(package, tmp_path, why):
    """What lies there is run, so a whole file of a stranger's would be."""
    chosen = tmp_path / "chosen"
    folder = Path(call(package, NUMBA_CACHE_DIR=str(chosen))[3])
    run(PLANTED, folder, tmp_path / "evidence", path=package.parent)
    if why == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif why == "others may put it there":
        chosen.chmod(0o777)
    else:
        folder.chmod(0o757 if why == "others may write" else 0o775)
    found = call(package, NUMBA_CACHE_DIR=str(chosen))
    assert found[:3] == (5, 0, 1)
    assert found[3].startswith(str(package / "__pycache__"))
    assert not (tmp_path / "evidence").exists()


@posix
@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_user_is_never_read(package, tmp_path):
    chosen = tmp_path / "chosen"
    folder = Path(call(package, NUMBA_CACHE_DIR=str(chosen))[3])
    run(PLANTED, folder, tmp_path / "evidence", path=package.parent)
    os.chown(folder, 65534, -1)
    assert call(package, NUMBA_CACHE_DIR=str(chosen))[:3] == (5, 0, 1)
    assert not (tmp_path / "evidence").exists()


@posix
@pytest.mark.parametrize("why", ["others may write", "the group may write", "a link", "another user's"])
def test_a_file_that_others_can_write_to_is_never_read(package, tmp_path, why):
    """A folder that others may only read can hold such a file, where an umask lets everything through."""
    if why == "another user's" and os.getuid() != 0:
        pytest.skip("only root gives files away")
    chosen = tmp_path / "chosen"
    folder = Path(call(package, NUMBA_CACHE_DIR=str(chosen))[3])
    folder.chmod(0o755)
    assert call(package, NUMBA_CACHE_DIR=str(chosen))[:3] == (5, 1, 0)
    run(PLANTED, folder, tmp_path / "evidence", path=package.parent)
    for path in folder.glob("*.kernel"):
        if why == "a link":
            path.rename(tmp_path / path.name)
            path.symlink_to(tmp_path / path.name)
        elif why == "another user's":
            os.chown(path, 65534, -1)
        else:
            path.chmod(0o646 if why == "others may write" else 0o664)
    assert call(package, NUMBA_CACHE_DIR=str(chosen))[:3] == (5, 0, 1)
    assert not (tmp_path / "evidence").exists()
    assert call(package, NUMBA_CACHE_DIR=str(chosen))[:3] == (5, 1, 0)  # compiled anew, and kept in its place


@posix
def test_what_is_made_is_the_users_alone(package, tmp_path):
    before = os.umask(0)
    try:
        folder = Path(call(package, NUMBA_CACHE_DIR=str(tmp_path / "chosen"))[3])
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.kernel")} == {0o600}


READ_ONLY = """
from package.common import cache
cache._is_writable = lambda folder: False
"""


def test_a_warm_folder_that_cannot_be_written_to_is_read(package):
    call(package)
    assert call(package, READ_ONLY + CALL)[:3] == (5, 1, 0)


def test_older_folders_are_taken_away_but_for_the_newest_and_those_in_use(package):
    beside = package / "__pycache__"
    for place in range(6):
        older = beside / f"nblora-{place:016x}"
        older.mkdir(parents=True, mode=0o700)
        os.utime(older, (place, place))
    (beside / "nblora-of-something-else").mkdir()
    code = f"import fcntl, os\nheld = os.open({str(beside / ('nblora-' + '0' * 16))!r}, os.O_RDONLY)\n"
    now = call(package, code + "fcntl.flock(held, fcntl.LOCK_SH)\n" + CALL)[3]
    left = {path.name for path in beside.glob("nblora-*")}
    kept = {f"nblora-{place:016x}" for place in (0, 3, 4, 5)}  # the first is in use
    assert left == kept | {Path(now).name, "nblora-of-something-else"}


def test_without_machine_code_the_plain_function_comes_back(package):
    code = "from package.main import total\nprint(total(2, 3), type(total).__name__, 0, None)"
    done = run(code, path=package.parent, NUMBA_DISABLE_JIT="1")
    assert done.stdout.split()[:2] == ["5", "function"]
    assert not list(package.rglob("nblora-*"))


def test_import_touches_no_cache(package):
    run("import package.main", path=package.parent, NUMBA_CACHE_DIR=None)
    assert not list(package.rglob("nblora-*"))


STEP = """
import numba.core.event as event
compiled = []
class Listener(event.Listener):
    def on_start(self, e): compiled.append(str(e.data.get("dispatcher")))
    def on_end(self, e): pass
event.register("numba:compile", Listener())
import numpy as np
import nblora
for dtype in ("float32", "float64"):
    for layout in (nblora.Dense, nblora.FullyConnected):
        base = layout.random(70, 50, activation="gelu", dtype=dtype)
        adapter = nblora.DeltaLoRAAdapter(base, 4, freeze_base_layer=False, lora_dropout=0.1).compile()
        x, grad = np.ones((40, 70), dtype), np.ones((40, 50), dtype)
        adapter(x)
        adapter.backward(grad)
        adapter.update_parameters(0.1)
        adapter(x)
        adapter.backward_update(grad, 0.1)
        adapter.merge_to_original_layer()
print(len(compiled), compiled)
"""


def test_a_second_process_compiles_no_kernel_of_nblora():
    run(STEP)  # the first one may
    assert run(STEP).stdout.startswith("0 ")


SPECIALISED = """
import gc
import numpy as np
from numba.core.dispatcher import Dispatcher
import nblora
def specialised():  # compiled or loaded
    kernels = [o for o in gc.get_objects() if isinstance(o, Dispatcher) and o.__module__.startswith("nblora.")]
    return {(kernel.__name__, str(signature)) for kernel in kernels for signature in kernel.signatures}
"""

COMPILE = """
adapter = nblora.DeltaLoRAAdapter(nblora.Dense.random(70, 50, activation="gelu"), 4).compile()
warm = specialised()
for samples in (1, 40, 300):
    adapter(np.ones((samples, 70), "float32"))
    adapter.backward_update(np.ones((samples, 50), "float32"), 0.1)
print(len(warm), sorted(specialised() - warm))
"""


def test_compile_leaves_nothing_for_the_first_call():
    warm, *new = run(SPECIALISED + COMPILE).stdout.split()
    assert int(warm) > 4
    assert new == ["[]"]


WARM = """
from nblora.cli.warmup import command
command(["--dtype", "float32"], standalone_mode=False)
warm = specialised()
assert len(warm) > 8
for layout, kind in ((nblora.Dense, nblora.DeltaLoRAAdapter), (nblora.FullyConnected, nblora.LoRAAdapter)):
    for samples in (1, 8, 33, 300):
        adapter = kind(layout.random(70, 50, activation="tanh"), 4)
        x, y = np.ones((samples, 70), "float32"), np.zeros((samples, 50), "float32")
        adapter.forward(x)
        adapter.backward_update(y, 0.1)
        for loss in ("mse", "cross_entropy", "binary_cross_entropy"):
            target = np.zeros(samples, int) if loss == "cross_entropy" else y
            nblora.fit(adapter, x, target, loss=loss, optimizer="adamw", epochs=1, clip_norm=1.0, progress=False)
        adapter.merge_to_original_layer()
print(sorted(specialised() - warm))
"""


def test_warmup_leaves_nothing_for_the_first_step_and_fit():
    assert run(SPECIALISED + WARM).stdout.splitlines()[-1] == "[]"


MIXED = """
import sys
import numpy as np
import nblora
rng = np.random.default_rng(0)
for samples in map(int, sys.argv[1:]):
    for layout in (nblora.Dense, nblora.FullyConnected):
        base = layout.random(9, 7, activation="tanh", seed=0)
        adapter = nblora.DeltaLoRAAdapter(base, 2, seed=0)
        for name in ("lora_B", "delta", "velocity"):
            adapter.set_parameter(name, rng.normal(size=adapter.parameter_shape(name)))
        x, grad = rng.normal(size=(samples, 9)).astype("f"), rng.normal(size=(samples, 7)).astype("f")
        A, B, V = (adapter.get_parameter(name) for name in ("lora_A", "lora_B", "velocity"))
        M = adapter.get_parameter("base.weight") + 0.1 * adapter.get_current_delta() + A @ B
        y = np.tanh(x @ M + base.bias)
        assert np.abs(adapter.forward(x) - y).max() < 1e-5
        gz = grad * (1 - y * y)
        assert np.abs(adapter.backward_update(grad, 0.1) - gz @ M.T).max() < 1e-4
        assert np.abs(adapter.get_parameter("velocity") - (0.9 * V + 0.01 * x.T @ gz)).max() < 1e-4
"""


@pytest.mark.slow
def test_kernels_compiled_in_several_processes_work_together(tmp_path):
    """Symbols of one process' kernels may be called as those of another's: each must still call its own parts."""
    for samples in ([1], [100], [1, 100], [100, 1], [100]):
        run(MIXED, *samples, NUMBA_CACHE_DIR=str(tmp_path))
