"""`nblora inspect`."""

import click

from nblora.cli import _weights


@click.command()
@click.argument("path", type=click.Path())
@click.option("--plot", metavar="FILE", type=click.Path(), help="Draw singular values and stable ranks as a picture.")
@_weights.json_option()
@_weights.command
def command(path: str, plot: str | None, as_json: bool) -> None:
    """Describe the adapter or the checkpoint at PATH.

    Of a PEFT adapter's folder: rank, scale, norms, singular values and stable rank of every module. Of a safetensors
    file or a folder of them: its tensors, and which of them a LoRA adapter could change.
    """
    from nblora.weights.inspection import InspectReport, inspect

    report = inspect(path)
    if plot:
        if not isinstance(report, InspectReport):
            raise click.BadParameter(
                f"{path} is a checkpoint, and only an adapter has a change to draw", param_hint="--plot"
            )
        report.plot(plot)
    _weights.show(report.as_dict(), report.table(), as_json)
