"""nblora adapters as PEFT adapters, and what of a dense delta low-rank factors can hold."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.adapters import Adapter, Factors
from nblora.formats.peft_config import config_from_dict
from nblora.formats.peft_tensors import PREFIX
from nblora.formats.peft_writer import only_these, pattern_fields, write_adapter
from nblora.formats.rounding import narrow
from nblora.layers import Dense, Embedding, Layer, tree
from nblora.layers.conv import Convolution
from nblora.layers.weighted import Weighted
from nblora.linalg import product_svd
from nblora.models.model import Model
from nblora.storage.dtypes import BY_NAME

NO_TARGET = "dummy-target-modules"
"""What PEFT calls the target of an adapter that adapts nothing, and brings layers of `modules_to_save` alone."""


@dataclass(frozen=True)
class ExportedModule:
    """What was written of one adapter.

    Attributes
    ----------
    name : str
    rank : int
        Of the written factors, the folded delta's included.
    scaling : float
        s, the same as the adapter's.
    delta_norm : float
        ‖c·D‖, the change of the delta; 0 for an adapter without one.
    delta_error : float
        ‖D − written‖ / ‖D‖: 1 where the delta was left out, 0 where there is none.
    """

    name: str
    rank: int
    scaling: float
    delta_norm: float
    delta_error: float


def save_peft(
    adapters: Adapter | Model | Mapping[str, Adapter | Weighted],
    folder: str | os.PathLike[str],
    *,
    name: str = "layer",
    fold_delta: int | None = None,
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
) -> list[ExportedModule]:
    """Write adapters as one PEFT adapter, which `peft.PeftModel.from_pretrained` loads.

    The low-rank part is written exactly. The delta of a `DeltaLoRAAdapter` is left out, with a warning, or with
    `fold_delta` its best approximation of that rank is appended: c·D/s ≈ P Q gives A' = [A, P] and B' = [B; Q] under
    the same s, with `lora_alpha = s (r + fold_delta)`, or `s √(r + fold_delta)` with rsLoRA.

    Parameters
    ----------
    adapters : Sequential, an adapter, or a mapping of module names to layers
        Of a `Sequential` its adapters are written, and the plain layers that are trained (`modules_to_save`), by their
        names. In a mapping every plain layer is written whole.
    folder : path-like
        What nblora wrote there before is replaced, whole or not at all.
    name : str
        The module's name, where one adapter is given.
    fold_delta : int, optional
        Rank of the deltas' approximation, at most min(in, out).
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        Of the factors; the adapter's by default.
    config : mapping, optional
        An `adapter_config.json` whose keys are kept, such as that of the adapter these came from; ranks, alphas and
        `target_modules` are written anew where they do not fit.
    force : bool
        Replace a folder that is there already, though nblora did not write it.

    Returns
    -------
    list of ExportedModule

    Warns
    -----
    UserWarning
        Where the file holds less than what was trained: without a delta, with the share of the change that is lost, or
        without a base that was trained too.

    Raises
    ------
    TypeError
        If something else than an adapter is given.
    ValueError
        If an argument is out of range, an adapter's base is no linear layer, the adapters disagree about rsLoRA, or a
        delta to be folded is not finite.
    FormatError
        If `config` asks for an arithmetic that nblora does not have, or the folder is someone else's.
    OSError
        If the folder cannot be written.
    """
    named, whole = _sorted(_modules(adapters, name))
    if not named and not (whole and config is not None and config.get("target_modules") == NO_TARGET):
        raise ValueError("adapters holds no adapter; expected at least one: model.adapt(...) makes them")
    stored = None if dtype is None else BY_NAME[checks.check_choice("dtype", dtype, list(BY_NAME))]
    tensors: dict[str, np.ndarray] = {}
    exported, alphas = [], {}
    for module, adapter in named.items():
        factors = _factors(module, adapter, fold_delta)
        kept = stored or BY_NAME[adapter.dtype.name]
        for part, factor in _as_peft_has_them(module, adapter, factors).items():
            tensors[f"{PREFIX}{module}.{part}"] = narrow(factor, kept)
        alphas[module], rank = factors.alpha, factors.A.shape[1]
        exported.append(ExportedModule(module, rank, factors.scaling, factors.dense_norm, factors.dense_error))
    raw = _config(config, {each.name: each.rank for each in exported}, alphas)
    for adapter in named.values():  # which all say the same
        raw |= adapter.peft_fields
    for module, layer in whole.items():
        # PyTorch's Linear is (out, in); not so its Embedding, and GPT-2's Conv1D.
        as_it_is = not isinstance(layer, Weighted) or isinstance(layer, Embedding)
        as_it_is = as_it_is or (type(layer) is Dense and bool(raw.get("fan_in_fan_out")))
        for part in layer.parameter_names():
            array = layer.get_parameter(part)
            oriented = array if as_it_is else array.T
            if part == "weight" and isinstance(layer, Convolution):
                oriented = oriented.reshape(layer.weight.shape)
            kept = stored or BY_NAME[layer.dtype.name]
            tensors[f"{PREFIX}{module}.{part}"] = narrow(oriented.astype(np.float64), kept)
    said = raw.get("modules_to_save") or []  # PEFT's own lists name heads that a model need not have
    if not all(_is_part(name, said) for name in whole) or bool(whole) != bool(said):
        raw["modules_to_save"] = list(whole) or None
    raw["use_rslora"] = any(adapter.lora_layer.use_rslora for adapter in named.values())
    if config is None and len(dropouts := {adapter.lora_dropout for adapter in named.values()}) == 1:
        raw["lora_dropout"] = dropouts.pop()
    for adapter in named.values():  # of one method, so that the first says it for all
        raw = adapter.config_of_lora(raw)
        break
    config_from_dict(raw, Path(folder) / "adapter_config.json")
    write_adapter(folder, raw, tensors, force)
    _warn_of_losses(named, exported)
    return exported


def _modules(given: Any, name: str) -> dict[str, Any]:
    """What to write by its module's name: of a model its adapters, and the plain layers that are trained."""
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, Model):
        return {name: given}
    layers = {slot: owner.children()[key] for slot, owner, key in tree.slots(given, Adapter)}
    chosen = {slot: layer for slot, layer in layers.items() if isinstance(layer, Adapter) or _is_trained(layer)}
    names = given._peft_names(list(chosen))
    return {names[slot]: layer for slot, layer in chosen.items()}


