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

    One adapter can also be merged into a GGUF file, or, of a classification, into a model that lacks its head; the
    model is loaded then, and OUT is a folder that transformers loads.
    """
    from nblora.weights.merging import merge, needs_model

    parsed = _weights.parse_adapters(adapters)
    if len(parsed) == 1 and needs_model(base, parsed[0][0]):
        _merge_model(base, parsed[0], output, as_json, options)
        return
    with _weights.progress_bar() as progress:
        report = merge(base, parsed, output, progress=progress, **options)
    _weights.show_warnings(report.warnings)
    _weights.show(report.as_dict(), report.table(), as_json)


def _merge_model(base: str, adapter: tuple[str, float], output: str, as_json: bool, options: dict[str, Any]) -> None:
    """Merge by loading the model."""
    from nblora.finetuning.merging import merge_model

    path, weight = adapter
    given = [name for name in ("shard_size", "maps", "keep_original", "dry_run") if options[name]]
    given += ["weight"] if weight != 1 else []
    if given:
        raise ValueError(
            f"{given[0].replace('_', '-')} is for checkpoints that are merged as they lie, and {base} with {path} must "
            "be loaded as a model: leave it out"
        )
    report = merge_model(base, path, output, dtype=options["dtype"], force=options["force"])
    named = f" ({', '.join(report['labels'])})" if report["labels"] else ""
    table = f"{output}: a {report['task']} model{named}, {len(report['layers'])} layers merged"
    _weights.show(report, table, as_json)
