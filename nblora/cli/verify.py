"""`nblora verify`."""

from typing import Any

import click

from nblora.cli import _weights


@click.command()
@click.argument("checkpoint", type=click.Path())
@_weights.adapter_option()
@click.option("--base", type=click.Path(), help="What the adapters were merged into; else the kept originals are used.")
@_weights.memory_option()
@_weights.map_option()
@_weights.json_option()
@click.pass_context
@_weights.command
def command(ctx: click.Context, checkpoint: str, adapters: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Tell whether CHECKPOINT is its base with these adapters merged.

    The merge is done again in memory and compared bit by bit. Exit codes: 0 yes, 1 no, 2 a file cannot be read or does
    not fit, 3 inconclusive (no base to start from, no bit changes, or the change is there but not bit by bit).
    """
    from nblora.weights.verification import verify

    report = verify(checkpoint, _weights.parse_adapters(adapters), **options)
    _weights.show(report.as_dict(), report.table(), as_json)
    ctx.exit(report.exit_code)
