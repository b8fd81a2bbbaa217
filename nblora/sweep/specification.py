"""A sweep as a TOML file."""

import os
import tomllib
from collections.abc import Mapping
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
        content = tomllib.loads(read_bounded(Path(path), LONGEST, follow_links=True).decode())
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"{name}: not a TOML file of a sweep: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and of a number with too many digits
        raise FormatError(f"{name}: not a TOML file: {error}") from error
    try:
        return _arguments(content, Path(path).parent)
    except FormatError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{name}: {reason}") from error


def _arguments(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    _check_keys("the file", content, TABLES | OPTIONS)
    for table in TABLES & set(content):
        if not isinstance(content[table], dict):
            raise TypeError(f"{table} must be a table, written [{table}]")
    if ("grid" in content) == ("random" in content):
        raise ValueError("there must be one table [grid] or one table [random]")
    arguments: dict[str, Any] = {name: content[name] for name in OPTIONS if name in content}
    arguments.update(_base(content.get("base", {}), folder))
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


def _check_keys(place: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"{place} has {', '.join(unknown)}, which is unknown; there are {', '.join(sorted(known))}")
