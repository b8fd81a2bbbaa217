"""PEFT adapters as nblora adapters: layers and their factors, ready to compute with or to train on."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, overload

import numpy as np

from nblora import checks
from nblora.adapters import Adapter, Factors, reader_of
from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles, open_model
from nblora.formats.peft import PeftAdapter
from nblora.formats.peft_tensors import LoraModule
from nblora.layers import Conv1d, Conv2d, Dense, Embedding, FullyConnected, Layer, tree
from nblora.layers.conv import Convolution
from nblora.layers.weighted import Weighted
from nblora.models.model import Model
from nblora.storage.safetensors_reader import TensorInfo

PathLike = str | os.PathLike[str]
Network = TypeVar("Network", bound=Model)


@overload
def load_peft(
    adapter: PathLike, base: Network, *, modules: Iterable[str] | None = None, dtype: None = None,
    activation: None = None, settings: None = None,
) -> Network: ...  # fmt: skip


@overload
def load_peft(
    adapter: PathLike, base: PathLike, *, modules: Iterable[str] | None = None, dtype: str | None = None,
    activation: str | None = None, settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Adapter | Weighted]: ...  # fmt: skip


def load_peft(
    adapter: PathLike,
    base: Any,
    *,
    modules: Iterable[str] | None = None,
    dtype: str | None = None,
    activation: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Read a PEFT adapter onto a model, or together with the layers of a checkpoint.

    Each module becomes an adapter of the method that its file names. `lora_bias` is folded into the base's bias.

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
        Of a checkpoint: that of every linear layer and convolution, by default "identity".
    settings : mapping of module names to mappings, optional
        Of a checkpoint: what its file does not say of a convolution, `{"conv1": {"stride": 2, "padding": 1}}`.

    Returns
    -------
    Sequential
        The model, changed in place: its adapted layers, with their activations, are the bases of trainable
        adapters; those that the adapter brings whole (`modules_to_save`) have its weights, and are trained; the
        others are frozen.
    dict of str to adapter or layer
        Of a checkpoint: an adapter, such as a `LoRAAdapter`, for every adapted module, on a `FullyConnected` (weight
        (out, in)) or, where the checkpoint stores (in, out) as GPT-2 does, on a `Dense`, on a `Conv1d`, a `Conv2d` or
        an `Embedding`; a plain `FullyConnected` or convolution for every layer that the adapter brings whole.

    Raises
    ------
    FormatError
        If a file is broken, names or shapes do not match, or a convolution is grouped or has three axes. A model is as
        it was then.
    ValueError
        If `modules` or `settings` names a module that the adapter does not have, or a layer of the model is adapted
        already.
    OSError
        If a file cannot be read.
    """
    if isinstance(base, Model):
        if dtype is not None or activation is not None or settings is not None:
            raise ValueError("dtype, activation and settings are for a checkpoint: a model's layers have their own")
        return _load_into(adapter, base, modules)
    working = checks.check_dtype("float32" if dtype is None else dtype)
    with PeftAdapter(adapter) as opened, open_model(base) as model:
        chosen = "identity" if activation is None else activation
        source = _Checkpoint(opened, model, working, chosen, _check_settings(settings, opened))
        return _read_modules(opened, source, modules)


def _load_into(path: PathLike, model: Network, modules: Iterable[str] | None) -> Network:
    """Put an adapter's modules into the places of a model's layers."""
    slots = {name: (owner, key, owner.children()[key]) for name, owner, key in tree.slots(model, Adapter)}
    with PeftAdapter(path) as opened:
        opened.rename(model._own_names([*opened.modules, *opened.replaced]))
        source = _Layers(opened, {name: layer for name, (_, _, layer) in slots.items()})
        found: dict[str, Layer] = {**_read_modules(opened, source, modules)}
        if modules is None:
            found |= _brought_in_part(opened, source, found)
    for name, (owner, key, layer) in slots.items():
        if name in found:
            found[name]._move(layer._backend)
            found[name]._set_mode(model.training)
            owner._set_child(key, found[name])
        elif not isinstance(layer, Adapter):
            layer.trainable = False
    return model


