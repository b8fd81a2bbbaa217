"""Adapters: one file, one method, and one line here: `ADAPTERS`, the classes by their methods' names."""

from collections.abc import Mapping
from typing import Any

from .base import Adapter, Factors
from .delta import DeltaLoRAAdapter
from .dora import DoRAAdapter
from .lora import LoRAAdapter
from .miss import MiSSAdapter
from .zi import ZiAdapter

__all__ = [
    "ADAPTERS",
    "DEFAULT_ADAPTER",
    "Adapter",
    "DeltaLoRAAdapter",
    "DoRAAdapter",
    "Factors",
    "LoRAAdapter",
    "MiSSAdapter",
    "ZiAdapter",
    "reader_of",
]

ADAPTERS: dict[str, type[Adapter]] = {
    cls.method: cls for cls in (LoRAAdapter, DeltaLoRAAdapter, DoRAAdapter, ZiAdapter, MiSSAdapter)
}
"""The methods by the names that `adapt`, estimators and sweeps know them by."""
DEFAULT_ADAPTER = LoRAAdapter.method
"""Wherever none is named: a dense delta makes a layer's state larger than the layer, so it is asked for."""


def reader_of(config: Mapping[str, Any]) -> type[Adapter]:
    """The method whose files in PEFT's format say what this configuration does: the one with most of its fields."""
    readers = (cls for cls in ADAPTERS.values() if cls.reads_peft and cls.peft_fields.items() <= config.items())
    return max(readers, key=lambda cls: len(cls.peft_fields))
