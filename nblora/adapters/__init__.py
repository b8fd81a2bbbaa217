"""Adapters: one file, one method, and one line here."""

from .base import Adapter
from .delta import DeltaLoRAAdapter
from .lora import LoRAAdapter

__all__ = ["ADAPTERS", "DEFAULT_ADAPTER", "Adapter", "DeltaLoRAAdapter", "LoRAAdapter"]

ADAPTERS: dict[str, type[Adapter]] = {cls.method: cls for cls in (LoRAAdapter, DeltaLoRAAdapter)}
"""The methods by the names that `adapt`, estimators and sweeps know them by."""
DEFAULT_ADAPTER = LoRAAdapter.method
"""Wherever none is named: a dense delta makes a layer's state larger than the layer, so it is asked for."""
