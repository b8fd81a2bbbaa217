"""`Sequential`: layers and adapters in a row, one of them after the other."""

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from nblora import checks
from nblora.adapters import Adapter, DeltaLoRAAdapter, LoRAAdapter
from nblora.layers.base import Layer, layer_from_state
from nblora.layers.named_parameters import Parameter
from nblora.storage.onnx_graph import OnnxGraph

from .targets import match_names

ADAPTERS: dict[str, Callable[..., Adapter]] = {cls.method: cls for cls in (LoRAAdapter, DeltaLoRAAdapter)}
DEFAULT_ADAPTER = LoRAAdapter.method
"""Wherever none is named: a dense delta makes a layer's state larger than the layer, so it is asked for."""


class Sequential(Layer):
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
        self._open_from_host(first._backend)

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

    def _slots(self, prefix: str = "") -> Iterator[tuple[str, "Sequential", str]]:
        """Every layer that is not itself a model: its dotted name, the model that holds it, and its name there."""
        for name, layer in self.named_layers():
            if isinstance(layer, Sequential):
                yield from layer._slots(f"{prefix}{name}.")
            else:
                yield prefix + name, self, name

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Iterate over pairs of name and layer."""
        return iter(self._layers.items())

    # --- computing ---------------------------------------------------------------------------------------------

    def forward(self, x: Any) -> np.ndarray:
        x, on_device = self._enter("x", x, self.in_features)
        for layer in self:
            x = layer.forward(x)
        return self._leave(x, on_device)

    def backward(self, grad_output: Any, accumulate: bool = False) -> np.ndarray:
        self._require_forward()
        grad, on_device = self._enter("grad_output", grad_output, self.out_features)
        for layer in reversed(self._layers.values()):
            grad = layer.backward(grad, accumulate)
        return self._leave(grad, on_device)

    def _sweep(self, grad_output: Any, lr: float, delta_lr: float) -> np.ndarray:
        grad, on_device = self._enter("grad_output", grad_output, self.out_features)
        for layer in reversed(self._layers.values()):
            grad = layer._sweep(grad, lr, delta_lr)
        return self._leave(grad, on_device)

    def backward_update(self, grad_output: Any, lr: float) -> np.ndarray:
        checks.check_not_negative("lr", lr)
        self._check_trainable_memory()
        self._require_forward()
        grad, on_device = self._enter("grad_output", grad_output, self.out_features)
        for layer in reversed(self._layers.values()):
            grad = layer.backward_update(grad, lr)
        return self._leave(grad, on_device)

    def _add_to_onnx(self, graph: OnnxGraph, x: str) -> str:
        for layer in self:
            x = layer._add_to_onnx(graph, x)
        return x

    def _apply_gradients(self, lr: float) -> None:
        for layer in self:
            layer._apply_gradients(lr)

    def _apply_momentum(self, lr: float) -> None:
        for layer in self:
            layer._apply_momentum(lr)

    def _require_forward(self) -> None:
        for layer in self:
            layer._require_forward()

    def _forget_forward(self) -> None:
        for layer in self:
            layer._forget_forward()

    def _forget_gradients(self) -> None:
        for layer in self:
            layer._forget_gradients()

    def _sequence(self) -> Iterator[tuple[str, Layer]]:
        for name, layer in self.named_layers():
            for inner, leaf in layer._sequence():
                yield (f"{name}.{inner}" if inner else name), leaf

    def _generators(self) -> dict[str, np.random.Generator]:
        return {
            f"{name}.{inner}" if inner else name: generator
            for name, layer in self.named_layers()
            for inner, generator in layer._generators().items()
        }

    # --- parameters and gradients ------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[Parameter]:
        for name, layer in self.named_layers():
            for parameter in layer._parameters():
                yield parameter._replace(name=f"{name}.{parameter.name}")

    def _held_gradients(self) -> dict[str, Any]:
        return {
            f"{name}.{key}": gradient
            for name, layer in self.named_layers()
            for key, gradient in layer._held_gradients().items()
        }

    def zero_gradients(self) -> None:
        for layer in self:
            layer.zero_gradients()

    # --- modes -------------------------------------------------------------------------------------------------

    def train(self) -> Self:
        for layer in self:
            layer.train()
        return super().train()

    def eval(self) -> Self:
        for layer in self:
            layer.eval()
        return super().eval()

    def reset_state(self) -> None:
        for layer in self:
            layer.reset_state()

    def _pieces(self, frozen: bool) -> Iterator[tuple[Layer, tuple[str, ...], tuple[str, ...]]]:
        for layer in self:
            yield from layer._pieces(frozen)
        yield self, (), ()

    # --- adapters ----------------------------------------------------------------------------------------------

    def adapt(
        self,
        target: Any,
        adapter: str = DEFAULT_ADAPTER,
        *,
        rank: int,
        lower_rank: bool = False,
        modules_to_save: Any = None,
        seed: int | np.random.Generator | None = None,
        **settings: Any,
    ) -> Self:
        """Wrap the layers that `target` names in new adapters, in place, and return self.

        As in PEFT, every other layer is frozen, but for those that `modules_to_save` names (a new head, say).

        Parameters
        ----------
        target : str, compiled expression, int, or a list of them
            Names (dotted inside nested models), fnmatch patterns (`"hidden*"`), regular expressions that match whole
            names, or places.
        adapter : {"lora", "delta"}
            Which adapter.
        rank : int
            Of every new adapter.
        lower_rank : bool
            Give a layer that is too small for `rank` the largest that it can have, with a warning that names it. By
            default that is an error.
        modules_to_save : like `target`, optional
            Layers to train as they are.
        seed : int or Generator, optional
            Each adapter draws from its own child of it.
        **settings
            The adapter's other arguments: `alpha`, `delta_scaling`, `momentum_factor`, `lora_dropout`, ...

        Raises
        ------
        ValueError
            For a pattern that matches no layer (the message lists the names), for a layer that is adapted already,
            and for one that is too small for `rank`. Nothing is changed then.
        """
        kind = ADAPTERS[checks.check_choice("adapter", adapter, tuple(ADAPTERS))]
        slots = {name: (owner, key) for name, owner, key in self._slots()}
        names = list(slots)
        chosen = match_names("target", target, names)
        trained = [] if modules_to_save is None else match_names("modules_to_save", modules_to_save, names)
        both = sorted(set(chosen) & set(trained))
        if both:
            raise ValueError(f"target and modules_to_save both name {', '.join(both)}: a layer is one or the other")
        _check_plain({name: slots[name][0][slots[name][1]] for name in (*chosen, *trained)})
        children = np.random.default_rng(seed).spawn(len(chosen))
        new = {}
        for name, child in zip(chosen, children, strict=True):
            owner, key = slots[name]
            new[name] = kind(owner[key], _rank_of(name, owner[key], rank, lower_rank), seed=child, **settings)
        for name, (owner, key) in slots.items():
            if name in new:
                owner._layers[key] = new[name].train() if self.training else new[name].eval()
            elif not isinstance(owner[key], Adapter):
                owner[key].trainable = name in trained
        return self

    def merge(self) -> "Sequential":
        """Return a plain model, with every adapter merged into a new layer; it shares no memory with this one."""
        return Sequential({name: _merged(layer) for name, layer in self.named_layers()})

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Compute the base layers alone inside the `with` block."""
        with contextlib.ExitStack() as stack:
            for layer in self:
                if isinstance(layer, Adapter | Sequential):
                    stack.enter_context(layer.disable_adapter())
            yield self

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all, and their share, as PEFT does.

        A dense delta counts among both, so a share above 50 % is possible.
        """
        trainable = self.parameter_count
        total = sum(int(np.prod(p.shape)) for p in self._parameters() if not p.optional)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # --- describing and keeping --------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, Any]:
        """Return a flat dict: the model's sizes and counts, then each layer's figures under its name."""
        described = {name: layer.diagnostics() for name, layer in self.named_layers()}
        result: dict[str, Any] = {
            "type": type(self).__name__,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": self.dtype.name,
            "device": self.device,
            "layer_count": len(self),
            "parameter_count": self.parameter_count,
            "non_finite_count": sum(figures["non_finite_count"] for figures in described.values()),
        }
        for name, figures in described.items():
            result.update({f"{name}.{key}": value for key, value in figures.items()})
        return result

    def _config(self) -> dict[str, Any]:
        layers = [
            {"name": name, "kind": type(layer).__name__, "config": layer._config()}
            for name, layer in self.named_layers()
        ]
        return {"layers": layers, "training": self.training}

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        layers = {}
        for entry in config["layers"]:
            prefix = f"{entry['name']}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            layers[entry["name"]] = layer_from_state(entry["kind"], entry["config"], own)
        model = cls(layers)
        model._training = checks.check_flag("training", config["training"])
        return model

    def close(self) -> None:
        """Close every layer, then the model."""
        for layer in self.__dict__.get("_layers", {}).values():
            layer.close()
        super().close()

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        rows = "".join(f"{os.linesep}  ({name}): {layer!r}" for name, layer in self.named_layers())
        return f"{type(self).__name__}({rows}{os.linesep})"


def _check_plain(layers: Mapping[str, Layer]) -> None:
    """ValueError where an adapter is among the layers to adapt, or to train as they are."""
    for name, layer in layers.items():
        if isinstance(layer, Adapter):
            raise ValueError(
                f"layer {name!r} has an adapter already, a {type(layer).__name__} of rank {layer.rank}: train that one "
                "on, name other layers, or adapt what model.merge() returns, where it is part of the weight"
            )


def _rank_of(name: str, layer: Layer, rank: int, lower: bool) -> int:
    """`rank`, or the largest that a small layer can have, where `lower` allows it."""
    largest = min(layer.in_features, layer.out_features)
    small = f"layer {name!r} maps {layer.in_features} to {layer.out_features} features"
    if not checks.check_flag("lower_rank", lower):
        remedy = f"{small}; take a lower rank, leave that layer out of target, or pass lower_rank=True"
        return checks.check_integer("rank", rank, 1, largest, remedy)
    asked = checks.check_integer("rank", rank, 1)
    if asked > largest:
        warnings.warn(f"{small}, so its adapter has rank {largest} instead of {asked}", UserWarning, stacklevel=3)
    return min(asked, largest)


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
        if layer.out_features != following.in_features:
            raise ValueError(
                f"layer {name!r} has {layer.out_features} outputs but layer {next_name!r} takes "
                f"{following.in_features} inputs"
            )
        if layer.dtype != following.dtype:
            raise ValueError(f"layer {name!r} is {layer.dtype} but layer {next_name!r} is {following.dtype}")


def _merged(layer: Layer) -> Layer:
    if isinstance(layer, Adapter):
        return layer.merge_to_original_layer()
    if isinstance(layer, Sequential):
        return layer.merge()
    return layer.clone()
