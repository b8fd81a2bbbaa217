"""Tools on files of weights: merge, unmerge, verify, inspect and combine, each also a command of the same name."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nblora.weights.combine import combine
    from nblora.weights.inspect import inspect
    from nblora.weights.merge import merge
    from nblora.weights.unmerge import unmerge
    from nblora.weights.verify import verify

__all__ = ["combine", "inspect", "merge", "unmerge", "verify"]


def __getattr__(name: str) -> Any:
    """Import a tool when it is first asked for: they bring in the kernels, and the commands need one at a time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)
