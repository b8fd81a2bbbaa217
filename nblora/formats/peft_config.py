"""`adapter_config.json` of PEFT: what of it shapes the arithmetic, and a refusal of what nblora does not compute."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nblora.adapters import ADAPTERS, Adapter
from nblora.errors import FormatError
from nblora.storage.bounded import parse_object

from .patterns import Patterns

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG = 16 * 2**20

UNSUPPORTED = {
    "alora_invocation_tokens": "applies the adapter to some tokens only",
    "arrow_config": "routes between adapters",
    "kasa_config": "puts a diagonal between the factors and truncates the base weights",
    "layer_replication": "repeats layers of the base model",
    "megatron_config": "splits layers between processes",
    "monteclora_config": "samples the factors",
    "target_parameters": "adapts bare parameters rather than layers",
    "trainable_token_indices": "replaces single rows of an embedding",
    "use_bdlora": "makes a factor block-diagonal",
    "use_qalora": "pools the input in groups",
}
"""Fields that change the arithmetic when they are set, and how."""

INERT = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
        "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora", "velora_config",
    }
)  # fmt: skip
"""Fields that are read here, or that matter to training only (VeLoRA, for one, changes the backward pass alone)."""

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "True")
"""`init_lora_weights` that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them."""


@dataclass(frozen=True)
class PeftConfig:
    """The fields of an adapter's configuration that its arithmetic depends on.

    Attributes
    ----------
    path : Path
        The file it was read from, for messages.
    raw : dict
        Every key of the file as it was.
    terms : dict
        What they mean in the fields of LoRA's configuration.
    rank, alpha : int, float
        `r` and `lora_alpha`, for modules that no pattern names.
    rank_pattern, alpha_pattern : dict
        Regular expression of a module's name to its own rank or alpha; the first match wins.
    use_rslora, use_dora, lora_bias, fan_in_fan_out : bool
    bias : str
        "none", "all" or "lora_only".
    modules_to_save : tuple of str
    """

    path: Path
    raw: dict[str, Any]
    terms: dict[str, Any]
    rank: int
    alpha: float
    rank_pattern: dict[str, Any]
    alpha_pattern: dict[str, Any]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    bias: str
    modules_to_save: tuple[str, ...] = ()

    def targets(self, modules: Iterable[str]) -> bool:
        """Whether `target_modules`, where the file has it, names one of the modules."""
        target = self.raw.get("target_modules")
        if not target or target == "all-linear":
            return True
        if isinstance(target, str):
            named = Patterns("target_modules", {target: True}, self.path, whole=True)
            return any(named.value(module, False) for module in modules)
        return any(module == name or module.endswith(f".{name}") for module in modules for name in target)

    @property
    def unknown(self) -> dict[str, Any]:
        """Fields that nblora does not know and that hold a number or a text."""
        known = INERT | UNSUPPORTED.keys()
        said = self.terms.items()
        return {field: value for field, value in said if field not in known and value not in (None, False)}

    def module_rank(self, module: str) -> int:
        """Rank of the module of this name."""
        return int(self._ranks.value(module, self.rank))

    def module_alpha(self, module: str) -> float:
        """Alpha of the module of this name."""
        return float(self._alphas.value(module, self.alpha))

    def scaling(self, module: str) -> float:
        """s = alpha / rank of the module, or alpha / √rank with rsLoRA."""
        rank = self.module_rank(module)
        return self.module_alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @functools.cached_property
    def _ranks(self) -> Patterns:
        return Patterns("rank_pattern", self.rank_pattern, self.path)

    @functools.cached_property
    def _alphas(self) -> Patterns:
        return Patterns("alpha_pattern", self.alpha_pattern, self.path)


def parse_config(data: bytes, path: Path) -> PeftConfig:
    """Read the bytes of an `adapter_config.json`.

    Parameters
    ----------
    data : bytes
    path : Path
        Where they come from, for messages.

    Returns
    -------
    PeftConfig

    Raises
    ------
    FormatError
        If the file is not such a configuration, or sets a field that changes the arithmetic and is not supported;
        the message names the field.
    """
    return config_from_dict(parse_object(data, path), path)


def method_of(peft_type: Any) -> type[Adapter] | None:
    """The first method whose files have this `peft_type`, if any has."""
    return next((cls for cls in ADAPTERS.values() if cls.peft_fields["peft_type"] == peft_type), None)


def config_from_dict(raw: dict[str, Any], path: Path) -> PeftConfig:
    """Check a configuration and pick what the arithmetic needs; see `parse_config`."""
    given, method = raw, method_of(raw.get("peft_type"))
    if method is None:
        known = " and ".join(map(repr, dict.fromkeys(cls.peft_fields["peft_type"] for cls in ADAPTERS.values())))
        raise FormatError(f"{path}: peft_type is {raw.get('peft_type')!r}; only {known} adapters are supported")
    try:
        raw = method.config_as_lora(given)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    _refuse_unsupported(raw, path)
    bias = _typed(raw, "bias", path, str, "none")
    if bias not in ("none", "all", "lora_only"):
        raise FormatError(f"{path}: bias is {bias!r}; expected 'none', 'all' or 'lora_only'")
    config = PeftConfig(
        path=path,
        raw=given,
        terms=raw,
        rank=_rank(raw.get("r", 8), "r", path),
        alpha=_alpha(raw.get("lora_alpha", 8), "lora_alpha", path),
        rank_pattern={key: _rank(value, "rank_pattern", path) for key, value in _pattern(raw, "rank_pattern", path)},
        alpha_pattern={
            key: _alpha(value, "alpha_pattern", path) for key, value in _pattern(raw, "alpha_pattern", path)
        },
        use_rslora=_typed(raw, "use_rslora", path, bool, False),
        use_dora=_typed(raw, "use_dora", path, bool, False),
        lora_bias=_typed(raw, "lora_bias", path, bool, False),
        fan_in_fan_out=_typed(raw, "fan_in_fan_out", path, bool, False),
        bias=bias,
        modules_to_save=tuple(_names(raw, "modules_to_save", path)),
    )
    if not isinstance(raw.get("target_modules"), str):
        _names(raw, "target_modules", path)
    if config.use_dora and config.lora_bias:
        raise FormatError(f"{path}: use_dora and lora_bias exclude each other; PEFT cannot load such an adapter either")
    return config


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    for field, effect in UNSUPPORTED.items():
        if raw.get(field):
            raise FormatError(f"{path}: {field} is set ({raw[field]!r}); it {effect}, which nblora does not support")
    init = raw.get("init_lora_weights", True)
    if not any(init is plain or (isinstance(init, str) and init == plain) for plain in PLAIN_INITS):
        raise FormatError(
            f"{path}: init_lora_weights is {init!r}; it also changes the base weights, which nblora does not support. "
            "Convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for field, value in raw.items():
        # PEFT switches its variants on by a true flag, a list or a sub-configuration; names and numbers only tune them.
        if (
            field not in INERT
            and field not in UNSUPPORTED
            and (value is True or isinstance(value, (dict, list)))
            and value
        ):
            raise FormatError(
                f"{path}: {field} is set ({value!r}); nblora does not know this field and what it changes. "
                "Remove it from the file if it does not change the adapter's arithmetic"
            )


def _typed(raw: dict[str, Any], field: str, path: Path, kind: type, default: Any) -> Any:
    value = raw.get(field)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise FormatError(f"{path}: {field} is {value!r}; expected a {kind.__name__}")
    return value


def _names(raw: dict[str, Any], field: str, path: Path) -> list[str]:
    names = raw.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{path}: {field} is {names!r}; expected a list of names")
    return names


def _pattern(raw: dict[str, Any], field: str, path: Path) -> Any:
    return _typed(raw, field, path, dict, {}).items()


def _rank(value: Any, field: str, path: Path) -> int:
    if type(value) is not int or value < 1:
        raise FormatError(f"{path}: {field} holds the rank {value!r}; expected a whole number of at least 1")
    return value


def _alpha(value: Any, field: str, path: Path) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise FormatError(f"{path}: {field} holds the alpha {value!r}; expected a finite number")
    return value
