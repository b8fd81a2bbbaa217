"""Heads: what makes a task's outputs of the rows of all tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nblora.backends.protocol import Array
from nblora.layers import Layer
from nblora.layers.functions import Dropout
from nblora.layers.run import Run, Sequences

from .blocks import Block, Mean, Normalised, Pick


class Head(Block, abstract=True):
    """The last block of a model. Its layers bear whole names, since a head has none itself."""

    by_token = False
    """Whether there is an output for every token, and not one for every sequence."""
    own: tuple[str, ...] = ()
    """Names of the layers that are a task's own."""

    @property
    def reads(self) -> Callable[[Sequences], np.ndarray] | None:
        """Which rows it reads of the last block, None for all."""
        return None


class Classifier(Head, abstract=True):
    """Linear layers on one row of each sequence, or on images that were pooled.

    Parameters
    ----------
    layers : mapping of names to layers
        One after the other.
    place : {"first", "last", None}
        Which row of a sequence; None where rows are one for each already.
    own : tuple of str
        The layers that are the task's own, by default all.
    dropouts : mapping of names to float
        What is dropped of the inputs of layers, in `fit(base_dropout=True)`.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        place: str | None,
        own: tuple[str, ...] = (),
        dropouts: Mapping[str, float] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self._dropouts = {name: Dropout(share) for name, share in (dropouts or {}).items()}
        self.own = own or tuple(layers)
        self._pick = None if place is None else Pick(place)
        self._begin()

    @property
    def reads(self) -> Callable[[Sequences], np.ndarray] | None:
        return None if self._pick is None else self._pick.rows

    def children(self) -> dict[str, Layer]:
        return dict(self._layers)

    @property
    def drops(self) -> bool:
        return any(dropout.share > 0 for dropout in self._dropouts.values())

    def _set_child(self, name: str, layer: Layer) -> None:
        self._layers[name] = layer

    def _forward(self, x: Array, run: Run) -> Array:
        if self._pick is not None:
            x = self._pick._forward(x, run)
        for name, layer in self._layers.items():
            if name in self._dropouts:
                x = self._dropouts[name]._forward(x, run, self._rng)
            x = layer._forward(x, run)
        return x

    def _backward(self, grad: Array, run: Run) -> Array | None:
        below: Array | None = grad
        for name, layer in reversed(self._layers.items()):
            below = layer._backward(below, run)
            if name in self._dropouts:
                below = self._dropouts[name]._backward(below, run)
        return below if self._pick is None else self._pick._backward(below, run)


class LanguageHead(Head, abstract=True):
    """Logits of the next token at every token."""

    NAMES = {"head": "lm_head"}
    by_token = True
    own = ("lm_head",)

    def __init__(self, head: Layer) -> None:
        self.head = head
        self._begin()

    def _forward(self, x: Array, run: Run) -> Array:
        return self.head._forward(x, run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        return self.head._backward(grad, run)


class Pooled(Head, abstract=True):
    """One row of features for each sequence: its mean, or its first, or its last.

    Parameters
    ----------
    pooling : {"mean", "first", "last"}
    normalised : bool
        Whether rows are brought to length 1.
    idle : mapping of names to layers
        Layers of the file that take no part, kept for saving.
    """

    def __init__(self, features: Layer, pooling: str, normalised: bool, idle: Mapping[str, Layer]) -> None:
        self._idle, self.pooling, self.normalised = dict(idle), pooling, normalised
        self._steps: list[Any] = [Mean() if pooling == "mean" else Pick(pooling)]
        self._steps += [Normalised(features.out_features)] if normalised else []
        self.dtype, self.in_features, self.out_features = features.dtype, features.out_features, features.out_features
        self._open(features._backend)

    @property
    def reads(self) -> Callable[[Sequences], np.ndarray] | None:
        first = self._steps[0]
        return first.rows if isinstance(first, Pick) else None

    def children(self) -> dict[str, Layer]:
        return dict(self._idle)

    def _set_child(self, name: str, layer: Layer) -> None:
        self._idle[name] = layer

    def _forward(self, x: Array, run: Run) -> Array:
        for step in self._steps:
            x = step._forward(x, run)
        return x

    def _backward(self, grad: Array, run: Run) -> Array | None:
        below: Array | None = grad
        for step in reversed(self._steps):
            below = step._backward(below, run)
        return below