def _brought_in_part(adapter: PeftAdapter, source: "_Layers", found: Mapping[str, Any]) -> dict[str, Layer]:
    """Layers of which the adapter brings the bias alone (`bias="all"`), frozen, and norms that it brings, trained;
    FormatError for what else is left."""
    layers: dict[str, Layer] = {}
    for parameter, info in adapter.replaced.items():
        name, _, part = parameter.rpartition(".")
        if name in found:
            continue
        plain = source.small(name)
        if part == "bias" and plain is None:
            layers[name] = source.with_bias(name)
            layers[name].trainable = False
        elif plain is not None and part in plain._own_parameters():
            layer = layers.setdefault(name, plain.clone())
            layer.set_parameter(part, adapter.file.read_wide(info.name))
            layer.trainable = True
        else:
            raise FormatError(
                f"{adapter.path}: brings {parameter}, which is no layer's that nblora has: choose with modules=[...]"
            )
    return layers


def _read_modules(
    adapter: PeftAdapter, source: "_Checkpoint | _Layers", modules: Iterable[str] | None
) -> dict[str, Adapter | Weighted]:
    whole = [name.removesuffix(".weight") for name, info in adapter.replaced.items() if _is_layer(name, info, adapter)]
    chosen = list(modules) if modules is not None else [*adapter.modules, *whole]
    for name in chosen:
        if name not in adapter.modules and name not in whole:
            held = ", ".join([*adapter.modules, *whole])
            raise ValueError(f"modules: {name!r} is not in {adapter.path}; it holds {held}")
    reader = _Reader(adapter, source)
    return {name: reader.adapted(name) if name in adapter.modules else reader.whole(name) for name in chosen}


def _is_layer(name: str, info: TensorInfo, adapter: PeftAdapter) -> bool:
    return name.endswith(".weight") and len(info.shape) >= 2 and name.removesuffix(".weight") not in adapter.modules


