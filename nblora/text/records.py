"""Records: files of texts to learn from, or to predict, line by line; JSON Lines, CSV and TSV.

Four kinds of records, told from the first and checked in all:

    labelled    {"text", "label"}, perhaps with "text_pair"
    completion  {"prompt", "completion"}
    messages    {"messages"}: [{"role", "content"}, ...]
    text        {"text"}, perhaps with "text_pair"
"""

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nblora.errors import FormatError
from nblora.storage.bounded import open_named, parse_json

SUFFIXES = (".jsonl", ".csv", ".tsv")
PARTS = ("train", "valid", "test")
KINDS = {
    "labelled": ({"text", "label"}, {"text_pair"}),
    "completion": ({"prompt", "completion"}, set[str]()),
    "messages": ({"messages"}, set[str]()),
    "text": ({"text"}, {"text_pair"}),
}
"""The fields that a record of each kind must have, and may have."""
EXPECTED = "text and label (and text_pair), prompt and completion, messages, or text alone"
ROLES = ("system", "user", "assistant", "tool")
_LONGEST_CELL = 1 << 28


@dataclass(frozen=True)
class Records:
    """The records of one file, all with the same fields.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    rows : list of dict
        Texts and labels are strings; of "messages" a list of dicts.
    path : Path
    lines : list of int
        The line of the file, from 1, on which each record begins.
    """

    kind: str
    rows: list[dict[str, Any]]
    path: Path
    lines: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, field: str) -> list[Any] | None:
        """One field of all records; None where they have none of that name."""
        return [row[field] for row in self.rows] if field in self.rows[0] else None

    def place(self, record: int) -> str:
        """Where a record stands, as messages say it."""
        return _place(self.path, self.lines[record])

    def part(self, places: Any) -> "Records":
        """Some of the records, by their places."""
        return Records(self.kind, [self.rows[p] for p in places], self.path, [self.lines[p] for p in places])


def read_records(path: str | os.PathLike[str]) -> Records:
    """Read a file of records.

    Parameters
    ----------
    path : path-like
        `.jsonl`, one JSON object a line; `.csv` or `.tsv` with a line of field names. UTF-8. Blank lines are passed
        over.

    Returns
    -------
    Records
        At least one. Labels that are integers become their digits.

    Raises
    ------
    FormatError
        That names the file and the line: for broken JSON (with its column), a field that is unknown or missing, a value
        of another type, records of several kinds, and a file without any.
    OSError
        For a file that cannot be read.
    """
    name = Path(path)
    if name.is_dir():
        raise FormatError(f"{name}: is a folder; expected a file of records ({', '.join(SUFFIXES)})")
    suffix = name.suffix.lower()
    if suffix not in SUFFIXES:
        raise FormatError(f"{name}: expected a file whose name ends in {', '.join(SUFFIXES)}")
    with os.fdopen(open_named(name), "rb") as file:
        found = _json_lines(name, file) if suffix == ".jsonl" else _table(name, file, "," if suffix == ".csv" else "\t")
        rows: list[dict[str, Any]] = []
        lines: list[int] = []
        kind = ""
        for line, row in found:
            kind = kind or _kind(row, _place(name, line))
            if rows and row.keys() != rows[0].keys():
                raise FormatError(
                    f"{_place(name, line)}: has the fields {_some(row)}, and the first record (line {lines[0]}) has "
                    f"{_some(rows[0])}: all records of a file must be of one kind"
                )
            rows.append({field: _CHECKS[field](value, field, _place(name, line)) for field, value in row.items()})
            lines.append(line)
    if not rows:
        raise FormatError(f"{name}: holds no records; each must have the fields {EXPECTED}")
    return Records(kind, rows, name, lines)


