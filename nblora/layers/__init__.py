"""Layers: what adapters wrap, and what they are made of."""

from .base import Layer, read_layer
from .dense import Dense, FullyConnected
from .low_rank import LoRALayer

__all__ = ["Dense", "FullyConnected", "Layer", "LoRALayer", "read_layer"]
