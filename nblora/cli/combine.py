"""`nblora combine`."""

from typing import Any

import click

from nblora.cli import _weights


@click.command()
@_weights.adapter_option()
@_weights.output_option("The new adapter's folder.")
@_weights.force_option()
@click.option("--rank", type=click.IntRange(1), help="Recompress modules of a larger rank to this one.")
@click.option("--dtype", type=click.Choice(_weights.FLOATS), help="Store the factors as this type.")
@_weights.json_option()
@_weights.command
def command(adapters: tuple[str, ...], output: str, as_json: bool, **options: Any) -> None:
    """Write one adapter whose change is the weighted sum of the given ones.

    Exact by stacking the factors; with --rank the best approximation of that rank, whose error is reported.
    """
    from nblora.weights.combination import combine

    report = combine(_weights.parse_adapters(adapters), output, **options)
    _weights.show(report.as_dict(), report.table(), as_json)
