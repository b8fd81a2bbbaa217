"""Other people's files: safetensors read in pieces, PEFT adapters in and out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nblora.formats.peft import PeftAdapter
    from nblora.formats.peft_export import save_peft
    from nblora.formats.peft_import import load_peft
    from nblora.formats.safetensors_reader import SafetensorsFile

_PLACES = {
    "PeftAdapter": "peft",
    "SafetensorsFile": "safetensors_reader",
    "load_peft": "peft_import",
    "save_peft": "peft_export",
}
__all__ = ["PeftAdapter", "SafetensorsFile", "load_peft", "save_peft"]


def __getattr__(name: str) -> Any:
    """Import a format when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