class _Checkpoint:
    """The layers of a base that is a file."""

    def __init__(
        self,
        adapter: PeftAdapter,
        model: ModelFiles,
        dtype: np.dtype,
        activation: str,
        settings: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._adapter, self._model, self.dtype, self._activation = adapter, model, dtype, activation
        self._settings = settings

    def inputs(self, name: str, module: LoraModule) -> int:
        """Inputs of a linear layer, of which only the outputs are known."""
        shape = self._read(f"{name}.weight").shape
        if len(shape) != 2 or module.out_features not in shape:
            raise _misfit(self._adapter, name, shape, (module.out_features, -1))
        return int(shape[1] if shape[0] == module.out_features else shape[0])

    def weight(self, name: str, module: LoraModule) -> tuple[np.ndarray, bool]:
        """The weight as (out, in), and whether it is stored the other way round."""
        weight = self._read(f"{name}.weight")
        expected = module.out_features, module.in_features
        if module.kind != "linear":
            wanted = (module.out_features, *module.A.shape[1:]) if module.kind == "conv" else expected[::-1]
            if weight.shape != wanted:
                raise _misfit(self._adapter, name, weight.shape, wanted)
            return _matrix(weight, module.kind == "embedding"), False
        if weight.shape not in (expected, expected[::-1]):
            raise _misfit(self._adapter, name, weight.shape, expected)
        square = expected[0] == expected[1]
        transposed = self._adapter.config.fan_in_fan_out if square else weight.shape != expected
        return (weight.T if transposed else weight), transposed

    def bias(self, name: str) -> np.ndarray | None:
        """The bias, where the layer has one."""
        bias = f"{name}.bias"
        return self._read(bias) if bias in self._model.tensors or bias in self._adapter.replaced else None

    def base(
        self, module: LoraModule, weight: np.ndarray, bias: np.ndarray | None, transposed: bool, changed: bool
    ) -> Weighted:
        """The layer of a weight (out, in), stored as the checkpoint has it."""
        if module.kind == "embedding":
            return Embedding(_cast(weight.T, self.dtype))
        if module.kind == "conv":
            return self._convolution(module.name, weight.reshape(len(weight), *module.A.shape[1:]), bias)
        stored = weight.T if transposed else weight
        return (Dense if transposed else FullyConnected)(
            _cast(stored, self.dtype), _cast(bias, self.dtype), activation=self._activation
        )

    def _convolution(self, name: str, weight: np.ndarray, bias: np.ndarray | None) -> Weighted:
        kind = {3: Conv1d, 4: Conv2d}.get(weight.ndim)
        if kind is None:
            raise FormatError(f"{self._adapter.path}: {name} is a convolution along {weight.ndim - 2} axes, not 1 or 2")
        settings = {"activation": self._activation, **self._settings.get(name, {})}
        return kind(_cast(weight, self.dtype), _cast(bias, self.dtype), **settings)

    def whole(self, name: str) -> Weighted:
        """A layer that the adapter replaces."""
        weight, bias = self._read(f"{name}.weight"), self.bias(name)
        if weight.ndim > 2:
            return self._convolution(name, weight, bias)
        return FullyConnected(_cast(weight, self.dtype), _cast(bias, self.dtype), activation=self._activation)

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

    def _layer(self, name: str) -> Weighted:
        if name not in self._layers:
            shown = ", ".join(map(repr, list(self._layers)[:12])) + (", ..." if len(self._layers) > 12 else "")
            raise FormatError(
                f"{self._adapter.path}: adapts {name!r}, but the model has the layers {shown}: name them as the "
                "adapter's base does"
            )
        layer = self._layers[name]
        if isinstance(layer, Adapter):
            raise ValueError(
                f"layer {name!r} has an adapter already, a {type(layer).__name__} of rank {layer.rank}: load into what "
                "model.merge() returns, or into the model as it was before"
            )
        if not isinstance(layer, Weighted):
            raise FormatError(f"{self._adapter.path}: adapts {name!r}, which is a {type(layer).__name__} in the model")
        return layer

    def small(self, name: str) -> Layer | None:
        """The layer of this name where it is one without a weight matrix, a norm for example."""
        layer = self._layers.get(name)
        return layer if layer is not None and not isinstance(layer, Weighted | Adapter) else None

    def inputs(self, name: str, module: LoraModule) -> int:
        return self._layer(name).in_features

    def weight(self, name: str, module: LoraModule) -> tuple[np.ndarray, bool]:
        layer = self._layer(name)
        expected: tuple[int, ...] = (module.out_features, module.in_features)
        if module.kind != _kind(layer):
            raise FormatError(
                f"{self._adapter.path}: adapts {name!r} as {_NAMES[module.kind]}, and the model has a "
                f"{type(layer).__name__} there"
            )
        if module.kind == "conv":
            expected = (module.out_features, *module.A.shape[1:])
        if _shape(layer) != expected:
            raise _misfit(self._adapter, name, _shape(layer), expected)
        return layer.get_parameter("weight").T.astype(np.float64), not layer._transposed

    def bias(self, name: str) -> np.ndarray | None:
        layer = self._layer(name)
        if f"{name}.bias" in self._adapter.replaced:
            return self._adapter.file.read_wide(self._adapter.replaced[f"{name}.bias"].name)
        return layer.get_parameter("bias").astype(np.float64) if "bias" in layer.parameter_names() else None

    def base(
        self, module: LoraModule, weight: np.ndarray, bias: np.ndarray | None, transposed: bool, changed: bool
    ) -> Weighted:
        layer = self._layer(module.name)
        if not changed and f"{module.name}.bias" not in self._adapter.replaced:
            return layer
        return _like(layer, weight, bias)

    def with_bias(self, name: str) -> Weighted:
        """The layer with the adapter's bias."""
        layer = self._layer(name)
        return _like(layer, layer.get_parameter("weight").T, self.bias(name))

    def whole(self, name: str) -> Weighted:
        layer = self._layer(name)
        weight = self._adapter.file.read_wide(self._adapter.replaced[f"{name}.weight"].name)
        if self._adapter.config.fan_in_fan_out and type(layer) is Dense:
            weight = weight.T
        embedding = _kind(layer) == "embedding"
        expected = _shape(layer)[::-1] if embedding else _shape(layer)
        if weight.shape != expected:
            raise _misfit(self._adapter, name, expected, weight.shape)
        return _like(layer, _matrix(weight, embedding), self.bias(name))


_NAMES = {"linear": "a linear layer", "conv": "a convolution", "embedding": "an embedding"}


def _kind(layer: Weighted) -> str:
    """What PEFT calls a layer."""
    return "conv" if isinstance(layer, Convolution) else "embedding" if isinstance(layer, Embedding) else "linear"


def _shape(layer: Weighted) -> tuple[int, ...]:
    """Of its weight, outputs first."""
    return tuple(layer.weight.shape) if isinstance(layer, Convolution) else (layer.out_features, layer.in_features)


def _matrix(weight: np.ndarray, embedding: bool) -> np.ndarray:
    """A weight as PyTorch has it, as (out, in)."""
    return weight.T if embedding else weight.reshape(len(weight), -1)


def _like(layer: Weighted, weight: np.ndarray, bias: np.ndarray | None) -> Weighted:
    """A layer like this one of a weight given as (out, in)."""
    stored = weight if layer._transposed else weight.T
    return type(layer)._made(_cast(stored, layer.dtype), _cast(bias, layer.dtype), layer._config())


def _check_settings(settings: Any, adapter: PeftAdapter) -> Mapping[str, Mapping[str, Any]]:
    if settings is None:
        return {}
    if not isinstance(settings, Mapping) or not all(isinstance(each, Mapping) for each in settings.values()):
        raise TypeError(f"settings must map names of modules to mappings, got {settings!r}")
    known = {*adapter.modules, *(name.removesuffix(".weight") for name in adapter.replaced)}
    for name in settings:
        if name not in known:
            raise ValueError(f"settings: {name!r} is not in {adapter.path}; it holds {', '.join(adapter.modules)}")
    return settings


def _misfit(adapter: PeftAdapter, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> FormatError:
    return FormatError(f"{adapter.path}: {name}.weight has shape {found}; its factors change one of {expected}")


def _cast(array: Any, dtype: np.dtype) -> Any:
    return None if array is None else np.ascontiguousarray(array, dtype)


class _Reader:
    """Makes nblora's layers of one adapter's modules and the layers of its base."""

    def __init__(self, adapter: PeftAdapter, source: _Checkpoint | _Layers) -> None:
        self._adapter, self._source = adapter, source

    def whole(self, name: str) -> Weighted:
        """A layer that the adapter replaces."""
        return self._source.whole(name)

    def adapted(self, name: str) -> Adapter:
        """A layer that the adapter changes by factors."""
        module, config = self._adapter.modules[name], self._adapter.config
        if module.groups != 1:
            raise FormatError(
                f"{self._adapter.path}: {name} is a convolution in {module.groups} groups, which no layer of nblora is "
                "(nblora merge merges it). Choose others with modules=[...]"
            )
        method = reader_of({"peft_type": config.raw["peft_type"], "use_dora": config.use_dora})
        if module.single:
            module = replace(module, inputs=self._source.inputs(name, module))
        W, transposed = self._source.weight(name, module)
        B, A = (self._adapter.file.read_wide(info.name).reshape(info.shape[0], -1) for info in (module.B, module.A))
        if module.single:
            B, A = B.T, method.fixed_factor(module.in_features, module.rank).T
        bias, alpha = self._source.bias(name), module.alpha
        if module.bias:
            if bias is None:
                raise FormatError(f"{self._adapter.path}: lora_bias is set, but the base layer {name} has no bias")
            bias = bias + module.scaling * self._adapter.file.read_wide(module.bias.name)
        if alpha <= 0:  # no strength of an nblora adapter
            B, alpha = B * module.scaling, -1.0
        layer = self._source.base(module, W, bias, transposed, module.bias is not None)
        magnitude = None
        if module.magnitude is not None:
            magnitude = self._adapter.file.read_wide(module.magnitude.name).reshape(-1)
        factors = Factors(A.T, B.T, module.scaling, alpha, magnitude)
        return method._of_factors(layer, factors, config.use_rslora and alpha > 0)
