"""Which devices can run here, and the backend of each: the only test of availability in the library."""

import functools
import os
import re
from typing import TYPE_CHECKING, Any

from nblora.errors import DeviceUnavailableError

if TYPE_CHECKING:
    from .protocol import Backend

_default_device: str | None = None


def devices() -> list[str]:
    """List the devices that can run here, by the names that `to` accepts."""
    return ["cpu"]


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


def resolve(device: Any) -> "Backend":
    """Return the backend for `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`."""
    if not isinstance(device, str):
        raise TypeError(f"device must be a string such as 'cpu' or 'cuda:0', got {device!r}")
    if device in ("cpu", "auto"):
        return _cpu()
    if re.fullmatch(r"cuda(:\d+)?", device):
        raise DeviceUnavailableError(
            f"device {device!r} is not available: this version of nblora has no CUDA backend; use device='cpu'"
        )
    raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")


@functools.cache
def _cpu() -> "Backend":
    from .cpu import CPUBackend

    return CPUBackend()
