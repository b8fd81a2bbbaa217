"""`Sequential`: layers and adapters in a row, one of them after the other."""

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array
from nblora.layers import Layer, tree
from nblora.layers.base import layer_from_state
from nblora.layers.run import Run

from .model import Model


class Sequential(Model):
    """Layers, adapters and models in a row: the output of each is the input of the next.

    Parameters
    ----------
    *layers : Layer, or one mapping of names to layers
        Kept by reference. Without names they are called "0", "1", ...; parameters are called "0.weight" and so on.

    Raises
    ------
    TypeError
        For what is no layer.
    ValueError
        Where the sizes or dtypes of neighbours do not fit, for the same layer twice, and without any layer.
    """

    def __init__(self, *layers: Layer | Mapping[str, Layer]) -> None:
        named = _named(layers)
        _check_chain(named)
        self._layers = named
        first, last = next(iter(named.values())), next(reversed(named.values()))
        self.in_features, self.out_features, self.dtype = first.in_features, last.out_features, first.dtype
        self._open(first._backend)

    # --- the layers --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers.values())

    def __getitem__(self, key: int | str) -> Layer:
        if isinstance(key, str):
            if key not in self._layers:
                raise KeyError(f"no layer {key!r}; there are {', '.join(self._layers)}")
            return self._layers[key]
        return list(self._layers.values())[key]

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Iterate over pairs of name and layer."""
        return iter(self._layers.items())

    def children(self) -> dict[str, Layer]:
        return dict(self._layers)

    def _set_child(self, name: str, layer: Layer) -> None:
        self._layers[name] = layer

    def _around(self, children: Mapping[str, Layer]) -> "Sequential":
        return Sequential(children)

    # --- computing ---------------------------------------------------------------------------------------------

    def _as_input(self, name: str, value: Any) -> Array:
        return next(iter(self))._as_input(name, value)

    def _as_output(self, name: str, value: Any) -> Array:
        return list(self)[-1]._as_output(name, value)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        for key, layer in self._layers.items():
            shape = layer._output_shape(name, shape)
            name = f"the output of layer {key!r}"
        return shape

    def _axes(self) -> tuple[int | str, ...]:
        return next(iter(self))._axes()

    def _example(self, samples: int) -> np.ndarray:
        return next(iter(self))._example(samples)

    def _forward(self, x: Array, run: Run) -> Array:
        for layer in self._layers.values():
            x = layer._forward(x, run)
        return x

    def _backward(self, grad: Array, run: Run) -> Array | None:
        for layer in reversed(self._layers.values()):
            gradient = layer._backward(grad, run)
            if gradient is None:  # nothing below is trained
                return None
            grad = gradient
        return grad

    # --- describing and keeping --------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        layers = [
            {"name": name, "kind": type(layer).__name__, "config": layer._config()}
            for name, layer in self.named_layers()
        ]
        turned = tree.turned(self)
        tied = {name: [first, (name in turned) != (first in turned)] for name, first in tree.ties(self).items()}
        return {"layers": layers, "training": self.training, **({"tied": tied} if tied else {})}

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        layers, tied = {}, config.get("tied", {})
        tensors = dict(tensors) | {
            n: tensors[first].T if turned else tensors[first] for n, (first, turned) in tied.items()
        }
        for entry in config["layers"]:
            prefix = f"{entry['name']}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            layers[entry["name"]] = layer_from_state(entry["kind"], entry["config"], own)
        model = cls(layers)
        model._training = checks.check_flag("training", config["training"])
        tree.tie_again(model, {name: first for name, (first, _) in tied.items()})
        return model

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        rows = "".join(f"{os.linesep}  ({name}): {layer!r}" for name, layer in self.named_layers())
        return f"{type(self).__name__}({rows}{os.linesep})"


def _named(layers: tuple[Any, ...]) -> dict[str, Layer]:
    if len(layers) == 1 and isinstance(layers[0], Mapping):
        named = dict(layers[0])
    elif len(layers) == 1 and isinstance(layers[0], list | tuple):
        named = {str(place): layer for place, layer in enumerate(layers[0])}
    else:
        named = {str(place): layer for place, layer in enumerate(layers)}
    if not named:
        raise ValueError("layers must not be empty: give at least one layer")
    for name, layer in named.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"a layer's name must be a string that is not empty and has no dot, got {name!r}")
        if not isinstance(layer, Layer):
            raise TypeError(f"layers[{name!r}] must be a layer such as nblora.Dense, got {type(layer).__name__}")
    return named


def _check_chain(named: Mapping[str, Layer]) -> None:
    if len({id(layer) for layer in named.values()}) < len(named):
        raise ValueError("layers must be distinct objects: clone() a layer to use it twice")
    pairs = list(named.items())
    for (name, layer), (next_name, following) in itertools.pairwise(pairs):
        given, taken = layer._gives, following._takes
        if given is not None and taken is not None and given != taken:
            raise ValueError(f"layer {name!r} has {given} outputs but layer {next_name!r} takes {taken} inputs")
        if layer.dtype != following.dtype:
            raise ValueError(f"layer {name!r} is {layer.dtype} but layer {next_name!r} is {following.dtype}")
