"""`nblora merge`."""

from typing import Any

import click

from nblora.cli import _weights


@click.command()
@click.argument("base", type=click.Path())
@_weights.adapter_option()
@_weights.output_option("Where the merged checkpoint goes: a file for a file, a folder for a folder.")
@_weights.force_option()
@click.option("--dtype", type=click.Choice(_weights.FLOATS), help="Store floating-point tensors as this type.")
@_weights.memory_option()
@click.option("--shard-size", metavar="SIZE", help="Split the output into shards of at most this size, such as 5GB.")
@_weights.map_option()
@click.option("--keep-original", is_flag=True, help="Keep what changes beside the output, for a bit-exact unmerge.")
@click.option("--dry-run", is_flag=True, help="Check that everything fits, and write nothing.")
@_weights.json_option()
@_weights.command
def command(base: str, adapters: tuple[str, ...], output: str, as_json: bool, **options: Any) -> None:
    """Merge adapters into the checkpoint BASE, in memory that --max-memory bounds.

    BASE is a safetensors file, the index of a sharded checkpoint, or a folder that holds either. The output is
    complete or absent, whatever happens.
    """
    from nblora.weights.merging import merge

    with _weights.progress_bar() as progress:
        report = merge(base, _weights.parse_adapters(adapters), output, progress=progress, **options)
    _weights.show_warnings(report.warnings)
    _weights.show(report.as_dict(), report.table(), as_json)
