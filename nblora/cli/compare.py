"""`nblora compare`: means, deviations and paired intervals of methods over seeds."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--metric", metavar="NAME", help="What to compare, such as test_accuracy.  [default: the file's main one]"
)
@click.option("--baseline", metavar="METHOD", help="Compare the others with this method only.  [default: every pair]")
@click.option(
    "--level", default=0.95, show_default=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Of each interval.",
)  # fmt: skip
@click.option("--bootstrap", is_flag=True, help="Bootstrap intervals instead of Student's t: for 20 seeds or more.")
@click.option("--json", "target", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write it too.")
def command(
    file: Path, metric: str | None, baseline: str | None, level: float, bootstrap: bool, target: Path | None
) -> None:  # fmt: skip
    """Compare methods over seeds, so that nobody claims a winner inside the noise.

    FILE is a results file of `nblora sweep` (.jsonl), results.json or curves.csv of `nblora demo`, or a CSV with the
    columns method, seed, epoch and the metric's.

    Runs with the same seed are compared with one another, by Student's t for paired samples. A method is said to have
    the larger value only where that is beyond the noise of at least five seeds, all comparisons of the call taken
    together (Holm's correction). A sweep's methods stand with the settings that are best on its validation split, and
    are compared on its test split where it has one.
    """
    from nblora.compare import compare, text_report
    from nblora.results import read_result_file, values_by_seed
    from nblora.storage.atomic import replace_whole

    name, values, remarks = values_by_seed(read_result_file(file), metric)
    try:
        found = compare(values, baseline=baseline, level=level, interval="bootstrap" if bootstrap else "t")
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(text_report(found, name))
    if remarks:
        click.echo("\n" + "\n".join(remarks))
    if target is not None:
        with replace_whole(target) as opened:
            opened.write((json.dumps({**found.as_dict(), "metric": name}, indent=2) + "\n").encode())
