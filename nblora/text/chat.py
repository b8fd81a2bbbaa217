"""Chat templates: conversations as one text, by jinja2 in its sandbox, as transformers renders them."""

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from nblora.errors import FormatError

from .extras import import_jinja

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
_BEGIN, _END = (f"\ue000{secrets.token_hex(16)}\ue001" for _ in range(2))
"""What `{% generation %}` and its end write, which no text holds: they are drawn when the process starts."""
_MARKED = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


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
    return _render(template, source, messages, variables).replace(_BEGIN, "").replace(_END, "")


def render_turns(
    template: str, source: str, messages: Messages, variables: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """Fill a template, and say where in the text the assistant's turns are.

    A template that marks them (`{% generation %}`) says it itself. Of others a turn is what the conversation up to it
    adds to what asks for it (`add_generation_prompt`), as far as that stays when more follows.

    Parameters
    ----------
    template, source, messages, variables
        As in `render`.

    Returns
    -------
    tuple of str and list
        The text, and of each turn its first character and that behind its last.

    Raises
    ------
    FormatError
        Also for a template that writes the beginning of a conversation in another way when more follows: then nobody
        can say which part of the text is whose.
    """
    if _MARKED.search(template):
        return _take_marks(_render(template, source, messages, variables))
    whole = render(template, source, messages, variables)
    return whole, [
        _turn(template, source, list(messages), place, variables, whole)
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def _turn(
    template: str, source: str, messages: list[Mapping[str, Any]], place: int, variables: Mapping[str, Any], whole: str
) -> Span:
    """Where in the whole text a turn is; FormatError where it cannot be said."""
    if place == 0:
        raise FormatError(f"{source}: the conversation begins with the assistant, so that nothing asks for its turn")
    before = render(template, source, messages[:place], {**variables, "add_generation_prompt": True})
    ended = render(template, source, messages[: place + 1], variables)
    pairs = enumerate(zip(ended, whole, strict=False))
    end = next((place for place, (own, other) in pairs if own != other), min(len(ended), len(whole)))
    specials = [token for name, token in variables.items() if name.endswith("_token")]
    for token in specials:  # one at the end of all may begin as a turn does: <|e, <|u
        end = min([end, *(at for at in range(max(0, end - len(token) + 1), end) if ended.startswith(token, at))])
    stays = ended[end:].strip() in ("", *specials)
    if not (stays and len(before) < end and ended.startswith(before)):
        raise FormatError(
            f"{source}: the chat template writes the beginning of a conversation differently when more follows, so "
            f"that nobody can say which part of the text message {place} is; mark it in the template by "
            "{% generation %}, or learn the whole text"
        )
    return len(before), end


def _take_marks(text: str) -> tuple[str, list[Span]]:
    """Take the marks of generations out of a text, and say where they were."""
    pieces, spans, length, begin = [], [], 0, 0
    for piece in re.split(f"({_BEGIN}|{_END})", text):
        if piece == _BEGIN:
            begin = length
        elif piece == _END:
            spans.append((begin, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _render(template: str, source: str, messages: Messages, variables: Mapping[str, Any]) -> str:
    """Fill a template, and leave the marks of generations in."""
    checked = _check_messages(messages)
    jinja2 = import_jinja()
    try:
        rendered: str = _compiled(template).render(messages=checked, **variables)
        return rendered
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
            begin, end = (
                jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)
            )
            return [begin, jinja2.nodes.Scope(body, lineno=line), end]

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
