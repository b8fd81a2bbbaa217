"""Layers: what adapters wrap, and what they are made of."""

from .attention import Attention, Rotary
from .base import Layer, read_layer
from .conv import Conv1d, Conv2d
from .dense import Dense, FullyConnected
from .embedding import Embedding
from .functions import Activation, Gate
from .images import AvgPool2d, BatchNorm2d, GlobalAvgPool2d, MaxPool2d
from .low_rank import LoRALayer
from .norm import LayerNorm, RMSNorm

__all__ = [
    "Activation",
    "Attention",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "Dense",
    "Embedding",
    "FullyConnected",
    "Gate",
    "GlobalAvgPool2d",
    "Layer",
    "LayerNorm",
    "LoRALayer",
    "MaxPool2d",
    "RMSNorm",
    "Rotary",
    "read_layer",
]
