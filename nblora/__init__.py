"""LoRA and Delta-LoRA adapters on NumPy arrays, trained and merged by fused Numba kernels."""

from nblora import errors
from nblora._version import __version__
from nblora.adapters import DeltaLoRAAdapter, LoRAAdapter
from nblora.backends import devices, set_device
from nblora.layers import Dense, FullyConnected, LoRALayer
from nblora.layers import read_layer as load
from nblora.models import Sequential

__all__ = [
    "DeltaLoRAAdapter",
    "Dense",
    "FullyConnected",
    "LoRAAdapter",
    "LoRALayer",
    "Sequential",
    "__version__",
    "devices",
    "errors",
    "load",
    "set_device",
]
