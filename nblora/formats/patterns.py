"""Expressions that a file gives for the names of modules: what PEFT matches, in a time that the file cannot stretch.

Plain names, and names with dots, are compared. Real expressions are parsed by Python's own parser, but not matched by
`re`, whose time can double with every character: all ways through an expression are followed at once (Thompson), which
takes at most the product of the expression's and the name's lengths. Look-around and back-references, which that cannot
do, are refused.
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]  # the tree of an expression, which `re` offers nowhere
from typing import Any, NamedTuple

from nblora.errors import FormatError

LONGEST = 1 << 17
"""Characters of an expression: a list of every module of a large model, as PEFT writes it, has some 100,000."""
MOST_STEPS = 1 << 18
"""Characters of an expression once its repetitions are written out."""
PATIENCE = 10.0
"""Seconds of the processor that all of a file's real expressions may take together."""

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

    def _search(self, expression: "_Expression", module: str) -> bool:
        began = time.thread_time()
        try:
            return expression.matches(module, began + PATIENCE - self._spent)
        except TimeoutError:
            raise FormatError(
                f"{self._place}: its expressions took more than {PATIENCE:g} s to match; write plain names"
            ) from None
        finally:
            self._spent += time.thread_time() - began

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
            if not self._whole:
                parser.parse(rf"(.*\.)?({text})$")  # as PEFT writes it, in which a flag would come too late
            tree = parser.parse(text)
            name = _as_name(list(tree))
            return name or _Expression(tree, self._whole)
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"{self._place} holds {text!r}, not a regular expression: {error}") from None
        except NotImplementedError as error:
            raise FormatError(
                f"{self._place} holds the expression {text!r} with {error}, which could take for ever to match; write "
                "plain names, or repetitions of what they are made of"
            ) from None


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
    if any(code not in (codes.LITERAL, codes.ANY) or (code, value) == (codes.LITERAL, 0) for code, value in tree):
        return None
    return _Name("".join(chr(value) if code == codes.LITERAL else _ANY for code, value in tree), anchored)


_SINGLE = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)
_FLAGS = re.UNICODE | re.IGNORECASE | re.DOTALL | re.VERBOSE


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _between_words(text: str, at: int) -> bool:
    return (at > 0 and _is_word(text[at - 1])) != (at < len(text) and _is_word(text[at]))


_PLACES: dict[Any, Callable[[str, int], bool]] = {
    codes.AT_BEGINNING: lambda text, at: at == 0,
    codes.AT_BEGINNING_STRING: lambda text, at: at == 0,
    codes.AT_END: lambda text, at: text[at:] in ("", "\n"),
    codes.AT_END_STRING: lambda text, at: at == len(text),
    codes.AT_BOUNDARY: _between_words,
    codes.AT_NON_BOUNDARY: lambda text, at: text != "" and not _between_words(text, at),
}
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_WORD: _is_word,
    codes.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    codes.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    codes.CATEGORY_NOT_WORD: lambda letter: not _is_word(letter),
}


