"""Where training went wrong: the layer of a parameter, and the first layer that gives something not finite."""

import math
from typing import Any

import numpy as np

from nblora.backends.protocol import Array
from nblora.errors import NonFiniteError
from nblora.layers import Layer, tree
from nblora.layers.run import Run


def first_fault(model: Layer, x: np.ndarray) -> str:
    """Describe the first layer that holds or gives something not finite for the inputs `x`."""
    watch = _Watch(model)
    model._forward(model._enter("x", x, model._as_input)[0], watch)
    return watch.fault or f"the loss itself: the outputs of {_describe(*watch.last)} are finite"


def faulty_gradient(model: Layer, name: str, step: int) -> NonFiniteError:
    """The error for a gradient that is not finite, of the parameter called `name`."""
    owner, layer = _owner(model, name)
    return NonFiniteError(
        f"the gradient of {_local(name, owner)} in {_describe(owner, layer)} is not finite at step {step}"
    )


def check_parameters(model: Layer, step: int) -> None:
    """NonFiniteError where any trained parameter or velocity is not finite."""
    changing, backend = list(tree.changing(model)), model._backend
    squares = backend.read(backend.sums_of_squares([parameter.array for _, parameter, _ in changing]))
    for (name, parameter, _), square in zip(changing, squares, strict=True):
        if not _is_finite(model, parameter.array, square):
            owner, layer = _owner(model, name)
            raise NonFiniteError(f"{_local(name, owner)} of {_describe(owner, layer)} is not finite after step {step}")


class _Watch(Run):
    """A forward that notes the first fault on its way."""

    def __init__(self, model: Layer) -> None:
        super().__init__(model._backend)
        self._model = model
        self._names = {layer: name for name, layer in tree.units(model)}
        self.fault = ""
        self.last: tuple[str, Layer] = ("", model)

    def passed(self, layer: Layer, output: Array) -> None:
        self.last = self._names[layer], layer
        if self.fault:
            return
        if any(not _is_finite(self._model, named.array) for named in layer._parameters()):
            self.fault = f"{_describe(*self.last)}, whose parameters are not finite"
        elif not _is_finite(self._model, output):
            self.fault = f"{_describe(*self.last)}, whose output is not finite"


def _owner(model: Layer, name: str) -> tuple[str, Layer]:
    """The layer that computes with the parameter called `name`, after its own name."""
    holding = [(owner, layer) for owner, layer in tree.units(model) if not owner or name.startswith(f"{owner}.")]
    return max(holding, key=lambda pair: len(pair[0]))


def _local(name: str, owner: str) -> str:
    return name.removeprefix(f"{owner}.") if owner else name


def _describe(name: str, layer: Layer) -> str:
    """What messages call a layer."""
    kind = type(layer).__name__
    return f"layer {name!r} ({kind})" if name else f"the {kind}"


def _is_finite(model: Layer, array: Any, square: float | None = None) -> bool:
    """Whether all of an array is, of which the sum of squares may be known."""
    square = model._backend.sum_of_squares(array) if square is None else square
    # NaN and infinity survive a sum of squares; a sum of large float64 values may overflow without any.
    return math.isfinite(square) or bool(np.isfinite(model._backend.to_host(array)).all())
