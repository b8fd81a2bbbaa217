"""Attention and rotary positions on a GPU."""

from .deferred import Deferred


class Attention(Deferred):
    """The operations of `ReferenceBlocks` that look at heads."""
