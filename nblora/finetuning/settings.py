"""`Settings`: what a fine-tuning is told, checked once, in one place."""

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nblora import checks
from nblora.adapters import ADAPTERS
from nblora.errors import FormatError
from nblora.storage.bounded import read_bounded

METHODS = (*ADAPTERS, "head", "full")
TASKS = ("sequence-classification", "causal-lm")
LONG = ("cut", "refuse")
AUTO = "auto"
EPOCHS = 3
SHARE = 0.1
"""Of the records, held out for validation where nobody says."""
_MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Settings of `nblora.finetune`, which describes them."""

    model: str
    data: str
    output: str
    task: str | None = None
    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    target: str | tuple[str, ...] = "all-linear"
    lr: float | str = 2e-4
    epochs: int = EPOCHS
    iters: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 512
    long: str = "cut"
    valid: str | float | None = None
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = None
    learn_prompt: bool = False
    seed: int = 0

    @classmethod
    def checked(cls, **given: Any) -> "Settings":
        """Settings of arguments as callers give them.

        Raises
        ------
        TypeError, ValueError
            That names the argument.
        """
        values = dict(given)
        for name in ("model", "data", "output"):
            values[name] = str(Path(values[name]))
        if values.get("task") is not None:
            checks.check_choice("task", values["task"], TASKS)
        checks.check_choice("method", values["method"], METHODS)
        checks.check_choice("long", values["long"], LONG)
        for name in ("rank", "epochs", "batch_size", "accumulate", "max_length"):
            values[name] = checks.check_integer(name, values[name], 1)
        for name in ("iters", "eval_every", "save_every", "patience"):
            if values[name] is not None:
                values[name] = checks.check_integer(name, values[name], 1)
        values["seed"] = checks.check_integer("seed", values["seed"], 0)
        values["alpha"] = checks.check_positive("alpha", values["alpha"])
        values["learn_prompt"] = checks.check_flag("learn_prompt", values["learn_prompt"])
        values["lr"] = _rate(values["lr"])
        values["target"] = _target(values["target"])
        values["valid"] = _valid(values["valid"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        held = asdict(self)
        return {**held, "target": self.target if isinstance(self.target, str) else list(self.target)}

    def differing(self, others: dict[str, Any]) -> list[str]:
        """Names of the settings in which a run that was described by `as_dict` differs; its folder may have moved."""
        own = self.as_dict()
        return [name for name in own if name != "output" and own[name] != others.get(name)]


def _rate(value: Any) -> float | str:
    if value == AUTO:
        return AUTO
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"lr must be a positive number or 'auto', got {value!r}") from None
    return checks.check_positive("lr", value)


def _target(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        return names[0] if len(names) == 1 else names
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return value[0] if len(value) == 1 else tuple(value)
    raise ValueError(f"target must be 'all-linear', a layer's name or several, got {value!r}")


def _valid(value: Any) -> str | float | None:
    """A path, or a share of the records: 0 for no validation."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    elif not isinstance(value, int | float):
        return str(Path(value))
    if not 0 <= value < 1:
        raise ValueError(f"valid must be a path, or a share of the records in [0, 1), got {value!r}")
    return float(value)


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, by the names of the flags, with "-" or "_".

    Raises
    ------
    FormatError
        For a file that is no TOML, and a name that is none.
    """
    try:
        held = tomllib.loads(read_bounded(path, _MAX_CONFIG, follow_links=True).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: not valid TOML: {error}") from None
    named = {name.replace("-", "_"): value for name, value in held.items()}
    known = [field.name for field in fields(Settings)]
    for name, value in named.items():
        if name not in known:
            shown = ", ".join(known).replace("_", "-")
            raise FormatError(f"{path}: unknown setting {name!r}; there are {shown}")
        if isinstance(value, dict):
            raise FormatError(f"{path}: {name} must be a value, got a table")
    return named
