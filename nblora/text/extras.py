"""The packages of the extra `text`, imported when they are first needed."""

from typing import Any

from nblora.errors import MissingExtraError


def import_tokenizers() -> Any:
    """The `tokenizers` package; MissingExtraError where it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("text needs the tokenizers package: pip install 'nblora[text]'") from error
    return tokenizers


def import_jinja() -> Any:
    """The `jinja2` package; MissingExtraError where it is not installed."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise MissingExtraError("chat templates need jinja2: pip install 'nblora[text]'") from error
    return jinja2
