"""Chat templates: conversations as one text, by jinja2 in its sandbox, as transformers renders them."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from nblora.errors import FormatError

from .extras import import_jinja

Messages = Sequence[Mapping[str, Any]]


def render(template: str, source: str, messages: Messages, variables: Mapping[str, Any]) -> str:
    """Fill a template.

    Parameters
    ----------
    template : str
        Of jinja2. It can call nothing but what the sandbox allows.
    source : str
        Where it came from, for messages.
    messages : list of dict
        Each with "role" and mostly "content".
    variables : mapping
        What else the template may name.

    Raises
    ------
    TypeError, ValueError
        For messages that are none.
    FormatError
        For a template that is broken, and where it refuses the messages: the text is its own.
    """
    checked = _check_messages(messages)
    jinja2 = import_jinja()
    try:
        return _compiled(template).render(messages=checked, **variables)
    except jinja2.TemplateError as error:
        raise FormatError(f"{source}: the chat template fails: {error}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        # whatever its expressions bring about: a template is a file's, and its errors are the file's
        raise FormatError(f"{source}: the chat template fails: {type(error).__name__}: {error}") from None


def _check_messages(messages: Messages) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{place}] must be a dict with a role and a content, got {message!r}")
    return [dict(message) for message in messages]


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    jinja2 = import_jinja()

    class Generation(jinja2.ext.Extension):  # type: ignore[name-defined]
        """`{% generation %}`, by which templates mark what an assistant says; the text within is the same."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _raise(message: str) -> None:
    raise import_jinja().TemplateError(message)


def _to_json(value: Any, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As transformers writes JSON: letters as they are, and nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
