"""Tools on files of weights: merge, unmerge, verify, inspect and combine, each also a command of the same name."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nblora.weights.combination import combine
    from nblora.weights.inspection import inspect
    from nblora.weights.merging import merge
    from nblora.weights.unmerging import unmerge
    from nblora.weights.verification import verify

_PLACES = {
    "combine": "combination",
    "inspect": "inspection",
    "merge": "merging",
    "unmerge": "unmerging",
    "verify": "verification",
}
__all__ = ["combine", "inspect", "merge", "unmerge", "verify"]


def __getattr__(name: str) -> Any:
    """Import a tool when it is first asked for: they bring in the kernels, and the commands need one at a time."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
