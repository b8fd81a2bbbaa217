"""`nblora predict`: labels or embeddings of the texts of a file."""

import contextlib
import json
import sys
from typing import Any

import click

from nblora.cli import _text


@click.command()
@_text.model_option()
@_text.adapter_option()
@click.option("--data", required=True, metavar="FILE", help="A .jsonl, .csv or .tsv file with a field text.")
@click.option(
    "--output", "-o", metavar="FILE.jsonl", type=click.Path(dir_okay=False), help="[default: standard output]"
)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Texts at once.")
@click.option(
    "--max-length", metavar="N", type=click.IntRange(1), help="Tokens of a text.  [default: as many as in training]"
)
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
@_text.command
def command(
    model: str, adapter: str | None, data: str, output: str | None, batch_size: int, max_length: int | None, quiet: bool
) -> None:
    """Predict labels with their probabilities, or compute embeddings where there are no labels.

    Records are {"text": ...}, perhaps with "text_pair", and perhaps with a "label": then the share that is predicted
    right is printed at the end. A line of the output is, in the order of the records,

    \b
      {"text": ..., "label": "spam", "probabilities": {"ham": 0.03, "spam": 0.97}}
      {"text": ..., "embedding": [...]}

    Labels are called as in training (labels.json of the adapter), or else as the model's config.json calls them.

    Needs: pip install 'nblora[text]'.
    """
    from nblora.errors import FormatError
    from nblora.text.predicting import load_predictor
    from nblora.text.records import read_records

    records = read_records(data)
    texts, pairs, known = records.column("text"), records.column("text_pair"), records.column("label")
    if texts is None:
        raise FormatError(f"{data}: its records have no field text: {', '.join(records.rows[0])}")
    predictor = load_predictor(model, adapter, max_length=max_length)
    with _bar(len(texts), quiet) as advance:
        found = predictor.predict(texts, pairs, batch_size=batch_size, progress=advance)
    lines = [_line(row, answer) for row, answer in zip(records.rows, found, strict=True)]
    _write(lines, output)
    if not quiet:
        for text in _summary(predictor.labels, found, known, output):
            click.echo(text, err=output is None)


def _line(row: dict[str, Any], answer: dict[str, Any]) -> str:
    own = {field: row[field] for field in ("text", "text_pair") if field in row}
    return json.dumps(own | answer, ensure_ascii=False)


def _write(lines: list[str], output: str | None) -> None:
    if output is None:
        for line in lines:
            click.echo(line)
        return
    from pathlib import Path

    from nblora.storage.atomic import replace_whole

    with replace_whole(Path(output)) as file:
        file.writelines(f"{line}\n".encode() for line in lines)


def _summary(labels: Any, found: list[dict[str, Any]], known: Any, output: str | None) -> list[str]:
    """How many of each label, and how many of those that were known are right."""
    told = []
    if labels is not None:
        counts = {name: sum(answer["label"] == name for answer in found) for name in labels}
        told.append(", ".join(f"{count} {name}" for name, count in counts.items() if count))
        if known is not None:
            right = sum(answer["label"] == label for answer, label in zip(found, known, strict=True))
            told.append(f"{right} of {len(found)} as labelled ({right / len(found):.1%})")
    return told + ([f"Written to {output}"] if output else [])


@contextlib.contextmanager
def _bar(total: int, quiet: bool) -> Any:
    """Yield a function that counts texts, in a bar where standard error is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" texts", dynamic_ncols=True) as bar:
        yield bar.update
