"""The CUDA backend: which kernel, on which tile, on which grid. Arrays stay on the device from one call to the next."""

from nblora.errors import DeviceUnavailableError

from ..device import open_device
from .attention import Attention
from .images import Images
from .linear import Linear
from .losses import Losses
from .rows import RowOperations
from .updates import Updates


class CUDABackend(Linear, Updates, Losses, Attention, RowOperations, Images):
    """The operations of `protocol.Backend` on one GPU."""


def open_backend(index: int, precision: str) -> CUDABackend:
    """The backend of one GPU and precision; DeviceUnavailableError that says what is missing."""
    device = open_device(index)
    if precision == "tf32" and device.compute_capability < (8, 0):
        what = "Numba's simulator has none" if device.simulated else "this GPU is older"
        raise DeviceUnavailableError(
            f"precision 'tf32' needs tensor cores of compute capability 8.0 or newer, and {what}; use 'float32'"
        )
    return CUDABackend(device, precision)
