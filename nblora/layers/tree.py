"""The tree of a layer: the only place that walks it.

Names are dotted; a child called "" adds nothing to them, so that an adapter's factors are named as its own.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .parameters import Named, Parameter

if TYPE_CHECKING:
    from .base import Layer


class Node(NamedTuple):
    """A layer in a tree: its name, and whether something above keeps it from being trained."""

    name: str
    layer: "Layer"
    frozen: bool

    @property
    def trains(self) -> bool:
        """Whether the layer's own parameters are trained."""
        return self.layer.trainable and not self.frozen


def join(*names: str) -> str:
    """A dotted name of its parts."""
    return ".".join(filter(None, names))


def walk(layer: "Layer", name: str = "", frozen: bool = False) -> Iterator[Node]:
    """Every layer of the tree, the root first."""
    yield Node(name, layer, frozen)
    for key, child in layer.children().items():
        yield from walk(child, join(name, key), frozen or layer._freezes(key))


def parameters(layer: "Layer") -> Iterator[Named]:
    """Every parameter of the tree, those of children first; one that several layers hold by the first of its names,
    trained where any of them trains it."""
    found = list(held(layer))
    trained_somewhere = {named.parameter for named in found if named.parameter.shared and named.trainable}
    seen = set()
    for named in found:
        parameter = named.parameter
        if not parameter.shared:
            yield named
        elif parameter not in seen:
            seen.add(parameter)
            yield named._replace(trainable=parameter in trained_somewhere)


def held(layer: "Layer", name: str = "", frozen: bool = False) -> Iterator[Named]:
    """Every parameter by every layer that holds it, those of children first."""
    for key, child in layer.children().items():
        yield from held(child, join(name, key), frozen or layer._freezes(key))
    trained = layer.trainable and not frozen
    for key, parameter in layer._own_parameters().items():
        yield Named(join(name, key), parameter, trained and not parameter.state)


def trainable(layer: "Layer") -> Iterator[Named]:
    """Every trained parameter, in the order of `parameters`."""
    return (named for named in parameters(layer) if named.trainable)


def trained(layer: "Layer", found: list[Parameter]) -> list[Parameter]:
    """`found` and every trained parameter, without their names, which would cost a tenth of a tiny step."""
    for key, child in layer.children().items():
        if not layer._freezes(key):
            trained(child, found)
    if layer.trainable:
        for parameter in layer._own_parameters().values():
            if not parameter.state and not (parameter.shared and parameter in found):
                found.append(parameter)
    return found


def ties(layer: "Layer") -> dict[str, str]:
    """Further names of shared parameters, each with the first one."""
    first: dict[Parameter, str] = {}
    result = {}
    for name, parameter, _ in held(layer):
        if parameter.shared and first.setdefault(parameter, name) != name:
            result[name] = first[parameter]
    return result


def turned(layer: "Layer") -> set[str]:
    """Names of shared parameters that their layer takes for the transpose of what their logical shape says."""
    return {
        join(node.name, key)
        for node in walk(layer)
        for key, parameter in node.layer._own_parameters().items()
        if parameter.shared and node.layer._turns(parameter)
    }


def tie_again(layer: "Layer", names: Mapping[str, str]) -> None:
    """Make one parameter of those that `ties` named, where the layers that hold them are still there."""
    layers: dict[str, Any] = {node.name: node.layer for node in walk(layer)}
    for name, first in names.items():
        owner, source = layers.get(owner_of(name)), layers.get(owner_of(first))
        if owner is not None and source is not None:
            owner._tie(source)


def owner_of(name: str) -> str:
    """The name of the layer that holds a parameter of this one."""
    return name.rpartition(".")[0]


def changing(layer: "Layer") -> Iterator[Named]:
    """Every parameter that training changes: the trained ones, and the state of those that have one."""
    return (named for named in parameters(layer) if named.trainable or named.parameter.state)


def units(layer: "Layer", name: str = "") -> Iterator[tuple[str, "Layer"]]:
    """The layers that compute something of their own, with their names: an adapter and its base are one."""
    parts = layer._parts()
    if not parts or layer._computes:
        yield name, layer
    for key, part in parts.items():
        yield from units(part, join(name, key))


def generators(layer: "Layer") -> dict[str, np.random.Generator]:
    """The random generators that forwards draw from, by the name of their layer."""
    return {name: part._rng for name, part, _ in walk(layer) if part._rng is not None}


def modes(layer: "Layer") -> list[tuple["Layer", bool]]:
    """Whether each layer is in training mode."""
    return [(part, part.training) for _, part, _ in walk(layer)]


def slots(layer: "Layer", stop: type, name: str = "") -> Iterator[tuple[str, "Layer", str]]:
    """Every place that holds a layer without children, or one of the kind `stop`: its dotted name, owner and key."""
    for key, child in layer.children().items():
        if isinstance(child, stop) or not child.children():
            yield join(name, key), layer, key
        else:
            yield from slots(child, stop, join(name, key))


def rebuilt(layer: "Layer", kind: type, replace: Any) -> "Layer":
    """A tree of the same containers around copies of its layers, with `replace(layer)` for every layer of `kind`."""
    if isinstance(layer, kind):
        return replace(layer)
    children = layer.children()
    if not children:
        return layer.clone()
    return layer._around({key: rebuilt(child, kind, replace) for key, child in children.items()})
