"""PEFT adapters as nblora adapters: linear layers and their factors, ready to compute with or to train on."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from nblora import checks
from nblora.adapters import LoRAAdapter
from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles, open_model
from nblora.formats.peft import PeftAdapter
from nblora.formats.peft_tensors import LoraModule
from nblora.layers import Dense, FullyConnected
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo

PathLike = str | os.PathLike[str]


def load_peft(
    adapter: PathLike,
    base: PathLike,
    *,
    modules: Iterable[str] | None = None,
    dtype: str = "float32",
    activation: str = "identity",
) -> dict[str, LoRAAdapter | Dense]:
    """Read a PEFT adapter and the layers of its base into nblora.

    A DoRA module comes with its norms folded in: with f = m / ‖W + sBA‖ the base becomes f W and B becomes f B, which
    computes the same and is meant for inference. `lora_bias` is folded into the base's bias in the same way.

    Parameters
    ----------
    adapter : path-like
        A PEFT adapter's folder.
    base : path-like
        The checkpoint that it adapts.
    modules : iterable of str, optional
        Names of the modules to read; all by default.
    dtype : {"float32", "float64"}
        What is computed in; 16-bit numbers are widened exactly.
    activation : str
        Of every layer.

    Returns
    -------
    dict of str to LoRAAdapter or Dense
        A `LoRAAdapter` for every adapted module, on a `FullyConnected` (weight (out, in)) or, where the checkpoint
        stores (in, out) as GPT-2 does, on a `Dense`; a plain `FullyConnected` for every linear layer that the adapter
        brings whole (`modules_to_save`).

    Raises
    ------
    FormatError
        If a file is broken, names or shapes do not match, or a module is no linear layer (embedding, convolution).
    ValueError
        If `modules` names a module that the adapter does not have.
    OSError
        If a file cannot be read.
    """
    working = checks.check_dtype(dtype)
    with PeftAdapter(adapter) as opened, open_model(base) as model:
        reader = _Reader(opened, model, working, activation)
        whole = [
            name.removesuffix(".weight") for name, info in opened.replaced.items() if _is_layer(name, info, opened)
        ]
        chosen = list(modules) if modules is not None else [*opened.modules, *whole]
        for name in chosen:
            if name not in opened.modules and name not in whole:
                raise ValueError(
                    f"modules: {name!r} is not in {adapter}; it holds {', '.join([*opened.modules, *whole])}"
                )
        return {name: reader.adapted(name) if name in opened.modules else reader.whole(name) for name in chosen}


def _is_layer(name: str, info: TensorInfo, adapter: PeftAdapter) -> bool:
    return name.endswith(".weight") and len(info.shape) == 2 and name.removesuffix(".weight") not in adapter.modules


class _Reader:
    """Reads layers of one base and one adapter."""

    def __init__(self, adapter: PeftAdapter, model: ModelFiles, dtype: np.dtype, activation: str) -> None:
        self._adapter, self._model, self._tensors = adapter, model, model.tensors
        self._dtype, self._activation = dtype, activation

    def whole(self, name: str) -> FullyConnected:
        """A layer that the adapter replaces."""
        weight = self._read(f"{name}.weight")
        return FullyConnected(self._cast(weight), self._cast(self._bias(name)), activation=self._activation)

    def adapted(self, name: str) -> LoRAAdapter:
        """A layer that the adapter changes by factors."""
        module = self._adapter.modules[name]
        if module.kind != "linear":
            raise FormatError(
                f"{self._adapter.path}: {name} is an adapted {module.kind}; only linear layers become nblora adapters "
                "(nblora merge merges the others too). Choose others with modules=[...]"
            )
        W, transposed = self._oriented(name, module)
        B, A = (self._adapter.file.read_wide(info.name) for info in (module.B, module.A))
        bias, alpha = self._bias(name), module.alpha
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
        layer_type = Dense if transposed else FullyConnected
        stored = self._cast(W.T if transposed else W)
        layer = layer_type(stored, self._cast(bias), activation=self._activation)
        rslora = self._adapter.config.use_rslora and alpha > 0
        return LoRAAdapter.from_factors(layer, self._cast(A.T), self._cast(B.T), alpha, use_rslora=rslora)

    def _oriented(self, name: str, module: LoraModule) -> tuple[np.ndarray, bool]:
        """The base weight as (out, in), and whether it is stored the other way round."""
        weight = self._read(f"{name}.weight")
        expected = module.out_features, module.in_features
        if weight.shape not in (expected, expected[::-1]):
            raise FormatError(
                f"{self._adapter.path}: {name}.weight has shape {weight.shape}; its factors change one of {expected}"
            )
        square = expected[0] == expected[1]
        transposed = self._adapter.config.fan_in_fan_out if square else weight.shape != expected
        return (weight.T if transposed else weight), transposed

    def _bias(self, name: str) -> np.ndarray | None:
        bias = f"{name}.bias"
        return self._read(bias) if bias in self._tensors or bias in self._adapter.replaced else None

    def _read(self, name: str) -> np.ndarray:
        """A parameter as float64: the adapter's where it brings one, else the base's."""
        found: tuple[SafetensorsFile, TensorInfo] | None = self._tensors.get(name)
        if name in self._adapter.replaced:
            found = self._adapter.file, self._adapter.replaced[name]
        if found is None:
            raise FormatError(f"{self._model.path}: holds no {name}, which {self._adapter.path} adapts")
        return found[0].read_wide(found[1].name)

    def _cast(self, array: Any) -> Any:
        return None if array is None else np.ascontiguousarray(array, self._dtype)
