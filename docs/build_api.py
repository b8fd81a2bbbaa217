"""Writes docs/api.md from the docstrings of nblora's public names: `python docs/build_api.py`."""

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

TARGET = Path(__file__).parent / "api.md"
MODULES = (
    "nblora",
    "nblora.layers",
    "nblora.adapters",
    "nblora.pretrained",
    "nblora.text",
    "nblora.training",
    "nblora.errors",
    "nblora.sweep",
    "nblora.compare",
    "nblora.estimators",
    "nblora.plots",
)
HEAD = """# API reference

Made from the docstrings by `python docs/build_api.py`; a test compares the two. Names that begin with an underscore,
and modules that are not listed, may change at any time.
"""
SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n-{3,}$", re.MULTILINE)


def build() -> str:
    """Return the whole page."""
    seen: set[int] = set()
    parts = [HEAD]
    for name in MODULES:
        module = importlib.import_module(name)
        parts += [f"\n## `{name}`\n", _docstring(module)]
        for key, item in _public(module):
            if id(item) in seen or isinstance(item, ModuleType | str | dict):
                continue
            seen.add(id(item))
            parts += _class(key, item) if inspect.isclass(item) else _function(key, item, "###")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """A module's `__all__`, or what it defines itself."""
    names = getattr(module, "__all__", None)
    if names is None:
        items = vars(module).items()
        names = [n for n, item in items if getattr(item, "__module__", "") == module.__name__ and not n.startswith("_")]
    return ((name, getattr(module, name)) for name in names)


def _class(name: str, item: type) -> Iterator[str]:
    yield from _function(name, item, "###")
    for key, member in _members(item).items():
        if isinstance(member, property):
            yield f"\n#### `{name}.{key}`\n"
            yield _docstring(member)
        elif callable(member):
            yield from _function(f"{name}.{key}", member, "####")


def _members(item: type) -> dict[str, Any]:
    """Public methods and properties of a class, in the order of the source.

    Those that it inherits from a class that has no place on the page are its own to the reader.
    """
    found: dict[str, Any] = {}
    for base in item.__mro__:
        if base is not item and (base in _classes() or not base.__module__.startswith("nblora")):
            continue
        for key, raw in vars(base).items():
            member = raw if isinstance(raw, property) else getattr(base, key)
            described = inspect.getdoc(member) and (
                isinstance(raw, property | classmethod) or inspect.isfunction(member)
            )
            if not key.startswith("_") and described:
                found.setdefault(key, member)
    return found


@functools.cache
def _classes() -> frozenset[type]:
    """The classes that have a place on the page."""
    modules = [importlib.import_module(name) for name in MODULES]
    return frozenset(item for module in modules for _, item in _public(module) if inspect.isclass(item))


def _function(name: str, item: Any, level: str) -> Iterator[str]:
    yield f"\n{level} `{name}`\n"
    if not (inspect.isclass(item) and issubclass(item, Exception)):
        yield f"```text\n{_signature(name, item)}\n```\n"
    yield _docstring(item)


def _signature(name: str, item: Any) -> str:
    """The call as it is written, one argument a line where it is long, without types: the docstring has them."""
    signature = inspect.signature(item)
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name != "self"
    ]
    bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    text = f"{name}{bare}"
    if len(text) <= 110:
        return text
    inner = [piece.strip() for piece in str(bare)[1:-1].split(", ")]
    return "\n".join([f"{name}(", *(f"    {piece}," for piece in inner), ")"])


def _docstring(item: Any) -> str:
    """The docstring as Markdown: its text as it is, each numpydoc section as a block under its bold name."""
    text = inspect.getdoc(item) or ""
    pieces = SECTION.split(text)
    lines = [_prose(pieces[0])]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        language = "pycon" if title == "Examples" else "text"
        plain = body.strip("\n").rstrip()
        lines.append(
            f"\n**{title}**\n\n" + (_prose(plain) if title == "Notes" else f"```{language}\n{plain}\n```") + "\n"
        )
    return "\n".join(lines)


def _prose(text: str) -> str:
    return text.strip().replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    TARGET.write_text(build(), encoding="utf-8")
    print(f"Written to {TARGET}")