class _Expression:
    """A parsed expression as a graph: states that take one letter, and states that fork into others.

    Parameters
    ----------
    tree : SubPattern
        Of Python's parser.
    whole : bool
        Whether it must match a whole name, or the end of a dotted one.

    Raises
    ------
    NotImplementedError
        For a kind of expression that a graph cannot hold, naming it.
    """

    def __init__(self, tree: Any, whole: bool) -> None:
        flags = tree.state.flags
        if flags & ~_FLAGS:
            raise NotImplementedError("flags")
        self._takes: list[Callable[[str], bool] | None] = [None]  # of a state: whether it takes a letter; None: none
        self._place: list[Callable[[str, int], bool] | None] = [None]  # of a state that holds in certain places only
        self._next: list[list[int]] = [[]]  # of state 0, the end, there is none
        if whole:
            self._start = self._sequence(tree, 0, flags)
        else:
            begin = self._sequence(tree, self._add([0], place=_PLACES[codes.AT_END]), flags)
            prefix = parser.parse(r"(?:.*\.)?")
            self._start = self._sequence(prefix, begin, 0)

    def matches(self, text: str, deadline: float) -> bool:
        """Whether it matches all of `text`; TimeoutError where this thread has computed until `deadline` before."""
        states = self._reachable([self._start], text, 0)
        for at, letter in enumerate(text, 1):
            if time.thread_time() > deadline:
                raise TimeoutError
            taken = [state for state in states if (takes := self._takes[state]) and takes(letter)]
            states = self._reachable([self._next[state][0] for state in taken], text, at)
        return 0 in states

    def _reachable(self, states: list[int], text: str, at: int) -> set[int]:
        """The states that are reached without taking a letter, and these."""
        found = set()
        while states:
            state = states.pop()
            if state in found:
                continue
            place = self._place[state]
            if place is None or place(text, at):
                found.add(state)
                if self._takes[state] is None:
                    states += self._next[state]
        return found

    def _add(
        self,
        following: list[int],
        takes: Callable[[str], bool] | None = None,
        place: Callable[[str, int], bool] | None = None,
    ) -> int:
        if len(self._next) > MOST_STEPS:
            raise NotImplementedError(f"repetitions that come to more than {MOST_STEPS} characters")
        self._takes.append(takes)
        self._place.append(place)
        self._next.append(following)
        return len(self._next) - 1

    def _sequence(self, nodes: Iterable[Any], following: int, flags: int) -> int:
        for code, value in reversed(list(nodes)):
            following = self._node(code, value, following, flags)
        return following

    def _node(self, code: Any, value: Any, following: int, flags: int) -> int:
        """The first state of a node of the tree that goes on to `following`."""
        if code in _SINGLE:
            return self._add([following], takes=_taker(code, value, flags))
        if code == codes.AT and value in _PLACES:
            return self._add([following], place=_PLACES[value])
        if code == codes.BRANCH:
            return self._add([self._sequence(branch, following, flags) for branch in value[1]])
        if code == codes.SUBPATTERN:
            _, added, removed, inner = value
            return self._sequence(inner, following, (flags | added) & ~removed)
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, inner = value
            return self._repeat(least, most, inner, following, flags)
        raise NotImplementedError(str(code).lower().replace("_", " "))

    def _repeat(self, least: int, most: int, inner: Any, following: int, flags: int) -> int:
        first = following
        if most == codes.MAXREPEAT:
            first = self._add([following])
            self._next[first].append(self._sequence(inner, first, flags))
        else:
            for _ in range(most - least):
                first = self._add([self._sequence(inner, first, flags), following])
        for _ in range(least):
            before, first = first, self._sequence(inner, first, flags)
            if first == before:  # nothing, as often as you like
                break
        return first


def _taker(code: Any, value: Any, flags: int) -> Callable[[str], bool]:
    """Whether a letter is what a node of one letter stands for."""
    if code == codes.ANY:
        return lambda letter: letter != "\n" or bool(flags & re.DOTALL)
    items = [(codes.LITERAL, value)] if code in (codes.LITERAL, codes.NOT_LITERAL) else list(value)
    negated = code == codes.NOT_LITERAL or items[0][0] == codes.NEGATE
    tests = [_item(kind, what) for kind, what in items if kind != codes.NEGATE]

    def takes(letter: str) -> bool:
        letters = {letter, letter.lower(), letter.upper()} if flags & re.IGNORECASE else (letter,)
        return negated != any(test(each) for test in tests for each in letters)

    return takes


def _item(kind: Any, value: Any) -> Callable[[str], bool]:
    if kind == codes.LITERAL:
        return chr(value).__eq__
    if kind == codes.RANGE:
        low, high = chr(value[0]), chr(value[1])
        return lambda letter: low <= letter <= high
    if kind == codes.CATEGORY and value in _CATEGORIES:
        return _CATEGORIES[value]
    raise NotImplementedError(str(value).lower().replace("_", " "))