def _is_trained(layer: Layer) -> bool:
    return layer.trainable and any(layer._own_parameters())


def _sorted(given: Mapping[str, Any]) -> tuple[dict[str, Adapter], dict[str, Layer]]:
    """The adapters, and the layers to write whole."""
    named: dict[str, Adapter] = {}
    whole: dict[str, Layer] = {}
    for module, layer in given.items():
        if isinstance(layer, Layer) and not isinstance(layer, Adapter) and any(layer._own_parameters()):
            whole[module] = layer
        elif not isinstance(layer, Adapter):
            raise TypeError(f"adapters[{module!r}] must be an adapter, such as a LoRAAdapter, got {layer!r}")
        elif not isinstance(layer.base_layer, Weighted):
            raise ValueError(
                f"the base of adapters[{module!r}] must be a layer with a weight, which is what PEFT adapts, got "
                f"{type(layer.base_layer).__name__}: merge that one first"
            )
        else:
            named[module] = layer
    if len({adapter.lora_layer.use_rslora for adapter in named.values()}) > 1:
        raise ValueError("adapters: some use rsLoRA and some do not; PEFT has one use_rslora for all, write them apart")
    if any(adapter.peft_fields != next(iter(named.values())).peft_fields for adapter in named.values()):
        methods = ", ".join(sorted({adapter.method for adapter in named.values()}))
        raise ValueError(f"adapters follow {methods}, and PEFT has one method for all of a folder: write them apart")
    return named, whole


