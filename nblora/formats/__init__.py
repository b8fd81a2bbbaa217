"""Other people's files: safetensors read in pieces, PEFT adapters in and out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nblora.formats.peft import PeftAdapter
    from nblora.formats.peft_export import save_peft
    from nblora.formats.peft_import import load_peft
    from nblora.storage.safetensors_reader import SafetensorsFile
    from nblora.storage.safetensors_writer import write_safetensors

_PLACES = {
    "PeftAdapter": "nblora.formats.peft",
    "SafetensorsFile": "nblora.storage.safetensors_reader",
    "load_peft": "nblora.formats.peft_import",
    "save_peft": "nblora.formats.peft_export",
    "write_safetensors": "nblora.storage.safetensors_writer",
}
__all__ = ["PeftAdapter", "SafetensorsFile", "load_peft", "save_peft", "write_safetensors"]


def __getattr__(name: str) -> Any:
    """Import a format when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
