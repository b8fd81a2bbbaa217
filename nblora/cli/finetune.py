"""`nblora finetune`: from a file of texts to an adapter."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from nblora.cli._weights import json_option


def _read_config(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Take what a TOML file says for defaults: flags win."""
    if path is not None:
        from nblora.errors import NbloraError
        from nblora.finetuning.settings import read_config

        try:
            held = read_config(path)
            if "learn_prompt" in held:
                held["mask_prompt"] = not held.pop("learn_prompt")
            if isinstance(held.get("target"), list):
                held["target"] = ",".join(map(str, held["target"]))
            ctx.default_map = {**(ctx.default_map or {}), **held}
        except NbloraError as error:
            click.echo(f"nblora: {error}", err=True)
            ctx.exit(2)
    return path


@click.command()
@click.option("--model", required=True, metavar="PATH", help="A model's folder, or a GGUF file, with its tokenizer.")
@click.option(
    "--data", required=True, metavar="PATH", help="A .jsonl, .csv or .tsv file, or a folder with train.jsonl."
)
@click.option(
    "--output", "-o", required=True, metavar="FOLDER", help="A new folder for the adapter and what is known of it."
)
@click.option(
    "--task", type=click.Choice(["sequence-classification", "causal-lm"]), help="[default: what the records are for]"
)
@click.option(
    "--method",
    type=click.Choice(["lora", "delta", "dora", "zi", "miss", "head", "full"]),
    default="lora",
    show_default=True,
    help="What is trained.",
)
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1), help="Of the adapters.")
@click.option("--alpha", default=16.0, show_default=True, type=float, help="Their scale is alpha / rank.")
@click.option(
    "--target", default="all-linear", show_default=True, metavar="NAMES", help="Layers to adapt, parted by commas."
)
@click.option(
    "--lr", default="2e-4", show_default=True, metavar="RATE|auto", help="auto tries a short run at each of four rates."
)
@click.option("--epochs", default=3, show_default=True, type=click.IntRange(1), help="Passes over the data.")
@click.option("--iters", type=click.IntRange(1), help="Updates, in place of epochs.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Records of a batch.")
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(1), help="Batches of an update.")
@click.option("--max-length", default=512, show_default=True, type=click.IntRange(1), help="Tokens of a record.")
@click.option(
    "--long",
    type=click.Choice(["cut", "refuse"]),
    default="cut",
    show_default=True,
    help="What to do with longer ones.",
)
@click.option(
    "--valid", metavar="PATH|SHARE", help="Records held out, or their share.  [default: the folder's, or 0.1]"
)
@click.option(
    "--eval-every", metavar="N", type=click.IntRange(1), help="Validate after so many updates.  [default: each epoch]"
)
@click.option(
    "--save-every", metavar="N", type=click.IntRange(1), help="Save after so many updates.  [default: each epoch]"
)
@click.option(
    "--patience", metavar="N", type=click.IntRange(1), help="End after so many validations without improvement."
)
@click.option(
    "--mask-prompt/--learn-prompt", "mask_prompt", default=True, show_default=True, help="Whether prompts are left out."
)
@click.option("--resume", is_flag=True, help="Go on with the run in FOLDER that was killed or interrupted.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of everything that is drawn.")
@click.option(
    "--config",
    metavar="FILE.toml",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="These flags by their names; flags given here win.",
)
@click.option("--show-sample", is_flag=True, help="Print the first record's tokens, those learnt marked, and end.")
@click.option("--dry-run", is_flag=True, help="Print the memory and time expected, from a few updates, and end.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@json_option()
def command(
    show_sample: bool, dry_run: bool, resume: bool, quiet: bool, as_json: bool, mask_prompt: bool, **given: Any
) -> None:
    """Fine-tune a pretrained model on texts, and write an adapter.

    Records are of one kind, told from the first:

    \b
      {"text": ..., "label": ...}           a classification; "text_pair" may come with them
      {"prompt": ..., "completion": ...}    the completion is learnt
      {"messages": [{"role", "content"}]}   every turn of the assistant is learnt
      {"text": ...}                         every token is learnt

    FOLDER gets the adapter as PEFT saves it (of --method full a model), the best on the records held out; labels.json,
    history.csv, finetune.json, and history.png where matplotlib is. A run that was killed goes on with --resume, and
    ends with the same adapter, bit for bit.

    Needs: pip install 'nblora[text]'.
    """
    from nblora.errors import NbloraError
    from nblora.finetuning.settings import Settings

    try:
        settings = Settings.checked(**given, learn_prompt=not mask_prompt)
        if show_sample:
            _show_sample(settings)
        elif dry_run:
            _estimate(settings, as_json)
        else:
            _run(settings, resume, quiet, as_json)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        if isinstance(error, NbloraError) or not str(error):
            raise
        raise NbloraError(str(error)) from error


def _show_sample(settings: Any) -> None:
    from nblora.finetuning.task import make_task, read_data
    from nblora.text.examples import show_example

    task = make_task(settings, read_data(settings))
    for note in task.notes:
        click.echo(f"nblora: note: {note}", err=True)
    click.echo(show_example(task.examples["train"], 0, task.tokenizer, task.classes))


def _estimate(settings: Any, as_json: bool) -> None:
    from nblora.finetuning.estimate import estimate
    from nblora.finetuning.task import make_task, read_data

    task = make_task(settings, read_data(settings))
    for note in task.notes:
        click.echo(f"nblora: note: {note}", err=True)
    found = estimate(task)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return
    share = 100 * found.trainable / found.parameters
    click.echo(
        f"{found.updates} updates, {found.tokens:,d} tokens; {found.trainable:,d} of {found.parameters:,d} parameters "
        f"are trained ({share:.3g} %)\n"
        f"time    {_time(found.seconds)}, at {found.tokens_per_second:,.0f} tokens/s (measured on {found.measured} "
        "updates, compiling apart; more on a busy machine)\n"
        f"memory  {found.memory / 2**30:.2f} GiB (the largest of this process while it made an update of the longest "
        "records)"
    )


def _run(settings: Any, resume: bool, quiet: bool, as_json: bool) -> None:
    from nblora.finetuning.run import run

    silent = quiet or as_json
    result = run(settings, resume=resume, progress=False if silent else None, tell=_tell if not quiet else _drop)
    if as_json:
        click.echo(
            json.dumps(result.description | {"history": result.history.to_dict(), "next": result.commands}, indent=2)
        )
        return
    if quiet:
        return
    click.echo(f"Written to {result.folder}: the state after update {result.metrics['best_step']:.0f}")
    for part in ("valid", "test"):
        if part in result.metrics:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics[part].items())
            click.echo(f"  {part}: {figures}")
    click.echo("Next:\n" + "\n".join(f"  {line}" for line in result.commands))


def _tell(line: str) -> None:
    """Print a line to standard error, above a bar that may be there."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        click.echo(f"nblora: {line}", err=True)


def _drop(line: str) -> None:
    """Say nothing."""


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
