"""LoRA and Delta-LoRA adapters on NumPy arrays, trained and merged by fused Numba kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from nblora._version import __version__

if TYPE_CHECKING:
    from nblora import errors, training
    from nblora.adapters import DeltaLoRAAdapter, LoRAAdapter
    from nblora.backends import devices, set_device
    from nblora.finetuning import finetune
    from nblora.formats import load_peft, save_peft
    from nblora.layers import (
        Conv1d,
        Conv2d,
        Dense,
        Embedding,
        FullyConnected,
        LayerNorm,
        LoRALayer,
        RMSNorm,
    )
    from nblora.layers import read_layer as load
    from nblora.models import Sequential
    from nblora.pretrained import generate, load_pretrained
    from nblora.text import encode, load_tokenizer
    from nblora.training import fit  # type: ignore[no-redef]  # a module of that name lies there too
    from nblora.weights import combine, inspect, merge, unmerge, verify

__all__ = [
    "Conv1d",
    "Conv2d",
    "DeltaLoRAAdapter",
    "Dense",
    "Embedding",
    "FullyConnected",
    "LayerNorm",
    "LoRAAdapter",
    "LoRALayer",
    "RMSNorm",
    "Sequential",
    "__version__",
    "combine",
    "devices",
    "encode",
    "errors",
    "finetune",
    "fit",
    "generate",
    "inspect",
    "load",
    "load_peft",
    "load_pretrained",
    "load_tokenizer",
    "merge",
    "save_peft",
    "set_device",
    "training",
    "unmerge",
    "verify",
]

_PLACES = {
    "Conv1d": "layers",
    "Conv2d": "layers",
    "DeltaLoRAAdapter": "adapters",
    "Dense": "layers",
    "Embedding": "layers",
    "FullyConnected": "layers",
    "LoRAAdapter": "adapters",
    "LayerNorm": "layers",
    "LoRALayer": "layers",
    "RMSNorm": "layers",
    "Sequential": "models",
    "combine": "weights",
    "devices": "backends",
    "encode": "text",
    "finetune": "finetuning",
    "fit": "training",
    "generate": "pretrained",
    "inspect": "weights",
    "load": "layers.read_layer",
    "load_peft": "formats",
    "load_pretrained": "pretrained",
    "load_tokenizer": "text",
    "merge": "weights",
    "save_peft": "formats",
    "set_device": "backends",
    "unmerge": "weights",
    "verify": "weights",
}
"""Where a public name comes from: a room, and the name there if it is another."""
_ROOMS = (
    "adapters",
    "backends",
    "checks",
    "compare",
    "errors",
    "finetuning",
    "formats",
    "kernels",
    "layers",
    "models",
    "plots",
    "pretrained",
    "results",
    "storage",
    "sweep",
    "text",
    "training",
    "weights",
)


def __getattr__(name: str) -> Any:
    """Import a public name, or a room, when it is first asked for.

    Half of what the command line waits for at its start is Numba, and some commands have work to do meanwhile.
    """
    if name in _ROOMS:
        return importlib.import_module(f"nblora.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'nblora' has no attribute {name!r}")
    room, _, other = _PLACES[name].partition(".")
    value = getattr(importlib.import_module(f"nblora.{room}"), other or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_ROOMS})
