"""A sweep as a TOML file."""

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nblora.errors import FormatError
from nblora.layers import read_layer
from nblora.storage.bounded import read_bounded

from .data import SPLIT, load_scikit_learn, read_data
from .space import draw_random, expand_grid
from .task import DEFAULT_LOSS, Data

LONGEST = 1 << 20
"""Bytes of a TOML file."""

MOST_PARTS = 100
"""Parts of a dotted key that are left to the parser."""
_TEXT = re.compile(
    r"""#[^\n]*|\"{3}(?:[^\\]|\\.)*?\"{3}|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""", re.DOTALL
)  # comments and strings
_BETWEEN_KEYS = re.compile(r"[=,\[\]{}\r\n]")

TABLES = {"data", "base", "grid", "random", "fixed"}
OPTIONS = {"loss", "metric", "threads"}


def read_specification(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the arguments of `Sweep` that a TOML file stands for; its own paths are relative to its folder.

    Raises
    ------
    FormatError
        For what is not TOML, and for tables, settings or values that make no sweep; the message names the file.
    """
    name = os.fspath(path)
    try:
        text = read_bounded(Path(path), LONGEST, follow_links=True).decode()
        _check_keys_are_short(text)
        content = tomllib.loads(text)
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"{name}: not a TOML file of a sweep: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, of too long a key or number
        raise FormatError(f"{name}: not a TOML file: {error}") from error
    with named(path):
        return _arguments(content, Path(path).parent)


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what is wrong with a file's settings as a FormatError that names the file."""
    try:
        yield
    except FormatError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{os.fspath(path)}: {reason}") from error


def _check_keys_are_short(text: str) -> None:
    """FormatError for a key of many dotted parts: Python's parser takes the square of their number, in memory too."""
    bare = _TEXT.sub("", text).translate({ord(" "): None, ord("\t"): None})
    parts = max(chunk.count(".") + 1 for chunk in _BETWEEN_KEYS.split(bare))
    if parts > MOST_PARTS:
        raise ValueError(f"a key of {parts} parts; a sweep's have at most two")


def _arguments(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    _check_keys("the file", content, TABLES | OPTIONS)
    for table in TABLES & set(content):
        if not isinstance(content[table], dict):
            raise TypeError(f"{table} must be a table, written [{table}]")
    if ("grid" in content) == ("random" in content):
        raise ValueError("there must be one table [grid] or one table [random]")
    arguments: dict[str, Any] = {name: content[name] for name in OPTIONS if name in content}
    arguments.update(_base(content.get("base", {}), folder))
    if isinstance(arguments.get("base"), Path):
        arguments["data"] = _texts(content["data"], folder)
    else:
        arguments["data"] = _data(content["data"], folder, content.get("loss", DEFAULT_LOSS), "base" in arguments)
    fixed = content.get("fixed", {})
    if "grid" in content:
        arguments["runs"] = expand_grid(content["grid"], fixed)
    else:
        space = dict(content["random"])
        runs, seed = space.pop("runs"), space.pop("draw_seed", 0)
        arguments["runs"] = draw_random(space, runs, seed, fixed)
    return arguments


def _base(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if "model" in table:
        _check_keys("[base]", table, {"model", "target", "max_length"})
        chosen = {name: table[name] for name in ("target", "max_length") if name in table}
        return chosen | {"base": folder / table["model"]}
    _check_keys("[base]", table, {"checkpoint", "hidden", "target", "modules_to_save"})
    if "checkpoint" in table and "hidden" in table:
        raise ValueError("[base] has both checkpoint and hidden: a network is read or drawn, not both")
    chosen = {name: table[name] for name in ("hidden", "target", "modules_to_save") if name in table}
    if "checkpoint" in table:
        chosen["base"] = read_layer(folder / table["checkpoint"])
    return chosen


def _data(table: Mapping[str, Any], folder: Path, loss: str, pretrained: bool) -> Data:
    if ("file" in table) == ("sklearn" in table):
        raise ValueError(
            "[data] must have file (.npz, .csv, .tsv or .parquet) or sklearn (a data set's name), and one of them only"
        )
    if "sklearn" in table:
        _check_keys("[data]", table, {"sklearn", *SPLIT})
        return load_scikit_learn(table["sklearn"], **{name: table[name] for name in SPLIT if name in table})
    _check_keys("[data]", table, {"file", "label", "features", "standardise", *SPLIT})
    options = {name: value for name, value in table.items() if name != "file"}
    if pretrained:  # it expects what it was trained on, which nobody but its owner knows how to scale
        options.setdefault("standardise", False)
    return read_data(folder / table["file"], loss=loss, **options)


def _texts(table: Mapping[str, Any], folder: Path) -> Data:
    from .texts import read_texts

    _check_keys("[data]", table, {"file", *SPLIT})
    options = {name: value for name, value in table.items() if name != "file"}
    return read_texts(folder / table["file"], **options)


def _check_keys(place: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"{place} has {', '.join(unknown)}, which is unknown; there are {', '.join(sorted(known))}")
