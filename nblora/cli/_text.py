"""What the commands on texts share: options, and how wrong arguments end."""

import functools
from collections.abc import Callable
from typing import Any

import click


def model_option() -> Callable:
    """`--model PATH`."""
    return click.option(
        "--model", required=True, metavar="PATH", help="A model's folder, or a GGUF file, with its tokenizer."
    )


def adapter_option() -> Callable:
    """`--adapter FOLDER`."""
    return click.option(
        "--adapter", metavar="FOLDER", help="An adapter of it, as nblora finetune or PEFT writes it.  [default: none]"
    )


def command(function: Callable) -> Callable:
    """Wrap a command's body: an argument out of range, or a tokenizer that does not fit, ends in exit code 2."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        from nblora.errors import NbloraError

        try:
            return function(*args, **options)
        except (ValueError, IndexError) as error:
            if isinstance(error, NbloraError):
                raise
            raise NbloraError(str(error)) from error

    return wrapped
