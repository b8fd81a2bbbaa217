"""Which layers a pattern means: by name, by fnmatch pattern, or by regular expression."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

Pattern = str | re.Pattern[str]


def match_names(argument: str, target: Any, names: Sequence[str]) -> list[str]:
    """Return the `names` that `target` matches, in the order of `names`.

    `target` is a pattern or several: an exact name, an fnmatch pattern (`"hidden*"`), a regular expression that must
    match the whole name (`"hidden[0-9]+"`, or a compiled one), or an int, the place of a layer.

    Raises
    ------
    TypeError
        For a target that is none of these.
    ValueError
        For a pattern that matches nothing; the message lists the names.
    """
    chosen: set[str] = set()
    for pattern in _patterns(argument, target):
        found = _matching(argument, pattern, names)
        if not found:
            raise ValueError(f"{argument} {_text(pattern)!r} matches none of the layers {', '.join(map(repr, names))}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _patterns(argument: str, target: Any) -> list[Any]:
    single = isinstance(target, str | re.Pattern) or (isinstance(target, int) and not isinstance(target, bool))
    patterns = [target] if single else list(target) if isinstance(target, Iterable) else None
    if not patterns:
        raise TypeError(f"{argument} must be a layer's name, a pattern, or a list of them, got {target!r}")
    return patterns


def _matching(argument: str, pattern: Any, names: Sequence[str]) -> list[str]:
    if isinstance(pattern, re.Pattern):
        return [name for name in names if pattern.fullmatch(name)]
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        return [names[pattern]] if -len(names) <= pattern < len(names) else []
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} must hold strings, compiled expressions or ints, got {pattern!r}")
    if pattern in names:
        return [pattern]
    found = fnmatch.filter(names, pattern)
    if found:
        return found
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error:
        return []


def _text(pattern: Any) -> Any:
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern
