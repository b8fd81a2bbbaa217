"""Files of pretrained models: adapters for PEFT, and folders for transformers; each is read back and compared."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.adapters import Adapter, reader_of
from nblora.errors import FormatError
from nblora.formats import save_peft
from nblora.formats.model_files import open_model
from nblora.formats.peft_export import NO_TARGET, ExportedModule
from nblora.formats.replace import check_output, replace_folder
from nblora.formats.rounding import narrow
from nblora.layers import Dense, Layer, tree
from nblora.layers.conv import Convolution
from nblora.layers.weighted import Weighted
from nblora.storage.dtypes import BY_NAME
from nblora.storage.safetensors_writer import write_safetensors
from nblora.training.run import restore_modes

from .gguf_tokenizer import write_tokenizer

PathLike = str | os.PathLike[str]
_TASK_TYPES = {
    "sequence-classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "embedding": "FEATURE_EXTRACTION",
    "image-classification": None,
}
_LARGEST_BUFFER = 1 << 20  # bytes: GPT-2's old masks are larger, and nobody reads them
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""How far outputs may lie apart, as a share of the largest: rounding of the stored numbers, through all layers."""


def save_adapter(
    model: Any, folder: PathLike, fold_delta: int | None, dtype: str | None, force: bool
) -> list[ExportedModule]:
    """See `PretrainedModel.save_adapter`."""
    slots = dict(model.named_layers())
    adapters = {name: layer for name, layer in slots.items() if isinstance(layer, Adapter)}
    whole = [n for n, layer in slots.items() if n not in adapters and layer.trainable and any(layer._own_parameters())]
    heads = {*model.head.own, *model._origin.drawn}
    if not adapters and not (whole and heads.issuperset(whole)):  # a trained head alone is one too
        raise ValueError("the model has no adapter to save: adapt(...) or load_adapter(...) makes them")
    exported = save_peft(
        model, folder, fold_delta=fold_delta, dtype=dtype, config=_config(model, adapters, whole), force=force
    )
    _compare_adapter(model, folder, slots, fold_delta, dtype)
    return exported


def _config(model: Any, adapters: Mapping[str, Adapter], whole: list[str]) -> dict[str, Any]:
    """What PEFT's file says beside ranks: that of the folder which the adapter came from, or a new one."""
    if model._adapter_config is not None:
        return dict(model._adapter_config)
    names = model._peft_names(list(adapters))
    dropouts = {adapter.lora_dropout for adapter in adapters.values()}
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[model.task],
        "base_model_name_or_path": model._origin.folder or None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(type(adapter.base_layer) is Dense for adapter in adapters.values()),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "init_lora_weights": True,
        "target_modules": _shortest(list(names.values()), _all_names(model)) if names else NO_TARGET,
        "modules_to_save": _blocks(model, whole) or None,
    }


def _all_names(model: Any) -> list[str]:
    return list(model._peft_names([name for name, _ in model.named_layers()]).values())


def _shortest(names: list[str], others: list[str]) -> list[str]:
    """The fewest ends of dotted names that mean these layers and no other."""
    chosen, left = set(names), list(names)
    ends: list[str] = []
    while left:
        parts = left[0].split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            meant = {name for name in others if name == end or name.endswith(f".{end}")}
            if meant <= chosen:
                break
        ends.append(end)
        left = [name for name in left if name not in meant]
    return ends


def _blocks(model: Any, whole: list[str]) -> list[str]:
    """Names of layers; of a head with several layers of one block, that of the block, as PEFT trains it."""
    names = model._peft_names(whole)
    heads = [name for name in whole if name in model.head.own]
    blocks = [name.partition(".")[0] for name in heads]
    return list(dict.fromkeys(
        names[name].partition(".")[0] if name in heads and blocks.count(name.partition(".")[0]) > 1 else names[name]
        for name in whole
    ))  # fmt: skip


def _compare_adapter(model: Any, folder: PathLike, slots: Mapping[str, Layer], fold: int | None, dtype: Any) -> None:
    """Load what was written on the same base, and compare outputs: with deltas as far as they were folded."""
    plain = {name: layer.base_layer if isinstance(layer, Adapter) else layer for name, layer in slots.items()}
    flags = [(layer, layer.trainable) for layer in plain.values()]
    probe = model._probe()
    try:
        found = _outputs(model._with(plain).load_adapter(folder), probe)
        less = _less_written(slots, fold)
        wanted = _outputs(model._with({**slots, **less}) if less else model, probe)
    finally:
        for layer, trainable in flags:
            layer.trainable = trainable
        model._set_mode(model.training)
    _require_near(found, wanted, dtype or model.dtype.name, folder)


