"""Which of nblora's result files a file is, and what is in it: what `nblora plot` and `nblora compare` begin with."""

import contextlib
import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nblora.errors import FormatError
from nblora.storage.bounded import parse_json, read_bounded

LARGEST = 1 << 28
"""Bytes of a result file."""
MOST_LINES = 500_000
"""Of a CSV file."""

KINDS = {
    "sweep": "the results of `nblora sweep` (.jsonl)",
    "demo": "results.json of `nblora demo`",
    "table": "results.csv of `nblora demo`",
    "bench": "results.json of `nblora bench`",
    "comparison": "the --json file of `nblora compare`",
    "inspection": "what `nblora inspect --json` prints",
    "curves": "a CSV of learning curves with the columns method, seed and epoch",
    "history": "the CSV of a `History`, or the checkpoint of a `fit` (.safetensors)",
    "layer": "a layer, adapter or model that nblora saved (.safetensors)",
}


class ResultFile(NamedTuple):
    """A file's kind, a key of `KINDS`, and its content: of JSON what it holds, of CSV the rows, else the object."""

    kind: str
    content: Any


def read_result_file(path: str | os.PathLike[str]) -> ResultFile:
    """Recognise and read one of nblora's result files.

    Raises
    ------
    FormatError
        For any other file; the message lists what there is.
    """
    name = Path(path)
    if name.suffix == ".safetensors":
        return _safetensors(name)
    data = read_bounded(name, LARGEST, follow_links=True)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _unknown(name) from None
    if name.suffix == ".csv":
        return _csv(name, text)
    first = text.lstrip().partition("\n")[0]
    if '"nblora.sweep"' in first:
        from nblora.sweep import read_results
        from nblora.sweep.store import check_origin

        records = list({record["key"]: record for record in read_results(name)}.values())  # failed runs are repeated
        check_origin(records, os.fspath(name))
        return ResultFile("sweep", records)
    try:
        content = parse_json(data, infinities=True)
    except ValueError:
        raise _unknown(name) from None
    kind = _kind_of_json(content)
    if kind is None:
        raise _unknown(name)
    return ResultFile(kind, content)


def _safetensors(name: Path) -> ResultFile:
    """A saved layer, or the history of a run's checkpoint, which holds no whole model."""
    from nblora.layers.base import layer_from_state
    from nblora.storage.checkpoint import read_checkpoint

    def build(kind: str, config: dict[str, Any], tensors: dict[str, Any]) -> ResultFile:
        if "fit" in config:
            return ResultFile("history", config["fit"]["rows"])
        return ResultFile("layer", layer_from_state(kind, config, tensors))

    return read_checkpoint(name, build)


def _kind_of_json(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return None
    if content.get("format") == "nblora.comparison":
        return "comparison"
    if {"not_adapted", "methods"} <= content.keys():
        return "demo"
    if {"suite", "groups"} <= content.keys():
        return "bench"
    if {"modules", "config"} <= content.keys():
        return "inspection"
    return None


def _csv(name: Path, text: str) -> ResultFile:
    lines = text.splitlines()
    if len(lines) > MOST_LINES:
        raise FormatError(f"{name}: has {len(lines)} lines; a CSV file of results has at most {MOST_LINES}")
    try:
        rows = list(csv.DictReader(lines))
    except csv.Error:
        raise _unknown(name) from None
    columns = set(rows[0]) if rows else set()
    if {"method", "seed", "epoch"} <= columns:
        return ResultFile("curves", rows)
    if {"method", "test_accuracy_mean", "test_accuracy_std"} <= columns:
        return ResultFile("table", rows)
    if {"epoch", "loss"} <= columns:
        return ResultFile("history", rows)
    raise _unknown(name)


def _unknown(name: Path) -> FormatError:
    known = "".join(f"\n  {text}" for text in KINDS.values())
    return FormatError(f"{name}: none of nblora's result files, which are{known}")


@contextlib.contextmanager
def understood(kind: str, place: str = "the file") -> Iterator[None]:
    """FormatError where content that was taken for this kind turns out to be something else inside the block."""
    try:
        yield
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise FormatError(f"{place}: taken for {KINDS[kind]}, but {error!r} came in reading it") from error


def values_by_seed(result: ResultFile, metric: str | None = None) -> tuple[str, dict[str, dict[Any, float]], list[str]]:
    """Return the metric's name, {method: {seed: value}}, and remarks on how the values were chosen.

    Of a sweep each method's settings are those with the best mean on the validation split; what is reported is the
    test split, where the sweep has one.

    Raises
    ------
    FormatError
        For a file without values over seeds, or without this metric.
    """
    with understood(result.kind):
        return _values_by_seed(result, metric)


def _values_by_seed(result: ResultFile, metric: str | None) -> tuple[str, dict[str, dict[Any, float]], list[str]]:
    if result.kind == "sweep":
        return _of_sweep(result.content, metric)
    if result.kind == "demo":
        name = metric or "test_accuracy"
        first = result.content["settings"]["seed"]
        rows = [row for row in result.content["methods"] if isinstance(row.get(name), list)]
        found = {row["method"]: dict(enumerate(map(float, row[name]), first)) for row in rows}
    elif result.kind == "curves":
        name = metric or ("val_accuracy" if "val_accuracy" in result.content[0] else "loss")
        found = _last_epochs(result.content, name)
    else:
        raise FormatError(
            f"{KINDS[result.kind]} has no values over seeds to compare; give a sweep, demo or curves file"
        )
    if not found:
        raise FormatError(f"{KINDS[result.kind]} has no values over seeds called {name!r}")
    return name, found, []


def _last_epochs(rows: list[dict[str, str]], name: str) -> dict[str, dict[Any, float]]:
    found: dict[str, dict[Any, float]] = {}
    for row in rows:  # a later epoch replaces an earlier one
        if row.get(name):
            found.setdefault(row["method"], {})[row["seed"]] = float(row[name])
    return found


def _of_sweep(records: list[dict[str, Any]], metric: str | None) -> tuple[str, dict[str, dict[Any, float]], list[str]]:
    from nblora.sweep.summary import best_of_each_method, default_metric, label, over_seeds, varied_settings

    try:
        report = metric or default_metric(records, "test")
        split, _, figure = report.partition("_")
        choose = f"val_{figure}" if split == "test" else report
        best = best_of_each_method(records, choose, report)
    except (ValueError, KeyError) as error:
        raise FormatError(f"this sweep cannot be compared by {metric!r}: {error}") from error
    if not best:
        raise FormatError(f"no run of this sweep has a result called {report!r}")
    varied = [name for name in varied_settings(records) if name != "method"]
    remarks = [
        f"{method}: {label(settings, varied)}" for method, (settings, _) in best.items() if label(settings, varied)
    ]
    counts = len(over_seeds(records, choose))
    if remarks:
        remarks.insert(0, f"Settings with the best mean {choose} of each method, among {counts}:")
    if counts > len(best) and choose == report:
        remarks.append("Chosen by the figure that is reported, which flatters the method with more settings.")
    return report, {method: values for method, (_, values) in best.items()}, remarks