def _warn_of_losses(named: Mapping[str, Adapter], exported: list[ExportedModule]) -> None:
    """Say what was trained and is not in the file."""
    lost = [report for report in exported if report.delta_error == 1.0]
    if lost:
        low_rank = np.linalg.norm([_low_rank_norm(adapter) for adapter in named.values()])
        deltas = np.linalg.norm([report.delta_norm for report in lost])
        warnings.warn(
            f"PEFT's files hold no dense delta: that of {', '.join(report.name for report in lost)} is left out, "
            f"{100 * deltas / (low_rank + deltas):.1f} % of the change by its norm. fold_delta=RANK appends the best "
            "approximation of that rank, nblora's own save() keeps everything",
            UserWarning,
            stacklevel=3,
        )
    trained = [module for module, adapter in named.items() if not adapter.is_base_layer_frozen]
    if trained:
        warnings.warn(
            f"the base of {', '.join(trained)} was trained too, and PEFT's files hold adapters alone: keep the model "
            "as well, with save()",
            UserWarning,
            stacklevel=3,
        )


def _low_rank_norm(adapter: Adapter) -> float:
    """‖s A B‖, without forming it."""
    A, B = (adapter.get_parameter(factor).astype(np.float64) for factor in ("lora_A", "lora_B"))
    return float(adapter.scaling * np.linalg.norm(product_svd(A, B)[1]))


def _as_peft_has_them(name: str, adapter: Adapter, factors: Factors) -> dict[str, np.ndarray]:
    """The factors, (in, rank) and (rank, out), and the magnitude (out,), under PEFT's names and in its shapes."""
    base = adapter.base_layer
    if adapter.peft_parts:
        if isinstance(base, Embedding | Convolution):
            raise ValueError(f"{name}: PEFT knows {adapter.method!r} on linear layers alone, got {base!r}: merge it")
        return {part: getattr(factors, field) for part, field in adapter.peft_parts.items()}
    A, B, magnitude = factors.A, factors.B, factors.magnitude
    scaled = {} if magnitude is None else {"lora_magnitude_vector": magnitude}
    if isinstance(base, Embedding):
        return {"lora_embedding_A": A.T, "lora_embedding_B": B.T, **scaled}
    if not isinstance(base, Convolution):
        return {"lora_A.weight": A.T, "lora_B.weight": B.T, **scaled}
    ones = tuple(1 for _ in base.kernel_size)
    down, up = A.T.reshape(-1, base.in_channels, *base.kernel_size), B.T.reshape(*B.T.shape, *ones)
    shaped = {part: vector.reshape(1, -1, *ones) for part, vector in scaled.items()}
    return {"lora_A.weight": down, "lora_B.weight": up, **shaped}


def _is_part(name: str, blocks: list[str]) -> bool:
    """Whether a layer, or a block that holds it, ends with one of these names."""
    parts = name.split(".")
    holders = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(holder == block or holder.endswith(f".{block}") for holder in holders for block in blocks)


def _factors(name: str, adapter: Adapter, fold: int | None) -> Factors:
    """What a file holds of an adapter; ValueError that names it where it cannot."""
    try:
        return adapter.as_factors(fold)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _config(given: Mapping[str, Any] | None, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    raw = dict(given) if given is not None else {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0, "init_lora_weights": True,
    }  # fmt: skip
    raw |= {"use_dora": False, "lora_bias": False} if given is not None else {}
    if ranks and not _fits(raw, ranks, alphas):
        raw |= pattern_fields(ranks, alphas)
    if given is None:
        raw["target_modules"] = only_these(list(ranks))
    return raw


def _fits(raw: dict[str, Any], ranks: dict[str, int], alphas: dict[str, float]) -> bool:
    """Whether a given configuration already says these ranks and alphas."""
    if "r" not in raw or "lora_alpha" not in raw:
        return False
    config = config_from_dict(raw, Path("config"))
    return all(
        config.module_rank(name) == rank and config.module_alpha(name) == alphas[name] for name, rank in ranks.items()
    )
