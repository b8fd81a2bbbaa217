"""Samples: checked as a whole before the first step, cut into batches, cast batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nblora import checks
from nblora.layers import Layer

from .losses import Loss

_WINDOW = 50  # batches among which samples are sorted by length: near enough in length, and still in any order


class Samples(NamedTuple):
    """Inputs, samples first, and targets as the loss wants them: arrays, or what is cut like them."""

    x: Any
    y: Any

    @property
    def of_texts(self) -> bool:
        """Whether a sample is a sequence of tokens."""
        return hasattr(self.x, "ids")

    @property
    def size(self) -> int:
        """How much there is to compute: tokens of texts, samples of others."""
        return len(self.x.ids) if self.of_texts else len(self.x)

    @property
    def unit(self) -> str:
        """What `size` counts."""
        return "tokens" if self.of_texts else "samples"

    def batches(self, size: int, order: np.ndarray | None = None, first: int = 0) -> Iterator[tuple[Any, Any]]:
        """Cut into batches of `size`, the last of which may be smaller, in the given order or as they lie.

        `first` is the place in that order at which to begin.
        """
        for start in range(first, len(self.x), size):
            chosen = slice(start, start + size) if order is None else order[start : start + size]
            yield self.x[chosen], self.y[chosen]

    def by_length(self, order: np.ndarray | None, size: int, rng: np.random.Generator | None) -> np.ndarray:
        """An order whose batches hold samples of like length; the batches themselves are shuffled where `rng` is."""
        count = len(self.x)
        order = np.arange(count) if order is None else order
        lengths = np.diff(self.x.begins)
        parts = [order[start : start + _WINDOW * size] for start in range(0, count, _WINDOW * size)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        if rng is None:
            return order
        whole = count // size
        places = rng.permutation(whole)
        first = order[: whole * size].reshape(whole, size)[places].reshape(-1)
        return np.concatenate([first, order[whole * size :]])


def counted(batches: Sequence[tuple[Any, Any]], loss: Loss) -> dict[str, int]:
    """Of how many targets the loss of these batches is the mean, their samples, and their `Samples.size`."""
    return {
        "learnt": sum(loss._learnt(y) for _, y in batches),
        "samples": sum(len(x) for x, _ in batches),
        "size": sum(Samples(x, y).size for x, y in batches),
    }


def check_samples(names: tuple[str, str], x: Any, y: Any, model: Layer, loss: Loss) -> Samples:
    """Check inputs and targets for `model` and `loss`; `names` are what messages call them.

    Raises
    ------
    TypeError, ValueError
        For another kind, shape or length, for no samples, for labels out of range, and for NaN, infinity and what the
        model's dtype cannot hold.
    """
    inputs = model._as_samples(names[0], x)
    targets = model._as_targets(names[1], y, inputs, loss)
    if isinstance(targets, np.ndarray):
        checks.check_finite(names[1], targets, model.dtype)
    return Samples(inputs, targets)
