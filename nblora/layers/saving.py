"""Files that hold what was trained, and of the rest a digest: what is frozen comes from elsewhere."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .parameters import NamedParameters

FROZEN = "frozen"
"""The key of a file's configuration that lists the parameters left out: {name: digest}."""


def digests(model: NamedParameters) -> dict[str, str]:
    """A digest of the values of each parameter that training leaves as it is."""
    frozen = (named for named in model._parameters() if not (named.trainable or named.parameter.state))
    return {named.name: _digest_of(model._logical_copy(named.parameter)) for named in frozen}


def _digest_of(array: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{array.dtype} {array.shape} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def complete(tensors: dict[str, np.ndarray], left_out: Mapping[str, str], base: NamedParameters | None) -> None:
    """Add the parameters that a file lacks to `tensors`, from `base`.

    `base` names them as the file does, or is the model before it was adapted, which lacks the "base" of adapters.

    Raises
    ------
    ValueError
        Without a base, and for one that lacks a parameter or has it with other values.
    """
    if left_out and base is None:
        raise ValueError(
            f"holds what was trained, and not its frozen base ({len(left_out)} parameters, such as "
            f"{next(iter(left_out))!r}): give nblora.load(file, base=...) the model that was trained, or the plain one "
            "that it was made from"
        )
    known = {} if base is None else {named.name: named for named in base._parameters()}
    for name, digest in left_out.items():
        found = next((known[other] for other in _names_in_a_base(name) if other in known), None)
        if found is None:
            raise ValueError(f"the base lacks the frozen parameter {name!r}; it has {', '.join(known)}")
        array = base._logical_copy(found.parameter)  # type: ignore[union-attr]  # it has parameters
        if _digest_of(array) != digest:
            raise ValueError(f"the frozen parameter {name!r} has other values than the base's {found.name!r}")
        tensors[name] = array


def _names_in_a_base(name: str) -> Iterator[str]:
    """The name itself, and without one or more of its "base"s."""
    yield name
    parts = name.split(".")
    while "base" in parts:
        del parts[len(parts) - 1 - parts[::-1].index("base")]
        yield ".".join(parts)


def check_same_base(model: NamedParameters, left_out: Mapping[str, Any]) -> None:
    """ValueError where a file was written beside other frozen values than the model has."""
    own = digests(model)
    for name in [*own, *left_out]:
        if own.get(name) != left_out.get(name):
            raise ValueError(f"the frozen parameter {name!r} has other values than the model's, or is not in both")
