"""`nblora inspect`."""

import click

from nblora.cli import _weights


@click.command()
@click.argument("adapter", type=click.Path())
@click.option("--plot", metavar="FILE", type=click.Path(), help="Draw singular values and stable ranks as a picture.")
@_weights.json_option()
@_weights.command
def command(adapter: str, plot: str | None, as_json: bool) -> None:
    """Describe ADAPTER: rank, scale, norms, singular values and stable rank of every module."""
    from nblora.weights.inspection import inspect

    report = inspect(adapter)
    if plot:
        report.plot(plot)
    _weights.show(report.as_dict(), report.table(), as_json)
