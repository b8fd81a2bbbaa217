"""`Config`: a model's `config.json`, its values checked as they are read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nblora.errors import FormatError

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "quick_gelu": "quick_gelu",
    "tanh": "tanh", "sigmoid": "sigmoid", "linear": "identity",
}  # fmt: skip
"""nblora's names of transformers' activations. The two ways to write the tanh form of GELU differ by rounding alone."""

_REFUSED = {
    "quantization_config": "a quantisation",
    "pruned_heads": "pruned heads",
    "add_cross_attention": "cross attention",
}


class Config:
    """The fields of a `config.json`.

    Parameters
    ----------
    raw : mapping
        As the file has them.
    path : Path
        The file, for messages.

    Raises
    ------
    FormatError
        For a field that changes the arithmetic and is not supported: the message names it.
    """

    def __init__(self, raw: Mapping[str, Any], path: Path | str) -> None:
        self.raw, self.path = dict(raw), path
        for name, what in _REFUSED.items():
            if self.raw.get(name):
                raise self.fault(f"{name} is {shortened(self.raw[name])}: {what} is not supported")

    def fault(self, text: str) -> FormatError:
        """An error of this file."""
        return FormatError(f"{self.path}: {text}")

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        """A field that is an integer of at least `low`."""
        value = self._given(name, default)
        if type(value) is not int or not low <= value <= 2**31 - 1:
            raise self.fault(f"{name} is {shortened(value)}; expected an integer of at least {low}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A field that is a finite number, not negative."""
        value = self._given(name, default)
        if type(value) not in (int, float) or not (value >= 0 and math.isfinite(value)):
            raise self.fault(f"{name} is {shortened(value)}; expected a number that is not negative")
        return float(value)

    def share(self, name: str, default: float) -> float:
        """A field that is a probability below 1, of dropout."""
        value = self.number(name, default)
        if value >= 1:
            raise self.fault(f"{name} is {shortened(value)}; expected a number in [0, 1)")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        value = self._given(name, default)
        if type(value) is not bool:
            raise self.fault(f"{name} is {shortened(value)}; expected true or false")
        return value

    def sizes(self, name: str) -> list[int]:
        """A field that is a list of positive integers."""
        value = self._given(name, None)
        if not isinstance(value, list) or not value or not all(type(n) is int and 0 < n < 2**31 for n in value):
            raise self.fault(f"{name} is {shortened(value)}; expected a list of positive integers")
        return list(value)

    def pair(self, name: str) -> tuple[int, int]:
        """A field that is a positive integer, for height and width, or a list of both."""
        if isinstance(self.raw.get(name), list):
            found = self.sizes(name)
            if len(found) != 2:
                raise self.fault(f"{name} is {shortened(found)}; expected an integer or two")
            return found[0], found[1]
        return (self.integer(name),) * 2

    def activation(self, name: str, default: str) -> str:
        """A field that names an activation, as nblora calls it."""
        value = self._given(name, default)
        if value not in ACTIVATIONS:
            raise self.fault(f"{name} is {shortened(value)}; supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def expect(self, name: str, *allowed: Any) -> None:
        """FormatError where a field is there and none of these: its other values change the arithmetic."""
        value = self.raw.get(name, allowed[0])
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise self.fault(f"{name} is {shortened(value)}, which is not supported; expected {allowed[0]!r}")

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self.raw.get(name) is not None

    def _given(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.fault(f"{name} is missing")
        return default

    # --- what several families have ---------------------------------------------------------------------------

    def heads(self, features: str, heads: str) -> tuple[int, int]:
        """Features of a row, and the number of attention heads that divide them."""
        width, count = self.integer(features), self.integer(heads)
        if width % count:
            raise self.fault(f"{heads} is {count}, which does not divide {features}, {width}")
        return width, count

    def rope_theta(self) -> float:
        """Base of rotary frequencies, in the spelling of transformers 4 or 5; scaled ones are refused."""
        found = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise self.fault(f"rope_parameters is {shortened(found)}; expected an object")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            raise self.fault(f"the rope_type is {shortened(kind)}: only the default RoPE is supported, no scaling")
        factor = found.get("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        if factor not in (None, 1, 1.0):
            raise self.fault(f"partial_rotary_factor is {shortened(factor)}, which is not supported")
        theta = found.get("rope_theta", self.raw.get("rope_theta", 10000.0))
        if type(theta) not in (int, float) or not (theta > 0 and math.isfinite(theta)):
            raise self.fault(f"rope_theta is {shortened(theta)}; expected a positive number")
        return float(theta)

    def labels(self) -> int | None:
        """The number of labels that the file says, None where it says none."""
        named = self.raw.get("id2label")
        if isinstance(named, dict) and named:
            return len(named)
        return self.integer("num_labels") if self.has("num_labels") else None


def shortened(value: Any) -> str:
    """A value of a file, cut to what a message can hold."""
    text = repr(value) if not isinstance(value, list | dict) or len(value) < 20 else f"{type(value).__name__} of many"
    return text if len(text) <= 100 else f"{text[:97]}..."