def _less_written(slots: Mapping[str, Layer], fold: int | None) -> dict[str, Layer]:
    """What a file holds of the adapters of which it holds less than there is; they share their bases."""
    result: dict[str, Layer] = {}
    for name, layer in slots.items():
        if isinstance(layer, Adapter) and (factors := layer.as_factors(fold)).dense_error:
            read = reader_of(layer.peft_fields)
            result[name] = read._of_factors(layer.base_layer, factors, layer.lora_layer.use_rslora)
    return result


def _outputs(model: Any, probe: Any) -> np.ndarray:
    modes = tree.modes(model)
    try:
        model.eval()
        return model(probe)
    finally:
        restore_modes(modes)


def _require_near(found: np.ndarray, wanted: np.ndarray, dtype: str, path: PathLike) -> None:
    largest = float(np.abs(wanted).max(initial=0))
    apart = float(np.abs(found - wanted).max(initial=0))
    if not apart <= _TOLERANCE[dtype] * max(largest, 1e-30):
        raise FormatError(
            f"{path}: what was written computes something else than the model: outputs differ by {apart:.3g}, the "
            f"largest being {largest:.3g}. This is a fault of nblora or of the disk; the folder should not be used"
        )


# --- whole models ------------------------------------------------------------------------------------------------


def save_pretrained(model: Any, folder: PathLike, dtype: str | None, force: bool) -> None:
    """See `PretrainedModel.save_pretrained`."""
    if any(isinstance(layer, Adapter) for _, layer in model.named_layers()):
        raise ValueError(
            "the model has adapters, which such a folder cannot hold: save what merge() returns, or save_adapter(...)"
        )
    stored = checks.check_choice("dtype", model.dtype.name if dtype is None else dtype, list(BY_NAME))
    target, origin = Path(folder), model._origin
    source = Path(origin.folder) if origin.folder else None
    sources = [] if source is None else [source]
    check_output(target, sources, {"model.safetensors", "config.json"}, force)
    names = _names_in_file(model)
    arrays = stored_tensors(model)
    tensors = {names[name]: _as_stored(arrays.pop(name), stored) for name in list(arrays)}
    with replace_folder(target) as hidden:
        if source is not None and source.is_dir():
            tensors |= _companions(model, source, hidden)
        elif source is not None and source.is_file():
            write_tokenizer(source, hidden)
        write_safetensors(hidden / "model.safetensors", tensors, {"format": "pt"})
        with open(hidden / "config.json", "w", encoding="utf-8") as file:
            json.dump(_config_of(model, stored), file, indent=2, sort_keys=True)
            file.write("\n")
    _compare_model(model, target, stored)


def stored_tensors(model: Any) -> dict[str, np.ndarray]:
    """Every parameter by its own name, in the layout of checkpoints."""
    layers = dict(model.named_layers())
    result = {}
    for name, _, _ in model._parameters():
        owner, _, part = name.rpartition(".")
        layer, array = layers[owner], model.get_parameter(name)
        if isinstance(layer, Weighted) and part == "weight" and layer._transposed:
            array = array.T
            if isinstance(layer, Convolution):
                array = array.reshape(layer.weight.shape)
        result[name] = array
    return result


def _names_in_file(model: Any) -> dict[str, str]:
    """What the file calls each parameter: as the source did, unless it lacked a head."""
    own = [name for name, _, _ in model._parameters()]
    known = model._origin.names
    return {name: known[name] for name in own} if all(name in known for name in own) else {name: name for name in own}


def _config_of(model: Any, stored: str) -> dict[str, Any]:
    config = model.config
    config["architectures"] = [model._family.architecture(model.task)]
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = stored
    if "dtype" not in config and "torch_dtype" not in config:
        config["torch_dtype"] = stored
    return config


def _as_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(array) if array.dtype == dtype else narrow(array.astype(np.float64), BY_NAME[dtype])


def _companions(model: Any, source: Path, hidden: Path) -> dict[str, np.ndarray]:
    """Take along every other file of the source's folder: tokenizer, pooling, licences; return its small buffers."""
    with open_model(source) as files:
        for path in files.companions:
            place = hidden / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        held = {name: entry for name, entry in files.tensors.items() if model._family.is_buffer(name)}
        return {name: file.array(info.name) for name, (file, info) in held.items() if info.nbytes <= _LARGEST_BUFFER}


def _compare_model(model: Any, folder: Path, stored: str) -> None:
    from .loading import load_pretrained

    probe = model._probe()
    found = load_pretrained(folder, task=model.task, dtype=model.dtype)
    _require_near(_outputs(found, probe), _outputs(model, probe), stored, folder)
