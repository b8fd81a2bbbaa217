"""Tools on files of weights: merge, unmerge, verify, inspect and combine, each also a command of the same name."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nblora.weights.merge import merge

_PLACES = {"merge": "nblora.weights.merge"}

__all__ = ["merge"]


def __getattr__(name: str) -> Any:
    """Import a tool when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
