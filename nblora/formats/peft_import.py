"""PEFT adapters as nblora adapters: linear layers and their factors, ready to compute with or to train on."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, overload

import numpy as np

from nblora import checks
from nblora.adapters import Adapter, LoRAAdapter
from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles, open_model
from nblora.formats.peft import PeftAdapter
from nblora.formats.peft_tensors import LoraModule
from nblora.layers import Dense, FullyConnected, Layer, tree
from nblora.models.model import Model
from nblora.storage.safetensors_reader import TensorInfo

PathLike = str | os.PathLike[str]
Network = TypeVar("Network", bound=Model)


@overload
def load_peft(
    adapter: PathLike, base: Network, *, modules: Iterable[str] | None = None, dtype: None = None,
    activation: None = None,
) -> Network: ...  # fmt: skip


@overload
def load_peft(
    adapter: PathLike, base: PathLike, *, modules: Iterable[str] | None = None, dtype: str | None = None,
    activation: str | None = None,
) -> dict[str, LoRAAdapter | Dense]: ...  # fmt: skip


def load_peft(
    adapter: PathLike,
    base: Any,
    *,
    modules: Iterable[str] | None = None,
    dtype: str | None = None,
    activation: str | None = None,
) -> Any:
    """Read a PEFT adapter onto a model, or together with the layers of a checkpoint.

    A DoRA module comes with its norms folded in: with f = m / ‖W + sBA‖ the base becomes f W and B becomes f B, which
    computes the same and is meant for inference. `lora_bias` is folded into the base's bias in the same way.

    Parameters
    ----------
    adapter : path-like
        A PEFT adapter's folder.
    base : Sequential, or path-like
        The model that it adapts, whose layers bear the names of the adapter's modules; or a checkpoint.
    modules : iterable of str, optional
        Names of the modules to read; all by default.
    dtype : {"float32", "float64"}, optional
        Of a checkpoint: what is computed in, by default float32; 16-bit numbers are widened exactly.
    activation : str, optional
        Of a checkpoint: that of every layer, by default "identity".

    Returns
    -------
    Sequential
        The model, changed in place: its adapted layers, with their activations, are the bases of trainable
        `LoRAAdapter`s; those that the adapter brings whole (`modules_to_save`) have its weights, and are trained; the
        others are frozen.
    dict of str to LoRAAdapter or Dense
        Of a checkpoint: a `LoRAAdapter` for every adapted module, on a `FullyConnected` (weight (out, in)) or, where
        the checkpoint stores (in, out) as GPT-2 does, on a `Dense`; a plain `FullyConnected` for every linear layer
        that the adapter brings whole.

    Raises
    ------
    FormatError
        If a file is broken, names or shapes do not match, or a module is no linear layer (embedding, convolution).
        A model is as it was then.
    ValueError
        If `modules` names a module that the adapter does not have, or a layer of the model is adapted already.
    OSError
        If a file cannot be read.
    """
    if isinstance(base, Model):
        if dtype is not None or activation is not None:
            raise ValueError("dtype and activation are for a checkpoint: a model's layers have their own")
        return _load_into(adapter, base, modules)
    working = checks.check_dtype("float32" if dtype is None else dtype)
    with PeftAdapter(adapter) as opened, open_model(base) as model:
        source = _Checkpoint(opened, model, working, "identity" if activation is None else activation)
        return _read_modules(opened, source, modules)


def _load_into(path: PathLike, model: Network, modules: Iterable[str] | None) -> Network:
    """Put an adapter's modules into the places of a model's layers."""
    slots = {name: (owner, key, owner.children()[key]) for name, owner, key in tree.slots(model, Adapter)}
    with PeftAdapter(path) as opened:
        source = _Layers(opened, {name: layer for name, (_, _, layer) in slots.items()})
        found: dict[str, Dense | LoRAAdapter] = {**_read_modules(opened, source, modules)}
        if modules is None:
            found |= _with_their_biases(opened, source, found)
    for name, (owner, key, layer) in slots.items():
        if name in found:
            found[name]._move(layer._backend)
            found[name]._set_mode(model.training)
            owner._set_child(key, found[name])
        elif not isinstance(layer, Adapter):
            layer.trainable = False
    return model


def _with_their_biases(adapter: PeftAdapter, source: "_Layers", found: Mapping[str, Any]) -> dict[str, Dense]:
    """Layers of which the adapter brings the bias alone (`bias="all"`), frozen; FormatError for what else is left."""
    layers = {}
    for parameter in adapter.replaced:
        name, _, part = parameter.rpartition(".")
        if name in found:
            continue
        if part != "bias":
            raise FormatError(
                f"{adapter.path}: brings {parameter}, which is no linear layer's: choose with modules=[...]"
            )
        layers[name] = source.with_bias(name)
        layers[name].trainable = False
    return layers


def _read_modules(
    adapter: PeftAdapter, source: "_Checkpoint | _Layers", modules: Iterable[str] | None
) -> dict[str, LoRAAdapter | Dense]:
    whole = [name.removesuffix(".weight") for name, info in adapter.replaced.items() if _is_layer(name, info, adapter)]
    chosen = list(modules) if modules is not None else [*adapter.modules, *whole]
    for name in chosen:
        if name not in adapter.modules and name not in whole:
            held = ", ".join([*adapter.modules, *whole])
            raise ValueError(f"modules: {name!r} is not in {adapter.path}; it holds {held}")
    reader = _Reader(adapter, source)
    return {name: reader.adapted(name) if name in adapter.modules else reader.whole(name) for name in chosen}


def _is_layer(name: str, info: TensorInfo, adapter: PeftAdapter) -> bool:
    return name.endswith(".weight") and len(info.shape) == 2 and name.removesuffix(".weight") not in adapter.modules


class _Checkpoint:
    """The layers of a base that is a file."""

    def __init__(self, adapter: PeftAdapter, model: ModelFiles, dtype: np.dtype, activation: str) -> None:
        self._adapter, self._model, self.dtype, self._activation = adapter, model, dtype, activation

    def weight(self, name: str, module: LoraModule) -> tuple[np.ndarray, bool]:
        """The weight as (out, in), and whether it is stored the other way round."""
        weight = self._read(f"{name}.weight")
        expected = module.out_features, module.in_features
        if weight.shape not in (expected, expected[::-1]):
            raise _misfit(self._adapter, name, weight.shape, expected)
        square = expected[0] == expected[1]
        transposed = self._adapter.config.fan_in_fan_out if square else weight.shape != expected
        return (weight.T if transposed else weight), transposed

    def bias(self, name: str) -> np.ndarray | None:
        """The bias, where the layer has one."""
        bias = f"{name}.bias"
        return self._read(bias) if bias in self._model.tensors or bias in self._adapter.replaced else None

    def base(self, name: str, weight: np.ndarray, bias: np.ndarray | None, transposed: bool, changed: bool) -> Dense:
        """The layer of a weight (out, in), stored as the checkpoint has it."""
        return _layer(Dense if transposed else FullyConnected, weight, bias, self._activation, self.dtype)

    def whole(self, name: str) -> Dense:
        """A layer that the adapter replaces."""
        weight = self._read(f"{name}.weight")
        return _layer(FullyConnected, weight, self.bias(name), self._activation, self.dtype)

    def _read(self, name: str) -> np.ndarray:
        """A parameter as float64: the adapter's where it brings one, else the base's."""
        if name in self._adapter.replaced:
            return self._adapter.file.read_wide(self._adapter.replaced[name].name)
        if name not in self._model.tensors:
            raise FormatError(f"{self._model.path}: holds no {name}, which {self._adapter.path} adapts")
        file, info = self._model.tensors[name]
        return file.read_wide(info.name)


class _Layers:
    """The layers of a base that is a model, by name."""

    def __init__(self, adapter: PeftAdapter, layers: Mapping[str, Layer]) -> None:
        self._adapter, self._layers = adapter, layers

    def _layer(self, name: str) -> Dense:
        if name not in self._layers:
            raise FormatError(
                f"{self._adapter.path}: adapts {name!r}, but the model has the layers "
                f"{', '.join(map(repr, self._layers))}: name them as the adapter's base does"
            )
        layer = self._layers[name]
        if isinstance(layer, Adapter):
            raise ValueError(
                f"layer {name!r} has an adapter already, a {type(layer).__name__} of rank {layer.rank}: load into what "
                "model.merge() returns, or into the model as it was before"
            )
        if not isinstance(layer, Dense):
            raise FormatError(f"{self._adapter.path}: adapts {name!r}, which is a {type(layer).__name__} in the model")
        return layer

    def weight(self, name: str, module: LoraModule) -> tuple[np.ndarray, bool]:
        layer = self._layer(name)
        expected = module.out_features, module.in_features
        if (layer.out_features, layer.in_features) != expected:
            raise _misfit(self._adapter, name, (layer.out_features, layer.in_features), expected)
        return layer.get_parameter("weight").T.astype(np.float64), not isinstance(layer, FullyConnected)

    def bias(self, name: str) -> np.ndarray | None:
        layer = self._layer(name)
        if f"{name}.bias" in self._adapter.replaced:
            return self._adapter.file.read_wide(self._adapter.replaced[f"{name}.bias"].name)
        return layer.get_parameter("bias").astype(np.float64) if "bias" in layer.parameter_names() else None

    def base(self, name: str, weight: np.ndarray, bias: np.ndarray | None, transposed: bool, changed: bool) -> Dense:
        layer = self._layer(name)
        if not changed and f"{name}.bias" not in self._adapter.replaced:
            return layer
        return _layer(type(layer), weight, bias, layer.activation, layer.dtype)

    def with_bias(self, name: str) -> Dense:
        """The layer with the adapter's bias."""
        layer = self._layer(name)
        weight = layer.get_parameter("weight").T
        return _layer(type(layer), weight, self.bias(name), layer.activation, layer.dtype)

    def whole(self, name: str) -> Dense:
        layer = self._layer(name)
        weight = self._adapter.file.read_wide(self._adapter.replaced[f"{name}.weight"].name)
        if self._adapter.config.fan_in_fan_out and not isinstance(layer, FullyConnected):
            weight = weight.T
        if weight.shape != (layer.out_features, layer.in_features):
            raise _misfit(self._adapter, name, (layer.out_features, layer.in_features), weight.shape)
        return _layer(type(layer), weight, self.bias(name), layer.activation, layer.dtype)


