"""Layers: what adapters wrap, and what they are made of."""

from .base import Layer, read_layer
from .conv import Conv1d, Conv2d
from .dense import Dense, FullyConnected
from .embedding import Embedding
from .low_rank import LoRALayer
from .norm import LayerNorm, RMSNorm

__all__ = [
    "Conv1d",
    "Conv2d",
    "Dense",
    "Embedding",
    "FullyConnected",
    "Layer",
    "LayerNorm",
    "LoRALayer",
    "RMSNorm",
    "read_layer",
]
