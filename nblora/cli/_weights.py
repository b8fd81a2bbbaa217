"""What the commands on files of weights share: options, a progress bar, and how a run ends."""

import contextlib
import functools
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from nblora.storage.dtypes import BY_NAME

FLOATS = list(BY_NAME)


def adapter_option(required: bool = True) -> Callable:
    """`--adapter PATH[:WEIGHT]`, as often as wanted."""
    return click.option(
        "--adapter",
        "adapters",
        multiple=True,
        required=required,
        metavar="PATH[:WEIGHT]",
        help="A PEFT LoRA adapter's folder, and the factor of its change (1 if left out); may be repeated.",
    )


def output_option(text: str) -> Callable:
    """`--output OUT`."""
    return click.option("--output", "-o", required=True, metavar="OUT", type=click.Path(), help=text)


def force_option() -> Callable:
    """`--force`."""
    return click.option("--force", is_flag=True, help="Replace OUT though it is there and nblora did not write it.")


def memory_option() -> Callable:
    """`--max-memory SIZE`."""
    return click.option(
        "--max-memory", default="64MiB", show_default=True, metavar="SIZE", help="Memory for buffers and factors."
    )


def map_option() -> Callable:
    """`--map OLD=NEW`, as often as wanted."""
    return click.option(
        "--map",
        "maps",
        multiple=True,
        metavar="OLD=NEW",
        help="Read the dotted parts OLD of the adapter's names as NEW (may be empty); may be repeated.",
    )


def json_option() -> Callable:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")


def parse_adapters(texts: tuple[str, ...]) -> list[tuple[str, float]]:
    """Split PATH:WEIGHT; a path that exists as it is has the weight 1."""
    pairs = []
    for text in texts:
        path, colon, weight = text.rpartition(":")
        if not colon or os.path.exists(text):
            pairs.append((text, 1.0))
            continue
        try:
            pairs.append((path, float(weight)))
        except ValueError:
            pairs.append((text, 1.0))
    return pairs


def command(function: Callable) -> Callable:
    """Wrap a command's body: an argument out of range ends like any other fault, in a message and exit code 2."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        if "numpy" not in sys.modules:
            # These commands multiply nothing with BLAS on hot paths; its threads would only take address space.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # A run makes no cycles; looking for them among Numba's many objects took a tenth of it.
        gc.disable()
        from nblora.errors import NbloraError

        try:
            return function(*args, **options)
        except ValueError as error:
            if isinstance(error, NbloraError):
                raise
            raise NbloraError(str(error)) from error

    return wrapped


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Yield a function progress(finished, total) that draws a bar over bytes on a terminal."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def progress(finished: int, total: int) -> None:
            bar.total = total
            bar.update(finished - bar.n)

        yield progress


def show_warnings(warnings: list[str]) -> None:
    """Print what the user should know to standard error."""
    for warning in warnings:
        click.echo(f"nblora: warning: {_printable(warning)}", err=True)


def show(report: dict[str, Any], table: str, as_json: bool) -> None:
    """Print a report to standard output; what a file's names would tell the terminal to do is written out."""
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(map(_printable, table.split("\n"))))


def _printable(line: str) -> str:
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
