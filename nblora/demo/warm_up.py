"""Compile the kernels on two cores: forward's in this process while another compiles backward's into the same cache."""

import os
import subprocess
import sys

import numpy as np

from nblora import DeltaLoRAAdapter
from nblora.backends.protocol import Saved
from nblora.info import usable_cores
from nblora.kernels import jit

from .methods import RANK, new_network

# Numba compiles in one thread: forward takes 20 s of processor time, backward 25 s, everything else 3 s.
PROGRAM = "from nblora.demo.warm_up import compile_backward; compile_backward()"


def compile_kernels() -> bool:
    """Compile what the demo needs and keep it in the kernel cache, which must be empty.

    Returns
    -------
    bool
        Whether anything had to be compiled.
    """
    if jit.JIT_DISABLED:
        return False
    folder = jit.cache_folder()
    if folder is not None and any(folder.glob("*.nbi")):
        return False
    if folder is None or usable_cores() < 2:
        compile_forward()
        compile_backward()
        return True
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    other = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        compile_forward()
    finally:
        other.wait()  # where it failed, the first backward compiles here
    return True


def compile_forward() -> None:
    """Run one forward."""
    adapter = _adapter()
    adapter.forward(np.zeros((1, adapter.in_features), adapter.dtype))


def compile_backward() -> None:
    """Run one backward, of a forward that is made up: everything is zero."""
    adapter = _adapter()

    def zeros(columns: int) -> np.ndarray:
        return np.zeros((1, columns), adapter.dtype)

    out = zeros(adapter.out_features)
    saved = Saved(x=zeros(adapter.in_features), low=zeros(RANK), z=zeros(adapter.out_features), mask=None)
    adapter._backend.backward(out, saved, adapter._operands())


def _adapter() -> DeltaLoRAAdapter:
    return DeltaLoRAAdapter(new_network(0)["hidden1"].to("cpu"), RANK, seed=0)
