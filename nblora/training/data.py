"""Samples: checked as a whole before the first step, cut into batches, cast batch by batch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nblora import checks
from nblora.layers import Layer

from .losses import Loss

_ROWS = 1 << 20  # elements looked at together, 8 MB at most


class Samples(NamedTuple):
    """Inputs, samples first, and targets as the loss wants them."""

    x: np.ndarray
    y: np.ndarray

    def batches(self, size: int, order: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cut into batches of `size`, the last of which may be smaller, in the given order or as they lie."""
        for start in range(0, len(self.x), size):
            chosen = slice(start, start + size) if order is None else order[start : start + size]
            yield self.x[chosen], self.y[chosen]


def check_samples(names: tuple[str, str], x: Any, y: Any, model: Layer, loss: Loss) -> Samples:
    """Check inputs and targets for `model` and `loss`; `names` are what messages call them.

    Raises
    ------
    TypeError, ValueError
        For another kind, shape or length, for no samples, for labels out of range, and for NaN, infinity and what the
        model's dtype cannot hold.
    """
    inputs = checks.as_real(names[0], x)
    axes = model._axes()
    if inputs.ndim < len(axes):
        wanted = ", ".join(map(str, ("samples", *axes[1:])))
        raise ValueError(f"{names[0]} must have shape ({wanted}), got {inputs.shape}")
    shape = model._output_shape(names[0], inputs.shape)
    if inputs.size == 0:
        raise ValueError(f"{names[0]} must hold at least one sample, got shape {inputs.shape}")
    check_finite(names[0], inputs, model.dtype)
    targets = loss.check_target(names[1], y, shape)
    check_finite(names[1], targets, model.dtype)
    return Samples(inputs, targets)


def check_finite(name: str, array: np.ndarray, dtype: np.dtype) -> None:
    """ValueError that names the first sample in which a value is not finite once cast to `dtype`."""
    if array.dtype.kind in "biu":
        return
    step = max(1, _ROWS * len(array) // max(1, array.size))
    for start in range(0, len(array), step):
        with np.errstate(over="ignore"):
            finite = np.isfinite(array[start : start + step].astype(dtype, copy=False))
        if not finite.all():
            place = np.argwhere(~finite)[0]
            place[0] += start
            value = array[tuple(place)]
            raise ValueError(
                f"{name} must be finite in {dtype}, got {value} at sample {place[0]}: "
                "replace or drop such samples, for example with numpy.isfinite"
            )
