"""Files that are whole or absent, whatever happens: errors, permissions, and a SIGKILL at any moment."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import nblora
from nblora.formats.replace import replace_folder
from nblora.storage import atomic
from nblora.storage.atomic import replace_whole
from tests.helpers import make_adapter
from tests.processes import run

pytestmark = pytest.mark.small
posix = pytest.mark.skipif(os.name != "posix", reason="permissions and signals of POSIX")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def test_the_file_appears_at_the_end(path):
    with replace_whole(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(path):
    path.write_bytes(b"old")

    def interrupted():
        with replace_whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_names_the_file_and_not_its_temporary_one(path):
    with pytest.raises(FileNotFoundError) as caught, replace_whole(path.parent / "nowhere" / "a.png"):
        pass
    assert caught.value.filename == str(path.parent / "nowhere" / "a.png")


def test_a_missing_folder(path):
    with pytest.raises(FileNotFoundError), replace_whole(path / "file"):
        pass


@posix
def test_permissions(path):
    with replace_whole(path):
        pass
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    with replace_whole(path):
        pass
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_bytes_are_on_the_disk_before_the_name(path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    with replace_whole(path) as file:
        file.write(b"new")
    assert done[:2] == ["fsync", "replace"]
    assert done[2:] == (["fsync"] if os.name == "posix" else [])


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file(path, monkeypatch, rng, step):
    adapter = make_adapter(rng)
    adapter.save(path)
    before = path.read_bytes()

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(OSError, match="No space left"):
        adapter.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


SAVE_FOR_EVER = """
import sys
import numpy as np
import nblora
adapter = nblora.DeltaLoRAAdapter(nblora.Dense(np.zeros((200, 300))), 4)
turn = 0
while True:
    turn += 1
    adapter.set_parameter("delta", np.full((200, 300), float(turn)))
    adapter.set_parameter("velocity", np.full((200, 300), float(turn)))
    adapter.save(sys.argv[1])
    print(turn, flush=True)
"""


@posix
def test_a_kill_in_the_middle_of_save(path, rng):
    """The file is always whole, and holds one turn, never half of two."""
    last = 0.0
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(path)], stdout=subprocess.PIPE)
        try:
            child.stdout.readline()  # it saves now
            time.sleep(rng.uniform(0, 0.05))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        loaded = nblora.load(path)
        turns = np.unique([loaded.get_parameter("delta"), loaded.get_parameter("velocity")])
        assert turns.size == 1
        assert turns[0] >= 1
        last = max(last, turns[0])
    assert last >= 2  # some child was killed in a later save than its first


# --- what killed processes leave ---------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from nblora.storage.atomic import replace_whole, temporary_folder
if sys.argv[2] == "file":
    with replace_whole(sys.argv[1]) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
with temporary_folder(sys.argv[1]) as folder:
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_takes_away_what_a_killed_one_left(path, kind):
    for _ in range(3):
        assert run(KILLED, path, kind, check=False).returncode == -signal.SIGKILL
    assert len(list(path.parent.iterdir())) == 1  # the second took the first's away
    other = path.with_name("file.other")
    with replace_whole(other) as file:
        file.write(b"another's")
    assert len(list(path.parent.iterdir())) == 2  # which is none of its business
    with replace_whole(path) as file:
        file.write(b"new")
    assert sorted(path.parent.iterdir()) == [path, other]


@posix
def test_what_a_living_writer_writes_stays(path):
    with replace_whole(path) as first:
        first.write(b"first")
        with replace_whole(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


@posix
def test_a_name_that_was_taken_for_a_remainder_before_it_was_locked(path, monkeypatch):
    """Between its making and its locking another process may remove it: then it is made again."""
    original, taken = atomic._lock, []

    def late(descriptor, hidden):
        if not taken:
            taken.append(hidden)
            atomic.remove_stale(path)
        return original(descriptor, hidden)

    monkeypatch.setattr(atomic, "_lock", late)
    with replace_whole(path) as file:
        file.write(b"new")
    assert taken
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@posix
def test_threads_that_save_at_once_do_not_change_the_processs_umask(path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is every thread's"))
    with replace_whole(path) as file:
        file.write(b"new")
    with replace_folder(path.with_name("folder")) as folder:
        (folder / "file").touch()
