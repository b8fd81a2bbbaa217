"""`nblora sweep`: run what a TOML file describes, here or on Dask."""

from pathlib import Path

import click


@click.command()
@click.argument("specification", metavar="FILE.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--results",
    metavar="FILE.jsonl",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where results are kept, and resumed from.  [default: FILE.jsonl beside FILE.toml]",
)
@click.option("--workers", type=click.IntRange(1), help="Runs at a time on this machine.  [default: cores / threads]")
@click.option("--threads", type=click.IntRange(1), help="Threads of each run.  [default: the file's, or 1]")
@click.option("--scheduler", metavar="ADDRESS", help="Run on the Dask cluster of this scheduler, tcp://host:port.")
@click.option("--cluster", type=click.Choice(["dask"]), help="Start a Dask cluster of --workers local processes.")
@click.option("--rows", default=10, show_default=True, type=click.IntRange(1), help="Settings to print at the end.")
@click.option("--quiet", is_flag=True, help="No progress bar and no table; the results file is written all the same.")
def command(
    specification: Path, results: Path | None, workers: int | None, threads: int | None, scheduler: str | None,
    cluster: str | None, rows: int, quiet: bool,
) -> None:  # fmt: skip
    """Run a sweep: one task, many settings.

    FILE.toml names the data, the base and the settings; a small one is

    \b
      loss = "cross_entropy"
      [data]
      file = "own.csv"            # or .parquet, .npz; or sklearn = "digits"
      label = "species"           # the column to predict
      [base]
      hidden = [32]
      [grid]
      method = ["lora", "delta"]
      rank = [2, 4]
      seed = [0, 1, 2, 3, 4]
      [fixed]
      epochs = 5

    For labelled texts it is file = "reviews.jsonl" in [data], and in [base] model = "FOLDER", perhaps with max_length.

    Each run's result is added to the results file when the run ends. A sweep that was stopped, in whatever way, goes on
    where it was when it is started again with the same file. Dask needs: pip install 'nblora[dask]'.

    `nblora compare` and `nblora plot` read the results file. The exit code is 1 where runs failed, with the reasons.
    """
    from nblora.sweep import Sweep, text_table
    from nblora.sweep.summary import failures

    if scheduler is not None and cluster is not None:
        raise click.UsageError("--scheduler and --cluster exclude each other")
    sweep = Sweep.from_toml(specification, threads=threads)
    path = results or specification.with_suffix(".jsonl")
    records = sweep.run(path, workers=workers, scheduler=scheduler, cluster=cluster, progress=False if quiet else None)
    failed = failures(records)
    if not quiet:
        click.echo(text_table(records, sweep.metric, rows))
        click.echo(f"Results of {len(records)} runs in {path}")
    elif failed:
        click.echo("\n".join(failed), err=True)
    if failed:
        raise click.exceptions.Exit(1)