def _layer(kind: type[Dense], weight: np.ndarray, bias: np.ndarray | None, activation: str, dtype: np.dtype) -> Dense:
    """A layer of a weight given as (out, in)."""
    stored = weight if issubclass(kind, FullyConnected) else weight.T
    return kind(_cast(stored, dtype), _cast(bias, dtype), activation=activation)


def _misfit(adapter: PeftAdapter, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> FormatError:
    return FormatError(f"{adapter.path}: {name}.weight has shape {found}; its factors change one of {expected}")


def _cast(array: Any, dtype: np.dtype) -> Any:
    return None if array is None else np.ascontiguousarray(array, dtype)


class _Reader:
    """Makes nblora's layers of one adapter's modules and the layers of its base."""

    def __init__(self, adapter: PeftAdapter, source: _Checkpoint | _Layers) -> None:
        self._adapter, self._source = adapter, source

    def whole(self, name: str) -> Dense:
        """A layer that the adapter replaces."""
        return self._source.whole(name)

    def adapted(self, name: str) -> LoRAAdapter:
        """A layer that the adapter changes by factors."""
        module = self._adapter.modules[name]
        if module.kind != "linear":
            raise FormatError(
                f"{self._adapter.path}: {name} is an adapted {module.kind}; only linear layers become nblora adapters "
                "(nblora merge merges the others too). Choose others with modules=[...]"
            )
        W, transposed = self._source.weight(name, module)
        B, A = (self._adapter.file.read_wide(info.name) for info in (module.B, module.A))
        bias, alpha = self._source.bias(name), module.alpha
        if module.bias:
            if bias is None:
                raise FormatError(f"{self._adapter.path}: lora_bias is set, but the base layer {name} has no bias")
            bias = bias + module.scaling * self._adapter.file.read_wide(module.bias.name)
        if module.magnitude:
            magnitude = self._adapter.file.read_wide(module.magnitude.name).reshape(-1)
            factor = (magnitude / np.linalg.norm(W + module.scaling * B @ A, axis=1))[:, None]
            W, B = factor * W, factor * B
        if alpha <= 0:  # no strength of an nblora adapter
            B, alpha = B * module.scaling, -1.0
        changed = module.bias is not None or module.magnitude is not None
        layer = self._source.base(name, W, bias, transposed, changed)
        rslora = self._adapter.config.use_rslora and alpha > 0
        factors = _cast(A.T, layer.dtype), _cast(B.T, layer.dtype)
        return LoRAAdapter.from_factors(layer, *factors, alpha, use_rslora=rslora)