def read_parts(path: str | os.PathLike[str]) -> dict[str, Records]:
    """Read a file, or a folder with `train`, and perhaps `valid` and `test`, in any of the forms.

    Returns
    -------
    dict of str to Records
        "train", and "valid" and "test" where they are there. Of a file: "train".

    Raises
    ------
    FormatError
        As `read_records`; for a folder without `train`, a part that is there twice, and parts of several kinds.
    OSError
        For what cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {"train": read_records(folder)}
    files = sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES)
    parts: dict[str, Records] = {}
    for part in PARTS:
        named = [each for each in files if each.stem == part]
        if len(named) > 1:
            raise FormatError(f"{folder}: holds {' and '.join(each.name for each in named)}; expected one of them")
        if named:
            parts[part] = read_records(named[0])
    if "train" not in parts:
        there = f"holds {', '.join(each.name for each in files)}" if files else "holds no file of records"
        raise FormatError(f"{folder}: {there}; expected train.jsonl, and perhaps valid.jsonl and test.jsonl (or .csv)")
    if "valid" not in parts and (other := next((each for each in files if each.stem in ("validation", "dev")), None)):
        raise FormatError(f"{other}: is not read under this name; call it valid{other.suffix}")
    train = parts["train"]
    for records in parts.values():
        check_same_fields(records, train)
    return parts


def check_same_fields(records: Records, first: Records) -> None:
    """FormatError for records with other fields than the first file's."""
    if records.rows[0].keys() != first.rows[0].keys():
        raise FormatError(
            f"{records.path}: its records have the fields {_some(records.rows[0])}, and those of {first.path} have "
            f"{_some(first.rows[0])}: they must be of one kind"
        )


def _place(path: Path, line: int) -> str:
    return f"{path}, line {line}"


def _some(fields: Any) -> str:
    return ", ".join(map(str, fields)) or "(none)"


def _kind(row: dict[str, Any], place: str) -> str:
    """Which kind the first record is of."""
    for kind, (needed, more) in KINDS.items():
        if needed <= row.keys() <= needed | more:
            return kind
    known = set().union(*(needed | more for needed, more in KINDS.values()))
    unknown = [field for field in row if field not in known]
    fault = f"the field {unknown[0]!r} is unknown" if unknown else f"has the fields {_some(row)}"
    raise FormatError(f"{place}: {fault}; expected {EXPECTED}")


# --- forms -----------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, data in enumerate(file, 1):
        data = (data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data).rstrip()
        if not data:
            continue
        try:
            row = parse_json(data)
        except json.JSONDecodeError as error:
            raise FormatError(f"{_place(path, line)}, column {error.colno}: not valid JSON: {error.msg}") from None
        except ValueError as error:
            raise FormatError(f"{_place(path, line)}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise FormatError(f"{_place(path, line)}: expected a JSON object, got {type(row).__name__}")
        yield line, row


def _table(path: Path, file: Any, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    line = 1
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if len(set(names)) != len(names):
                raise FormatError(f"{_place(path, 1)}: the field {_twice(names)!r} occurs twice")
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    if len(cells) != len(names):
                        raise FormatError(
                            f"{_place(path, line)}: has {len(cells)} fields, and the first line names {len(names)} "
                            f"({_some(names)}); quote texts that hold {delimiter!r} or a line break"
                        )
                    yield line, dict(zip(names, cells, strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise FormatError(f"{_place(path, line)}: not valid {path.suffix[1:].upper()}: {error}") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{_place(path, line)} or after it: not UTF-8 ({error.reason})") from None


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


# --- values ----------------------------------------------------------------------------------------------------------


def _text(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{place}: {field} must be a text, got {_shown(value)}")
    return value


def _label(value: Any, field: str, place: str) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{place}: {field} must be a text or an integer, got {_shown(value)}")
    return value


def _messages(value: Any, field: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise FormatError(f"{place}: {field} must be a list of messages, got {_shown(value)}")
    for number, message in enumerate(value):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise FormatError(
                f"{place}: message {number} must have a role ({', '.join(ROLES)}) and a content that is a text, got "
                f"{_shown(message)}"
            )
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_CHECKS = {
    "text": _text,
    "text_pair": _text,
    "label": _label,
    "prompt": _text,
    "completion": _text,
    "messages": _messages,
}
