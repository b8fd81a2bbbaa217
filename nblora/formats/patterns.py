"""Expressions that a file gives for the names of modules: what PEFT matches, in a time that the file cannot stretch.

Plain names, and names with dots, are compared; of real expressions only kinds are accepted that Python's `re` matches
in a time bounded by a low power of the name's length: no repetition inside a repetition or of a group, no look-around,
no back-reference. They are compiled once.
"""

import itertools
import re
import time
from collections.abc import Mapping
from pathlib import Path
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]  # the tree of an expression, which `re` offers nowhere
from typing import Any, NamedTuple

from nblora.errors import FormatError

LONGEST = 1 << 17
"""Characters of an expression: a list of every module of a large model, as PEFT writes it, has some 100,000."""
LONGEST_NAME = 1000
UNBOUNDED = 4
"""Repetitions without an end in one expression, each of which may multiply the time by the name's length."""
MOST_REPEATS = 1000
PATIENCE = 10.0
"""Seconds that all of a file's real expressions may take together."""

_SPECIAL = re.compile(r"[^\w.\-]")
_TOKEN = re.compile(r"\\.|.", re.DOTALL)
_ANY = "\0"


class _Name(NamedTuple):
    """A name to compare, with NUL for any character; `anchored` where nothing may come before it."""

    text: str
    anchored: bool = False


class Patterns:
    """The values of {expression: value}, by the first expression that a module's name matches.

    Parameters
    ----------
    field : str
        Where they come from in the file, for messages.
    values : mapping of str to value
    path : Path
        The file, for messages.
    whole : bool
        Whether an expression must match the whole name; by default it matches the end of a dotted name, as in PEFT's
        `rank_pattern`.

    Raises
    ------
    FormatError
        For what is no expression, and for one of a kind, length or time that is not accepted.
    """

    def __init__(self, field: str, values: Mapping[str, Any], path: Path, whole: bool = False) -> None:
        self._place = f"{path}: {field}"
        self._whole = whole
        self._found: dict[str, Any] = {}
        self._spent = 0.0
        self._entries = [(self._alternatives(text), value) for text, value in values.items()]

    def value(self, module: str, default: Any) -> Any:
        """The value for a module of this name."""
        if module not in self._found:
            matching = (value for alternatives, value in self._entries if self._matches(alternatives, module))
            self._found[module] = next(matching, default)
        return self._found[module]

    def _matches(self, alternatives: list[Any], module: str) -> bool:
        return any(
            self._is_name(one, module) if isinstance(one, _Name) else self._search(one, module) for one in alternatives
        )

    def _is_name(self, wanted: _Name, module: str) -> bool:
        name, anchored = wanted
        start = len(module) - len(name)
        if start < 0 or (start and (anchored or self._whole or module[start - 1] != ".")):
            return False
        end = module[start:]
        return end == name or (
            _ANY in name and all(a in (b, _ANY) and b != "\n" for a, b in zip(name, end, strict=True))
        )

    def _search(self, expression: re.Pattern[str], module: str) -> bool:
        if len(module) > LONGEST_NAME:
            raise FormatError(
                f"{self._place}: is to match a name of {len(module)} characters; at most {LONGEST_NAME} can be"
            )
        began = time.perf_counter()
        found = expression.fullmatch(module) is not None
        self._spent += time.perf_counter() - began
        if self._spent > PATIENCE:
            raise FormatError(
                f"{self._place}: its expressions took more than {PATIENCE:g} s to match; write plain names"
            )
        return found

    # --- reading an expression ---------------------------------------------------------------------------------

    def _alternatives(self, text: str) -> list[Any]:
        """Names to compare, or compiled expressions."""
        if len(text) > LONGEST:
            raise FormatError(
                f"{self._place} holds an expression of {len(text)} characters; expected at most {LONGEST}"
            )
        if not _SPECIAL.search(text):
            return [_Name(text.replace(".", _ANY))]
        return [self._read(part) for part in _split(text)]

    def _read(self, text: str) -> Any:
        try:
            tree = list(parser.parse(text))
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"{self._place} holds {text!r}, not a regular expression: {error}") from None
        name = _as_name(tree)
        if name is not None:
            return name
        unbounded = sum(_unbounded(node, self._refuse(text)) for node in tree)
        if unbounded > UNBOUNDED:
            raise self._refuse(text)(f"{unbounded} repetitions without an end")
        return re.compile(text if self._whole else rf"(.*\.)?({text})$")

    def _refuse(self, text: str) -> Any:
        def fault(kind: str) -> FormatError:
            return FormatError(
                f"{self._place} holds the expression {text!r} with {kind}, which could take for ever to match; "
                "write plain names, or repetitions of single characters"
            )

        return fault


def _split(text: str) -> list[str]:
    """The alternatives of an expression without groups and sets, the expression itself otherwise."""
    tokens = _TOKEN.findall(text)
    if not {"(", "["}.isdisjoint(tokens):
        return [text]
    bars = [-1, *(place for place, token in enumerate(tokens) if token == "|"), len(tokens)]
    return ["".join(tokens[start + 1 : stop]) for start, stop in itertools.pairwise(bars)]


def _as_name(tree: list[Any]) -> _Name | None:
    """The name that an expression of literal characters and dots means, None for another expression."""
    anchored = bool(tree) and tree[0] == (codes.AT, codes.AT_BEGINNING)
    tree = tree[anchored:]
    if tree and tree[-1] == (codes.AT, codes.AT_END):
        tree = tree[:-1]
    if any(code not in (codes.LITERAL, codes.ANY) for code, _ in tree):
        return None
    return _Name("".join(chr(value) if code == codes.LITERAL else _ANY for code, value in tree), anchored)


_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)


def _unbounded(node: Any, fault: Any) -> int:
    """How many repetitions without an end a node of the tree holds; raises `fault(kind)` for what is not accepted."""
    code, value = node
    if code in _SINGLE or code == codes.AT:
        return 0
    if code == codes.BRANCH:
        return max(sum(_unbounded(inner, fault) for inner in branch) for branch in value[1])
    if code == codes.SUBPATTERN:
        return sum(_unbounded(inner, fault) for inner in value[-1])
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
        _, most, inner = value
        endless = most == codes.MAXREPEAT
        if not endless and most > MOST_REPEATS:
            raise fault(f"{most} repetitions")
        if most == 1:
            return sum(_unbounded(each, fault) for each in inner)
        if len(inner) != 1 or inner[0][0] not in _SINGLE:
            raise fault("a repeated group")
        return int(endless)
    raise fault(f"{str(code).lower().replace('_', ' ')}")
