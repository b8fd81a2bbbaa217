"""Models: layers and adapters in a row, and the choice of which layers to adapt."""

from .sequential import Sequential

__all__ = ["Sequential"]
