"""A sweep as a TOML file."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.errors import FormatError, MissingExtraError
from nblora.layers import read_layer

from .space import draw_random, expand_grid
from .task import Data

TABLES = {"data", "base", "grid", "random", "fixed"}
OPTIONS = {"loss", "metric", "threads"}
SCIKIT_LEARN = ("breast_cancer", "diabetes", "digits", "iris", "wine")


def read_specification(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the arguments of `Sweep` that a TOML file stands for; its own paths are relative to its folder.

    Raises
    ------
    FormatError
        For what is not TOML, and for tables, settings or values that make no sweep; the message names the file.
    """
    name = os.fspath(path)
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{name}: not a TOML file: {error}") from error
    try:
        return _arguments(content, Path(path).parent)
    except FormatError:
        raise
    except (TypeError, ValueError, KeyError) as error:
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
    arguments["data"] = _data(content["data"], folder)
    arguments.update(_base(content.get("base", {}), folder))
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


def _data(table: Mapping[str, Any], folder: Path) -> Data:
    if "file" in table:
        _check_keys("[data]", table, {"file"})
        return _read_arrays(folder / table["file"])
    _check_keys("[data]", table, {"sklearn", "validation", "test", "split_seed"})
    if "sklearn" not in table:
        raise ValueError("[data] must have file (an .npz) or sklearn (a data set's name)")
    return _load_sklearn(
        table["sklearn"], table.get("validation", 0.2), table.get("test", 0.2), table.get("split_seed", 0)
    )


def _read_arrays(path: Path) -> Data:
    """Read an .npz file with arrays named like the fields of `Data`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Data(**{name: arrays[name] for name in arrays.files})
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise FormatError(
            f"{path}: must be an .npz file of x, y, x_validation, y_validation and perhaps x_test, y_test: {error}"
        ) from error


def _load_sklearn(name: Any, validation: Any, test: Any, seed: Any) -> Data:
    """One of the data sets that come with scikit-learn, standardised by its training part, split at random."""
    name = checks.check_choice("data.sklearn", name, SCIKIT_LEARN)
    shares = [
        checks.check_fraction(f"data.{part}", share) for part, share in (("validation", validation), ("test", test))
    ]
    if not 0 < shares[0] < 1 - shares[1]:
        raise ValueError(f"data.validation and data.test must leave samples for training, got {validation} and {test}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"the data set {name!r} comes with scikit-learn: pip install 'nblora[sklearn]'"
        ) from error
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(checks.check_integer("data.split_seed", seed, 0)).permutation(len(x))
    ends = np.cumsum([round(share * len(x)) for share in shares])
    chosen, tested, trained = np.split(order, ends)
    mean, deviation = x[trained].mean(0), x[trained].std(0)
    x = ((x - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    y = y.astype(np.float32)[:, None] if y.dtype.kind == "f" else y.astype(np.int64)
    held_out = (x[tested], y[tested]) if len(tested) else (None, None)
    return Data(x[trained], y[trained], x[chosen], y[chosen], *held_out)


def _check_keys(place: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"{place} has {', '.join(unknown)}, which is unknown; there are {', '.join(sorted(known))}")
