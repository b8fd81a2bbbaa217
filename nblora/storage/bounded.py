"""Files that nobody vouches for: opened only if regular, read only up to a bound, parsed strictly."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from nblora.errors import FormatError


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises
    ------
    FormatError
        If `path` is a symbolic link (other than a Hugging Face cache's own) or not a regular file.
    OSError
        If it cannot be opened.
    """
    return _open(resolve_link(Path(path)), path)


def open_named(path: str | os.PathLike[str]) -> int:
    """Like `open_regular`, for a file that the user named: it may be reached by links."""
    return _open(Path(os.path.realpath(path, strict=True)), path)


def _open(target: Path, path: str | os.PathLike[str]) -> int:
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(target, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path}: expected a regular file, got a folder or a special file")
    return descriptor


def resolve_link(path: Path) -> Path:
    """Return `path`, or what it points to if it is a link of a Hugging Face cache (snapshots/… to blobs/…).

    Raises
    ------
    FormatError
        For any other symbolic link: it may lead out of the checkpoint, or into the output.
    """
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path, strict=True))  # an OSError names a loop
    repository = target.parent.parent
    inside = path.absolute().parent.resolve()
    if target.parent.name == "blobs" and inside.is_relative_to(repository / "snapshots"):
        return target
    raise FormatError(f"{path}: is a symbolic link (to {target}); pass the real file or a folder that holds it")


def read_bounded(path: Path, limit: int, *, follow_links: bool = False) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises
    ------
    FormatError
        If it is larger, or not a regular file.
    OSError
        If it cannot be read.
    """
    with os.fdopen(open_named(path) if follow_links else open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{path}: larger than the {limit} bytes that such a file may have")
    return data


MOST_PARTS = 2_000_000
"""Commas, colons and brackets of one JSON text: a header of 100,000 tensors, or an index of 500,000, has no more. What
is parsed of them takes some 100 MB; a file of brackets alone would take 25 times its size."""


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object; raise FormatError, naming `path`, for anything else."""
    try:
        result = parse_json(data)
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(result, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(result).__name__}")
    return result


def check_parts(data: bytes) -> None:
    """ValueError for a text of more than MOST_PARTS commas, colons and brackets."""
    parts = sum(data.count(sign) for sign in (b",", b":", b"[", b"{"))
    if parts > MOST_PARTS:
        raise ValueError(f"{parts} commas, colons and brackets, more than the {MOST_PARTS} that such a file may have")


def parse_json(data: bytes, *, infinities: bool = False) -> Any:
    """Parse JSON as strictly as the format's reference implementation does, and without duplicate names.

    Parameters
    ----------
    data : bytes
        UTF-8.
    infinities : bool
        Take NaN, Infinity and -Infinity, which Python writes, for numbers.

    Returns
    -------
    object
        What `json.loads` gives; integers beyond 64 bits and minus zero come as floats.

    Raises
    ------
    ValueError
        For anything that is not strict JSON; the message says what.
    """
    check_parts(data)
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_int=lambda digits: float(digits) if digits == "-0" or len(digits) > 20 else int(digits),
            parse_constant=float if infinities else _reject_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name!r} occurs twice")
            seen.add(name)
    for name, value in pairs:
        _check_text(name)
        if isinstance(value, str):
            _check_text(value)
    return result


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the string {text!r} holds half of a surrogate pair") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
