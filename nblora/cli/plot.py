"""`nblora plot`: the right figure for any of nblora's result files."""

from pathlib import Path

import click


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output",
    "-o",
    metavar="FIGURE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write it; .png or .svg.  [default: FILE.png in the current folder]",
)
@click.option("--metric", metavar="NAME", help="Of a sweep or learning curves: which figure of merit to draw.")
def command(file: Path, output: Path | None, metric: str | None) -> None:
    """Draw the figure of a result file.

    FILE is a results file of `nblora sweep`, results.json, results.csv or curves.csv of `nblora demo`, results.json of
    `nblora bench`, the --json file of `nblora compare`, the CSV of a training history, or a saved adapter or model,
    whose learned change is drawn with its singular values.

    Needs: pip install 'nblora[plot]'.
    """
    from nblora.plots import draw_file, style
    from nblora.storage.atomic import replace_whole

    target = output or Path(f"{file.stem}.png")
    kind = target.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise click.BadParameter(f"must end in .png or .svg, got {str(target)!r}", param_hint="--output")
    figure = draw_file(file, metric=metric)
    # In nblora's style, and without a date, the same results give the same bytes.
    with style(), replace_whole(target) as opened:
        figure.savefig(opened, format=kind, metadata={"Date": None} if kind == "svg" else None)
    click.echo(f"Written to {target}")
