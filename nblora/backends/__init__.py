"""Which devices can run here, and the backend of each: the only test of availability in the library."""

import functools
import os
import re
from typing import TYPE_CHECKING, Any, cast

from numba.core import config

from nblora.errors import DeviceUnavailableError

if TYPE_CHECKING:
    from .protocol import Backend

_default_device: str | None = None


def devices() -> list[str]:
    """List the devices that can run here, by the names that `to` accepts.

    Numba's CUDA simulator (`NUMBA_ENABLE_CUDASIM=1`) is among them as "cuda:0".
    """
    return ["cpu", *(f"cuda:{index}" for index in range(_cuda_count()))]


def set_device(device: str) -> None:
    """Make `device` the one that new layers and adapters are placed on; `"auto"` takes a real GPU where there is one.

    Without this call the environment variable `NBLORA_DEVICE` decides, and without that the CPU.

    Raises
    ------
    ValueError
        For an unknown name.
    DeviceUnavailableError
        For a device that cannot run here.
    """
    global _default_device
    resolve(device)
    _default_device = device


def default_backend() -> "Backend":
    """Return the backend that new objects are placed on."""
    return resolve(_default_device or os.environ.get("NBLORA_DEVICE") or "cpu")


def resolve(device: Any, precision: str = "float32") -> "Backend":
    """Return the backend for `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`; the precision is a GPU's."""
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'cpu' or 'cuda:0', got {device!r}")
    if device == "auto":
        simulated = getattr(config, "ENABLE_CUDASIM", False)
        device = "cuda" if not simulated and _cuda_count() else "cpu"
    if device == "cpu":
        return _cpu()
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    return _cuda(int(device.partition(":")[2] or 0), precision)


def describe(device: str) -> str:
    """Say what the GPU "cuda" or "cuda:N" is; DeviceUnavailableError where it cannot be used."""
    resolve(device)
    from .device import open_device

    return open_device(int(device.partition(":")[2] or 0)).description


def cuda_problem() -> str | None:
    """What keeps CUDA from running here, in words; None where a GPU, or the simulator, is there."""
    try:
        from .device import missing

        return missing()
    except Exception as error:  # a broken toolkit fails at import, with errors of any kind
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"the CUDA packages fail at import ({why}): pip install 'nblora[cuda12]' or 'nblora[cuda13]'"


def _cuda_count() -> int:
    if cuda_problem() is not None:
        return 0
    from .device import device_count

    return device_count()


@functools.cache
def _cpu() -> "Backend":
    from .cpu import CPUBackend
    from .reference import ReferenceBackend

    # Without the compiler (NUMBA_DISABLE_JIT=1) there is no machine code for the kernels to call.
    return ReferenceBackend() if config.DISABLE_JIT else CPUBackend()  # type: ignore[attr-defined]  # as below


@functools.cache
def _cuda(index: int, precision: str) -> "Backend":
    problem = cuda_problem()
    if problem is not None:
        raise DeviceUnavailableError(f"device 'cuda:{index}' is not available: {problem}; or use device='cpu'")
    from .cuda import open_backend

    # Not all of it yet: a layer that needs an operation that is missing there refuses to move.
    return cast("Backend", open_backend(index, precision))
