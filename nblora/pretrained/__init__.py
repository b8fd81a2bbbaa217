"""Pretrained models: families of them, loaded from their folders, as trees of layers."""

from .generation import generate
from .image import ImageModel
from .loading import load_pretrained
from .model import PretrainedModel
from .text import TextModel

__all__ = ["ImageModel", "PretrainedModel", "TextModel", "generate", "load_pretrained"]
