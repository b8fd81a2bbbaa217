"""`nblora info`: what is installed and what this machine can do."""

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(as_json: bool) -> None:
    """Print versions, processor, threads, BLAS, CUDA state and cache folder.

    Paste the output into a bug report: it says what nblora runs on, and why a GPU cannot be used.
    """
    from nblora.info import as_text, collect

    found = collect()
    click.echo(json.dumps(found, indent=2) if as_json else as_text(found))
