"""`nblora unmerge`."""

from typing import Any

import click

from nblora.cli import _weights


@click.command()
@click.argument("checkpoint", type=click.Path())
@_weights.adapter_option(required=False)
@_weights.output_option("Where the checkpoint without the adapters goes: a file for a file, a folder for a folder.")
@_weights.force_option()
@click.option("--originals", type=click.Path(), help="The kept originals, if they are not beside CHECKPOINT.")
@click.option("--dtype", type=click.Choice(_weights.FLOATS), help="Store the difference as this type.")
@_weights.memory_option()
@_weights.map_option()
@click.option("--dry-run", is_flag=True, help="Check that everything fits, and write nothing.")
@_weights.json_option()
@_weights.command
def command(checkpoint: str, adapters: tuple[str, ...], output: str, as_json: bool, **options: Any) -> None:
    """Take adapters out of the merged CHECKPOINT.

    With the originals that merge --keep-original stored the base comes back bit by bit, and no adapter is needed.
    Otherwise the changes of the given adapters are subtracted, and the report says how far off that may be.
    """
    from nblora.weights.unmerging import unmerge

    with _weights.progress_bar() as progress:
        report = unmerge(checkpoint, output, _weights.parse_adapters(adapters), progress=progress, **options)
    _weights.show_warnings(report.warnings)
    _weights.show(report.as_dict(), report.table(), as_json)
