"""What a terminal shows while kernels compile, and that nothing else is ever told."""

import os
import pty
import subprocess
import sys

import pytest

from tests.processes import ROOT, run

CODE = """
from nblora.kernels.common.jit import kernel

@kernel
def f(x):
    return x + 1

print(f(1), f(2.0))
"""


def on_a_terminal(folder):
    """What the code writes to a standard error that is a terminal."""
    reader, terminal = pty.openpty()
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(folder), "NUMBA_DISABLE_JIT": "0"}
    with subprocess.Popen([sys.executable, "-c", CODE], stderr=terminal, stdout=subprocess.PIPE, env=environment) as p:
        output = p.communicate(timeout=120)[0]
    os.close(terminal)
    text = b""
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError:  # the other side is closed
            part = b""
        if not part:
            break
        text += part
    os.close(reader)
    assert output.split() == [b"2", b"3.0"]
    return text.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_is_told_once_that_kernels_compile(tmp_path):
    first = on_a_terminal(tmp_path)
    assert first.count("compiling kernels for this processor") == 1
    assert first.count("\n") == 1
    assert "happens once" in first
    assert on_a_terminal(tmp_path) == ""  # and a second process loads them


def test_a_file_is_told_nothing(tmp_path):
    assert run(CODE, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_DISABLE_JIT="0").stderr == ""
