"""Steps of a forward that have no parameters, and how values branch and join.

Families of models are written with them, beside layers; half a block of a Llama is

    y = self.norm._forward(x, run)
    q, k, v = fan_out(self.projections, y, run)
    y = join(self.output._forward(self.attention._forward(q, k, v, run), run), x, run)

and its way back

    below = self.attention._backward(self.output._backward(grad, run), run)
    return rejoin(self.norm._backward(fan_in(self.projections, below, run), run), grad, run)

A value that two things read has two gradients; `fan_in` and `rejoin` add them up. None in the place of a gradient says
that nobody wants it, or what is below: it is handed on.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from nblora import checks
from nblora.backends.blocks import ReferenceBlocks
from nblora.backends.protocol import Array

from .activations import ACTIVATIONS, activation_code
from .run import Run


def fan_out(layers: Sequence[Any], x: Array, run: Run) -> list[Array]:
    """What each of several layers makes of the same value."""
    live, wanted, outputs = run.live, False, []
    for layer in layers:
        run.live = live
        outputs.append(layer._forward(x, run))
        wanted = wanted or run.live
    run.live = live or wanted
    return outputs


def fan_in(layers: Sequence[Any], grads: Sequence[Array] | None, run: Run) -> Array | None:
    """The gradient of the value that `fan_out` gave to all, from those of its results."""
    total: Array | None = None
    if grads is None:
        return None
    for layer, grad in zip(reversed(layers), reversed(grads), strict=True):
        below = layer._backward(grad, run)
        if total is None:
            total = below
        elif below is not None:
            run.backend.add(total, below)
    return total


def join(y: Array, x: Array, run: Run) -> Array:
    """y + x, in the memory of y, which must be new: a residual, whose value x has other readers."""
    run.backend.add(y, x)
    return y


def rejoin(below: Array | None, grad: Array, run: Run) -> Array | None:
    """The gradient of a residual's x: what came back through y, and that of the sum. None where nobody wants it."""
    if below is not None:
        run.backend.add(below, grad)
    return below


class Function:
    """A step of a forward without parameters: no layer, so it has no name and is moved nowhere."""

    _state = 0

    def _keep(self, run: Run, *values: Any) -> None:
        if run.training:
            run.keep(self, values if run.live else None)


class Dropout(Function):
    """x / (1 - share) for each element that is kept, 0 for one that is dropped, with the probability `share`.

    Parameters
    ----------
    share : float
        In [0, 1).
    """

    def __init__(self, share: float) -> None:
        self.share = checks.check_fraction("share", share)

    def _forward(self, x: Array, run: Run, rng: np.random.Generator | None) -> Array:
        """x itself where nothing draws, and out of training."""
        kept = None
        if rng is not None and run.training and self.share:
            x, kept = cast(ReferenceBlocks, run.backend).dropout(x, self.share, rng)
        self._keep(run, kept)
        return x

    def _backward(self, grad: Array, run: Run) -> Array | None:
        held = run.recall(self)
        if held is None or grad is None:
            return None
        (kept,) = held
        return grad if kept is None else cast(ReferenceBlocks, run.backend).dropout_gradient(grad, self.share, kept)

    def __repr__(self) -> str:
        return f"Dropout({self.share:g})"


class Activation(Function):
    """act(x), where no projection ends with it.

    Parameters
    ----------
    activation : str
        As for `Dense`.
    """

    def __init__(self, activation: str) -> None:
        self._code = activation_code(activation)

    def _forward(self, x: Array, run: Run) -> Array:
        self._keep(run, x)
        return cast(ReferenceBlocks, run.backend).pointwise(x, self._code)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept = run.recall(self)
        if kept is None:
            return None
        (x,) = kept
        return cast(ReferenceBlocks, run.backend).pointwise_gradient(grad, x, self._code)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({ACTIVATIONS[self._code]!r})"


class Gate(Activation):
    """act(x)∘u: the middle of a gated MLP, whose x and u are two projections of one value."""

    def _forward(self, x: Array, u: Array, run: Run) -> Array:  # type: ignore[override]  # two values go in
        self._keep(run, x, u)
        return cast(ReferenceBlocks, run.backend).gated(x, u, self._code)

    def _backward(self, grad: Array, run: Run) -> tuple[Array, Array] | None:
        kept = run.recall(self)
        if kept is None:
            return None
        x, u = kept
        return cast(ReferenceBlocks, run.backend).gated_gradient(grad, x, u, self._code)
