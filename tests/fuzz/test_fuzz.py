"""No damaged file brings anything but an error of nblora's own, or of the system, out of a reader."""

import json
import os
import subprocess
import sys

import pytest

from nblora.errors import NbloraError
from tests.processes import ROOT

from .readers import READERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded as Linux does")


def fuzz(count, seed, *only):
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--seed", str(seed), "--only", *only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["reader"] for each in found] == list(only), done.stderr
    for each in found:
        assert not each["faults"], each
        assert sum(each["outcomes"].values()) == count
        assert each["outcomes"]["refused"] > count // 10


def test_damaged_files():
    fuzz(40, 1, *READERS)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_damaged_files(reader):
    fuzz(2000, 2, reader)


def special(kind, path):
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.small
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
@pytest.mark.parametrize("reader", ["checkpoint", "run", "peft-config", "peft-tensors", "index", "originals", "npz",
                                    "toml", "gguf", "results", "demo", "curves"])  # fmt: skip
def test_what_is_no_file_is_named_and_hangs_nothing(reader, kind, tmp_path):
    reader = READERS[reader]
    reader.make(tmp_path)
    path = tmp_path / reader.name
    special(kind, path)
    with pytest.raises((NbloraError, OSError), match=path.name):
        reader.read(tmp_path)
