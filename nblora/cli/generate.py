"""`nblora generate`: text that a causal model goes on with, printed as it comes."""

import sys

import click

from nblora.cli import _text


@click.command()
@_text.model_option()
@_text.adapter_option()
@click.option("--prompt", required=True, metavar="TEXT", help="What to go on with; - reads standard input.")
@click.option("--system", metavar="TEXT", help="A system message before it, in a conversation.")
@click.option(
    "--chat/--plain",
    default=None,
    help="Whether the prompt is put into the chat template, or taken as it is.  [default: --chat where the model has a "
    "template, unless the adapter learnt prompts or texts without it]",
)
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(1), help="At most so many.")
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="0 takes the likeliest token."
)
@click.option(
    "--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True),
    help="Draw among the likeliest tokens of this share.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of what is drawn.")
@_text.command
def command(
    model: str, adapter: str | None, prompt: str, system: str | None, chat: bool | None, max_new_tokens: int,
    temperature: float, top_p: float, seed: int,
) -> None:  # fmt: skip
    """Go on with a text, or answer it, and print what comes token by token.

    Needs: pip install 'nblora[text]', and 'nblora[gguf]' for a GGUF file.
    """
    from nblora.text.answering import load_generator, prompt_ids, speaks_chat, stream_text

    causal, tokenizer = load_generator(model, adapter)
    given = sys.stdin.read() if prompt == "-" else prompt
    as_turn = speaks_chat(tokenizer, adapter) if chat is None else chat
    ids = prompt_ids(tokenizer, given, chat=as_turn, system=system)
    pieces = stream_text(
        causal, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
