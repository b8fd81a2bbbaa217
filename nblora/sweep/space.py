"""Which runs a sweep is made of: grids, random draws, and the key by which a run is known again."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nblora import checks
from nblora.adapters import ADAPTERS, DEFAULT_ADAPTER

Settings = dict[str, Any]

METHODS = ("head", *ADAPTERS, "full")
COMMON = ("method", "seed", "lr", "optimizer", "weight_decay", "schedule", "clip_norm", "epochs", "batch_size")
OF_ADAPTERS = ("rank", "lower_rank", "lora_plus_ratio")
OF_METHOD = {name: (*OF_ADAPTERS, *cls.settings(), *cls.trained_by) for name, cls in ADAPTERS.items()}
NAMES = tuple(dict.fromkeys((*COMMON, *(name for names in OF_METHOD.values() for name in names))))
MOST_RUNS = 100_000
"""Runs of one sweep: a grid of ten settings with ten values each would otherwise fill the memory."""
RANGE_KEYS = {"low", "high", "scale"}


def expand_grid(grid: Mapping[str, Any], fixed: Mapping[str, Any] | None = None) -> list[Settings]:
    """Return every combination of a grid's values, each run once.

    A setting that a run's method does not use (a delta scaling for LoRA) is left out of it, and combinations that are
    the same without it are one run.

    Parameters
    ----------
    grid : mapping of setting names to lists of values
    fixed : mapping of setting names to values
        The same for all runs.

    Raises
    ------
    TypeError, ValueError
        For an unknown setting, one given twice, or one without values.
    """
    fixed = dict(fixed or {})
    _check_names("grid", grid, fixed)
    columns = [_values(f"grid[{name!r}]", values) for name, values in grid.items()]
    _check_count(math.prod(map(len, columns)))
    return _distinct(dict(zip(grid, chosen, strict=True)) | fixed for chosen in itertools.product(*columns))


def draw_random(
    space: Mapping[str, Any], runs: int, seed: int = 0, fixed: Mapping[str, Any] | None = None
) -> list[Settings]:
    """Return `runs` random combinations, each with every one of the space's seeds.

    Parameters
    ----------
    space : mapping of setting names to lists, or to ranges such as `{"low": 1e-4, "high": 1e-2, "scale": "log"}`
        `scale` is "linear" (the default) or "log"; a range between integers draws integers, both ends included.
    runs : int
        Combinations to draw; fewer are returned where draws coincide.
    seed : int
        Of the draws: the same seed draws the same runs.
    fixed : mapping of setting names to values
        The same for all runs.
    """
    fixed = dict(fixed or {})
    _check_names("random", space, fixed)
    runs = checks.check_integer("runs", runs, 1)
    rng = np.random.default_rng(checks.check_integer("draw_seed", seed, 0))
    seeds = _values("random['seed']", space["seed"]) if "seed" in space else None
    _check_count(runs * len(seeds or [None]))
    drawn = []
    for _ in range(runs):
        chosen = {name: _draw(f"random[{name!r}]", entry, rng) for name, entry in space.items() if name != "seed"}
        drawn += [chosen | fixed | ({} if seeds is None else {"seed": value}) for value in seeds or [None]]
    return _distinct(drawn)


def run_key(settings: Mapping[str, Any], task_digest: str) -> str:
    """Return the name of a run: the same settings on the same task have the same key, in any process on any day."""
    text = json.dumps([task_digest, settings], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def relevant(settings: Mapping[str, Any]) -> Settings:
    """Return the settings that the run's method uses, in one order, with the method and the seed always there."""
    method = checks.check_choice("method", settings.get("method", DEFAULT_ADAPTER), METHODS)
    used = COMMON + OF_METHOD.get(method, ())
    if settings.get("optimizer", "adamw") != "adamw":
        used = tuple(name for name in used if name != "weight_decay")
    chosen = {"method": method, "seed": settings.get("seed", 0)}
    chosen.update({name: _plain(name, settings[name]) for name in used if name in settings})
    if method in OF_METHOD and "rank" not in chosen:
        raise ValueError(f"rank must be given for method {method!r}, in the grid or in the fixed settings")
    return chosen


def _distinct(combinations: Iterable[Mapping[str, Any]]) -> list[Settings]:
    found = {}
    for combination in combinations:
        settings = relevant(combination)
        found[json.dumps(settings, sort_keys=True)] = settings
    return list(found.values())


def _check_count(runs: int) -> None:
    if runs > MOST_RUNS:
        raise ValueError(
            f"these are {runs} runs; a sweep has at most {MOST_RUNS}: give fewer values, or draw at random"
        )


def _check_names(source: str, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name in [*given, *fixed]:
        if name not in NAMES:
            raise ValueError(f"unknown setting {name!r}; there are {', '.join(NAMES)}")
    twice = sorted(set(given) & set(fixed))
    if twice:
        raise ValueError(f"{', '.join(twice)} is both in {source} and fixed: give it once")


def _values(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray) or not len(values):
        raise TypeError(f"{name} must be a list of at least one value, got {values!r}")
    return list(values)


def _draw(name: str, entry: Any, rng: np.random.Generator) -> Any:
    if not isinstance(entry, Mapping):
        values = _values(name, entry)
        return values[int(rng.integers(len(values)))]
    if not {"low", "high"} <= set(entry) <= RANGE_KEYS:
        raise ValueError(f"{name} must be a list or a range with low, high and perhaps scale, got {dict(entry)!r}")
    low, high = (checks.check_number(f"{name}.{end}", entry[end]) for end in ("low", "high"))
    logarithmic = checks.check_choice(f"{name}.scale", entry.get("scale", "linear"), ("linear", "log")) == "log"
    if not low < high or (logarithmic and low <= 0):
        raise ValueError(f"{name} must have low < high{', both positive' if logarithmic else ''}, got {dict(entry)!r}")
    whole = isinstance(entry["low"], int) and isinstance(entry["high"], int)
    if whole and not logarithmic:
        return int(rng.integers(entry["low"], entry["high"], endpoint=True))
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if logarithmic else float(rng.uniform(low, high))
    return round(value) if whole else float(f"{value:.6g}")


def _plain(name: str, value: Any) -> Any:
    """`value` as JSON holds it, so that it reads back equal."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{name} must be a number, a string, true or false, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
