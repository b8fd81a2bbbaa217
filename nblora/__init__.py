"""LoRA and Delta-LoRA adapters on NumPy arrays, trained and merged by fused Numba kernels."""

from nblora import errors, training
from nblora._version import __version__
from nblora.adapters import DeltaLoRAAdapter, LoRAAdapter
from nblora.backends import devices, set_device
from nblora.layers import Dense, FullyConnected, LoRALayer
from nblora.layers import read_layer as load
from nblora.models import Sequential
from nblora.training import fit

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
    "fit",
    "load",
    "set_device",
    "training",
]
