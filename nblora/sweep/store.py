"""The results file of a sweep: one JSON line a run, only ever appended to, whole again after any kill."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from nblora.errors import FormatError, NbloraError
from nblora.storage.bounded import check_parts, parse_json, read_bounded

from .space import run_key

FORMAT = "nblora.sweep"
FORMAT_VERSION = 1
LARGEST = 1 << 28
"""Bytes of a results file."""
REPEATED = "failed"  # the status of runs that a later start tries again


class ResultsFile:
    """An open results file; the process that has it open is the only one that writes to it.

    Parameters
    ----------
    path : path
        Made if it is not there. What a kill left of a last line is cut off.

    Attributes
    ----------
    records : dict of str to dict
        The last record of each run, by the run's key.

    Raises
    ------
    FormatError
        For a file that holds something else.
    NbloraError
        While another sweep writes to the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - open as long as the object lives, closed by `close`
        try:
            _lock(self._file, self.path)
            self._cut_torn_line()
            self.records = {record["key"]: record for record in read_results(self.path)}
        except BaseException:
            self._file.close()
            raise

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end == len(content):
            return
        try:
            json.loads(content[end:])
        except ValueError:
            if not (b'{"format"'.startswith(content[end : end + 9]) or content[end : end + 9] == b'{"format"'):
                raise FormatError(f"{self.path}: not a results file of `nblora sweep`; nothing was changed") from None
            self._file.truncate(end)
        else:  # only the line's end is missing
            self._append(b"\n")

    def is_finished(self, key: str) -> bool:
        """Whether the run with this key need not be repeated."""
        return key in self.records and self.records[key]["status"] != REPEATED

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one run's record and wait until it is on the disk."""
        line = {"format": FORMAT, "version": FORMAT_VERSION, **record}
        self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self.records[record["key"]] = line

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others write to the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a results file, in the order in which the runs ended; a torn last line is passed over.

    Raises
    ------
    FormatError
        For a file that holds something else, naming the line.
    """
    content = read_bounded(Path(path), LARGEST, follow_links=True)
    try:
        check_parts(content)
    except ValueError as error:
        raise FormatError(f"{os.fspath(path)}: {error}") from None
    lines = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):  # no line end: the writer was killed here
                continue
            raise FormatError(f"{os.fspath(path)}: line {number} is not JSON: {error}") from error
        _check_record(record, f"{os.fspath(path)}: line {number}")
        records.append(record)
    return records


def check_origin(records: Sequence[Mapping[str, Any]], place: str) -> None:
    """FormatError where records come from different data, or from different tasks on the same data.

    Their differences would be taken for those of methods. Records of old files do not say where they come from, but
    their keys tell whether it is where the others come from.
    """
    found = {name: sorted({record[name] for record in records if name in record}) for name in ("data", "task")}
    tasks = found["task"]
    strangers = any("task" not in r and r["key"] != run_key(r["settings"], task) for task in tasks[:1] for r in records)
    if len(found["data"]) > 1:
        what = f"different data ({', '.join(found['data'])})"
    elif len(tasks) > 1:
        what = f"the same data with different bases, targets, losses or numbers of threads ({', '.join(tasks)})"
    elif strangers:
        what = "other data, or of another base, target, loss or number of threads, of an older nblora"
    else:
        return
    raise FormatError(
        f"{place}: results on {what} do not belong in one file, where they would be compared with one another as if "
        "only the settings differed: keep a file for each, `nblora sweep --results FILE`"
    )


def _check_record(record: Any, place: str) -> None:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FormatError(f"{place} is no result of `nblora sweep`")
    if record.get("version") != FORMAT_VERSION:
        raise FormatError(f"{place} has format version {record.get('version')!r}, this nblora reads {FORMAT_VERSION}")
    for name, kind in {"key": str, "status": str, "settings": dict}.items():
        if not isinstance(record.get(name), kind):
            raise FormatError(f"{place}: {name!r} must be a {kind.__name__}, got {record.get(name)!r}")
    for name in ("data", "task", "error"):
        if not isinstance(record.get(name, ""), str):
            raise FormatError(f"{place}: {name!r} must be a str, got {record[name]!r}")
    for name, value in record["settings"].items():
        if not isinstance(value, str | int | float | None):
            raise FormatError(f"{place}: the setting {name!r} must be a number or a str, got {value!r}")
    if record["status"] == "done":
        _check_metrics(record.get("metrics"), place)


def _check_metrics(metrics: Any, place: str) -> None:
    if not isinstance(metrics, dict) or not metrics:
        raise FormatError(f"{place}: 'metrics' must be a dict of numbers, got {metrics!r}")
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{place}: the metric {name!r} must be a number, got {value!r}")


def _lock(file: Any, path: Path) -> None:
    """Lock the open file until it is closed, where the system can; NbloraError where another process has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise NbloraError(f"{path}: another sweep is writing to this file; wait for its end or name another") from error
