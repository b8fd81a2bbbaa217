"""`nblora demo`: the main job on real data, from pretraining to merged adapters."""

from pathlib import Path

import click

from nblora.errors import MissingExtraError


@click.command()
@click.option(
    "--output",
    default="nblora-demo",
    show_default=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for everything that is written.",
)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="Runs of each method.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="First seed; the same seed gives the same accuracies.",
)
@click.option("--epochs", default=30, show_default=True, type=click.IntRange(1), help="Epochs of each adaptation.")
@click.option("--pretrain-epochs", default=30, show_default=True, type=click.IntRange(1), help="Epochs of pretraining.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1), help="Samples of a step.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto.  [default: $NBLORA_DEVICE, or cpu]")
@click.option("--tiny", is_flag=True, help="One seed, two methods, three steps, few images: only to see that it runs.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors; the files are written all the same.")
def command(
    output: Path, seeds: int, seed: int, epochs: int, pretrain_epochs: int, batch_size: int,
    device: str | None, tiny: bool, quiet: bool,
) -> None:  # fmt: skip
    """Adapt small networks to a shifted domain in four ways, and compare them.

    A network of three dense layers, and one of two convolutions and a dense layer, learn scikit-learn's handwritten
    digits. Then the domain shifts: images turned by 90 degrees, with noise. From the same start, and with the same
    number of steps and samples, each is adapted by

    \b
      Head only    the last layer alone
      LoRA         low-rank factors of rank 8 on the hidden layers, and the last layer
      Delta-LoRA   the same, plus a dense delta trained with momentum
      Full         every weight

    Each method picks its learning rates on a validation split, among six settings, on the convolutional network among
    three; the tables show accuracy on a test split that nothing was chosen on, on the shifted images and on the same
    images upright (what was forgotten), with the trainable parameters and the bytes of trainable state (parameters, and
    the optimiser's moments or the delta's velocity), and which method did best. The merged model of each method must
    predict what the adapted one predicts. On a GPU the convolutional network is left out.

    Written to DIR: results.json, results.csv, results.md, curves.csv, figure.png and adapters/*.safetensors, which
    nblora.load reads. Takes less than a minute on two cores. Needs: pip install 'nblora[demo]'.
    """
    from nblora.demo import Settings, run_demo
    from nblora.demo.figure import write_figure
    from nblora.demo.report import (
        best_text,
        budget_text,
        machine_text,
        merge_text,
        networks,
        text_table,
        write_report,
    )

    _check_device(device)
    settings = Settings(output, seeds, seed, epochs, pretrain_epochs, batch_size, device, tiny)
    result = run_demo(settings, progress=not quiet)
    paths = write_report(result)
    try:
        paths["figure"] = write_figure(result)
    except MissingExtraError as error:
        click.echo(f"nblora: no figure was drawn: {error}", err=True)
    if quiet:
        return
    content = result.as_dict()
    tables = [f"The {name} network:\n\n{text_table(network)}" for name, network in networks(content).items()]
    notes = best_text(content), budget_text(content), merge_text(content), machine_text(content)
    for text in (*tables, *notes):
        click.echo(f"{text}\n")
    click.echo(f"Written to {output.resolve()}:")
    for what, path in paths.items():
        click.echo(f"  {path.name:<14} {what}")
    rows = [row for network in networks(content).values() for row in (network["not_adapted"], *network["methods"])]
    files = [Path(row["adapter_file"]).name for row in rows]
    click.echo(f"  {'adapters/':<14} {', '.join(files)}")


def _check_device(device: str | None) -> None:
    """A wrong name is the caller's mistake, said before anything runs."""
    from nblora.backends import default_backend, resolve

    try:
        default_backend() if device is None else resolve(device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device or NBLORA_DEVICE") from error
