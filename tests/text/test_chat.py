"""Chat templates: what transformers renders, in a sandbox."""

import json
import sys

import pytest

import nblora
from nblora.errors import FormatError, MissingExtraError
from tests.text.support import held

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

HELD = held()
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture
def tokenizer(tmp_path):
    """Make a tokenizer with a template."""

    def make(template, file=None):
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
        settings = {"chat_template": template, **HELD["special"]}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "[UNK]"}))
        if file is not None:
            (tmp_path / "chat_template.jinja").write_text(file)
        return nblora.load_tokenizer(tmp_path)

    return make


@pytest.mark.parametrize("name", HELD["chats"])
def test_conversations_are_what_transformers_renders(tokenizer, name):
    chat = HELD["chats"][name]
    tools = [{"type": "function", "name": "é<b>"}] if name == "tools" else None
    found = tokenizer(chat["template"]).chat(HELD["messages"], add_generation_prompt=name == "turns", tools=tools)
    assert found == chat["text"]


def test_where_a_template_comes_from(tokenizer):
    assert tokenizer("one").chat(MESSAGES) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert tokenizer(named).chat(MESSAGES) == "three"
    assert tokenizer("one", file="four {{ more }}").chat(MESSAGES, more=5) == "four 5"


def test_the_time_and_a_refusal_are_the_templates(tokenizer):
    assert tokenizer("{{ strftime_now('%Y') }}").chat(MESSAGES).startswith("2")
    with pytest.raises(FormatError, match="the chat template fails: roles must alternate"):
        tokenizer("{{ raise_exception('roles must alternate') }}").chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.x.y }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% generation %}",
        "{{ 'a' | none }}",
    ],
)
def test_a_broken_or_hostile_template_is_refused(tokenizer, template):
    made = tokenizer(template)
    with pytest.raises(FormatError, match="the chat template fails"):
        made.chat(MESSAGES)


def test_nothing_leads_out_of_the_sandbox(tokenizer):
    """What is not allowed is as if it were not there."""
    assert tokenizer("[{{ strftime_now.__globals__ }}{{ messages.__class__ }}]").chat(MESSAGES) == "[]"


NONE = [
    ("x", TypeError),
    ({"role": "x"}, TypeError),
    ([], ValueError),
    ([{"content": "x"}], ValueError),
    (["x"], ValueError),
    ([{"role": 1}], ValueError),
]


def test_messages_that_are_none(tokenizer):
    made = tokenizer("x")
    for messages, kind in NONE:
        with pytest.raises(kind, match="messages"):
            made.chat(messages)
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer(None).chat(MESSAGES)
    with pytest.raises(FormatError, match="chat_template must be a text"):
        tokenizer(5)


def test_without_the_package_the_message_names_the_extra(tokenizer, monkeypatch):
    made = tokenizer("never seen before")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nblora\[text\]'"):
        made.chat(MESSAGES)
