"""The demo's table as text, Markdown, CSV and JSON, all made of the same dict, and the files that hold them."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nblora.storage.atomic import replace_whole

from .results import DemoResult

HEADINGS = ("method", "shifted test %", "upright test %", "trainable", "state bytes", "seconds", "settings chosen")
CSV_COLUMNS = (
    "method",
    "test_accuracy_mean",
    "test_accuracy_std",
    "upright_accuracy_mean",
    "upright_accuracy_std",
    "trainable_parameters",
    "state_bytes",
    "seconds_mean",
    "lr",
    "delta_lr",
    "merge_difference",
    "merge_relative_difference",
    "merge_changed_labels",
    "adapter_file",
)
CURVE_COLUMNS = ("method", "seed", "epoch", "loss", "val_loss", "val_accuracy")


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table, a tuple a row, for `DemoResult.as_dict()` or the JSON file's content."""
    rows: list[tuple[str, ...]] = []
    for row in (result["not_adapted"], *result["methods"]):
        adapted = row["candidate"] is not None
        rows.append(
            (
                row["method"],
                _percent(row["test_accuracy_mean"], row["test_accuracy_std"]),
                _percent(row["upright_accuracy_mean"], row["upright_accuracy_std"]),
                f"{row['trainable_parameters']:,}",
                f"{row['state_bytes']:,}",
                f"{row['seconds_mean']:.2f}" if adapted else "",
                _settings(row["candidate"]) if adapted else "",
            )
        )
    return rows


def _percent(mean: float, deviation: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _settings(candidate: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in candidate.items() if value is not None)


def text_table(result: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    rows = [HEADINGS, *table_rows(result)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    last = len(HEADINGS) - 1
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(result: Mapping[str, Any]) -> str:
    """The tables and what they were measured on, for README.md."""
    parts = [_markdown_rows(result)]
    if result["convolutional"] is not None:
        parts += ["The convolutional network:", _markdown_rows(result["convolutional"])]
    return "\n\n".join([*parts, f"{best_text(result)} {budget_text(result)} {machine_text(result)}"])


def _markdown_rows(network: Mapping[str, Any]) -> str:
    lines = [_markdown_line(HEADINGS), _markdown_line(["---", *["---:"] * (len(HEADINGS) - 2), "---"])]
    return "\n".join([*lines, *map(_markdown_line, table_rows(network))])


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def networks(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The results of each network, by its name."""
    found = {"dense": result, "convolutional": result["convolutional"]}
    return {name: network for name, network in found.items() if network is not None}


def best_text(result: Mapping[str, Any]) -> str:
    """Which method did best on each network, by its mean accuracy on shifted test images."""
    said = []
    for name, network in networks(result).items():
        best = max(network["methods"], key=lambda row: row["test_accuracy_mean"])
        accuracy = _percent(best["test_accuracy_mean"], best["test_accuracy_std"])
        said.append(f"{best['method']} on the {name} network ({accuracy} %)")
    left_out = "" if len(said) > 1 else " The convolutional network was left out: it would take the simulator hours."
    return f"Best on shifted test images: {'; '.join(said)}.{left_out}"


def budget_text(result: Mapping[str, Any]) -> str:
    """What every method was given."""
    samples, settings = result["samples"], result["settings"]
    seeds = len(result["not_adapted"]["test_accuracy"])
    return (
        f"Every method: {result['steps']} steps of {settings['batch_size']} samples on {samples['adaptation']} "
        f"shifted images; learning rates chosen on {samples['validation']} others; accuracy on "
        f"{samples['test']} test images, mean ± standard deviation over {seeds} "
        f"seed{'' if seeds == 1 else 's'}; seconds are one run's training."
    )


def machine_text(result: Mapping[str, Any]) -> str:
    """Where it was measured."""
    machine = result["machine"]
    versions = machine["versions"]
    return (
        f"Measured on {machine['cpu']}, {machine['cores']} cores of which {machine['threads']} computes, "
        f"nblora {result['nblora_version']}, Numba {versions['numba']}, NumPy {versions['numpy']}; "
        f"the whole demo took {result['seconds']:.0f} s"
        + (", compiling included." if result["compiled"] else ", its kernels compiled before.")
    )


def merge_text(result: Mapping[str, Any]) -> str:
    """How far merged and unmerged predictions lie apart."""
    rows = [row for network in networks(result).values() for row in network["methods"]]
    worst = max(rows, key=lambda row: row["merge_relative_difference"])
    changed = sum(row["merge_changed_labels"] for row in rows)
    return (
        f"Merged and unmerged outputs agree: the largest difference is {worst['merge_difference']:.1e} "
        f"({worst['merge_relative_difference']:.1e} of the largest output, {worst['method']}), and "
        f"{changed} of {len(rows) * result['samples']['test']} predicted classes changed."
    )


def write_report(result: DemoResult) -> dict[str, Path]:
    """Write results.json, results.csv, results.md and curves.csv; return their paths by what they hold."""
    folder = result.settings.output
    folder.mkdir(parents=True, exist_ok=True)
    content = result.as_dict()
    texts = {
        "everything (JSON)": ("results.json", json.dumps(content, indent=2, allow_nan=False) + "\n"),
        "table (CSV)": ("results.csv", _csv(CSV_COLUMNS, _csv_rows(content))),
        "table (Markdown)": ("results.md", markdown_table(content) + "\n"),
        "learning curves (CSV)": ("curves.csv", _csv(CURVE_COLUMNS, _curve_rows(content))),
    }
    paths = {}
    for what, (name, text) in texts.items():
        paths[what] = folder / name
        with replace_whole(paths[what]) as file:
            file.write(text.encode())
    return paths


def _csv_rows(content: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for name, network in networks(content).items():
        for row in (network["not_adapted"], *network["methods"]):
            flat = row | (row["candidate"] or {}) | {"method": _long_name(row["method"], name)}
            yield [flat.get(column) for column in CSV_COLUMNS]


def _long_name(method: str, network: str) -> str:
    """A method's name where rows of both networks stand in one table."""
    return method if network == "dense" else f"{method}, {network}"


def _curve_rows(content: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    first = content["settings"]["seed"]
    for name, network in networks(content).items():
        for row in network["methods"]:
            for place, curve in enumerate(row["curves"]):
                for epoch in curve:
                    method = _long_name(row["method"], name)
                    yield [method, first + place, *(epoch[column] for column in CURVE_COLUMNS[2:])]


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
