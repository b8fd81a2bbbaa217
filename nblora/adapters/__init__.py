"""Adapters: one file, one method."""

from .base import Adapter
from .delta import DeltaLoRAAdapter
from .lora import LoRAAdapter

__all__ = ["Adapter", "DeltaLoRAAdapter", "LoRAAdapter"]
