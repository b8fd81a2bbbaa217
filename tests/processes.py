"""Runs Python in a process of its own: what only a fresh interpreter can show."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code, *arguments, check=True, path=ROOT, options=("-W", "error"), timeout=300, **environment):
    """Run `code`, with warnings as errors, and return the finished process; None removes a variable."""
    variables = dict(os.environ) | {"PYTHONPATH": str(path)} | environment
    done = subprocess.run(
        [sys.executable, *options, "-c", code, *map(str, arguments)],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stderr
    return done
