"""`labels.json`: what the classes of a classification are called, in an adapter's or a model's folder."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.storage.atomic import replace_whole
from nblora.storage.bounded import parse_object, read_bounded

FILE = "labels.json"


def write_labels(folder: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Write the names of classes, in the order of their indices, to a folder that is there.

    Raises
    ------
    ValueError
        For fewer than two names, and one that occurs twice or is no text.
    OSError
        For a folder that cannot be written to.
    """
    path = Path(folder, FILE)
    fault = _fault(list(names))
    if fault:
        raise ValueError(f"names {fault}")
    with replace_whole(path) as file:
        file.write(json.dumps({"labels": list(names)}, ensure_ascii=False, indent=2).encode() + b"\n")


def read_labels(folder: str | os.PathLike[str], count: int | None = None) -> list[str] | None:
    """Read what `write_labels` wrote; None for a folder without it.

    Parameters
    ----------
    folder : path-like
    count : int, optional
        Classes that the model has.

    Raises
    ------
    FormatError
        For a broken file, and one of another number of classes.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    names = parse_object(read_bounded(path, MAX_JSON), path).get("labels")
    fault = _fault(names)
    if fault:
        raise FormatError(f"{path}: labels {fault}")
    if count is not None and len(names) != count:  # type: ignore[arg-type]
        raise FormatError(f"{path}: labels holds {len(names)} names, and the model has {count} classes")  # type: ignore[arg-type]
    return names


def _fault(names: object) -> str:
    """What is wrong with a list of names; an empty text if nothing is."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return f"must be a list of texts, got {names!r}"
    if len(names) < 2:
        return f"must hold at least two names, got {names!r}"
    twice = next((name for name in names if names.count(name) > 1), None)
    return "" if twice is None else f"must differ, and {twice!r} occurs twice"
