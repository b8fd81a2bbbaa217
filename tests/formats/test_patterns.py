"""Patterns of a file: what PEFT matches, and nothing that takes for ever."""

import re
import string
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nblora.errors import FormatError
from nblora.formats.patterns import LONGEST, Patterns

PATH = Path("adapter_config.json")
MODULES = ("lin", "net.lin", "net.lin2", "netXlin", "model.layers.10.q_proj", "model.layers.1.q_proj", "a|b", "x.a|b")


def peft(patterns, module, default, whole=False):
    """What PEFT does."""
    form = "{}" if whole else r"(.*\.)?({})$"
    return next((v for p, v in patterns.items() if re.fullmatch(form.format(p), module)), default)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        "lin", "net.lin", r"net\.lin", "^lin", "^net.lin$", "lin$", "n.t.lin", r"lin\d", r".*\.lin", "lin|net.lin",
        r"(.*\.)?layers\.1\.q_proj", r"model\.layers\.(1|2|10)\.q_proj", r"[a-z]+\.lin", "li?n", "l{1,2}in2?", "", ".*",
        re.escape("a|b"), r"q_proj|lin", r"model\..*\.\d+\..*", "(net|model)?.*lin", "^(net|x)[.]lin$", "a.b",
        r"\^lin", r"\.lin", r"(net\.|model\.)*lin", "(li|l)+(n|in)", "(?:l|i|n){3}", r"[^.x]+\.lin", r"\w+\.(?i:LIN)",
        r"(?:[a-z]+\.)+?[\d.]*\Dproj", "n(et)?X?.?l.*", "lin{0,2}2?", r"\Alin\Z", "((((lin))))", "()*lin", "(|l)in",
        "l[i-n]+$",
    ],
)  # fmt: skip
def test_what_peft_matches(pattern, whole):
    patterns = {pattern: 1, "lin": 2}
    found = Patterns("rank_pattern", patterns, PATH, whole)
    for module in MODULES:
        assert found.value(module, 0) == peft(patterns, module, 0, whole), module


def _is_expression(text):
    try:
        re.compile(text)
    except re.error:
        return False
    return True


NAMES = st.text(alphabet="ab.|^$\\", max_size=6).filter(_is_expression)


@given(patterns=st.lists(NAMES, max_size=3, unique=True), module=st.text(alphabet="ab.^", max_size=8))
def test_names_and_alternatives_of_any_kind(patterns, module):
    values = {pattern: place for place, pattern in enumerate(patterns)}
    assert Patterns("rank_pattern", values, PATH).value(module, None) == peft(values, module, None)


EXPRESSIONS = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", "^", "$", "", r"\b", r"\B", r"\Z"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])).map(
            lambda p: f"({p[0]}){p[1]}"
        ),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("whole", [False, True])
@given(pattern=EXPRESSIONS, module=st.text(alphabet="ab.", max_size=6))
def test_expressions_of_any_kind(pattern, module, whole):
    assert Patterns("target_modules", {pattern: True}, PATH, whole).value(module, False) == bool(
        peft({pattern: True}, module, False, whole)
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(a|a)*b", "(a*)*b", "(ab)+c", "(?:a{1,9}){9}b", "(.|a)+b", "a?" * 60 + "a" * 61, "(a|a)" * 60 + "b",
        ".{0,999}" * 12 + "!", ".*" * 9 + "!", ".*?" * 9 + "!", "[a-z]*" * 9 + "!",
    ],
)  # fmt: skip
def test_what_takes_re_for_ever_is_matched_at_once(pattern, whole):
    began = time.thread_time()
    patterns = Patterns("rank_pattern", {pattern: 4}, PATH, whole)
    assert patterns.value("a" * 60, 8) == 8
    assert patterns.value("a" * 300, 8) == 8
    assert time.thread_time() - began < 5


@pytest.mark.parametrize(
    "pattern",
    [
        "a{99999999999999999999}", "a{1,1000000}", "((a{999}){999}){999}", "(", r"(a)\1", "(?=a)b", "(?<!a)b", "[",
        "(" * 5000, "(?P<x>a)(?P=x)", "*", "(?>a+)b", "a++b", "(?i)A[b]", "(?m)A[b]",
    ],
)  # fmt: skip
def test_what_is_no_expression_and_what_cannot_be_bounded_is_refused(pattern):
    with pytest.raises(FormatError, match=r"adapter_config.json: rank_pattern holds"):
        Patterns("rank_pattern", {pattern: 4}, PATH).value("a" * 60, 8)


def test_flags_come_first():
    patterns = Patterns("target_modules", {"(?i)A[bc]": True}, PATH, whole=True)
    assert [patterns.value(name, False) for name in ("ab", "AC", "ad")] == [True, True, False]
    with pytest.raises(FormatError, match="flags"):
        Patterns("target_modules", {"(?a)A[bc]": True}, PATH, whole=True)


def test_nothing_repeated_takes_no_time():
    assert Patterns("rank_pattern", {"(((){1000}){1000}){1000}[a]": 4}, PATH).value("a", 8) == 4


def test_a_file_runs_out_of_patience(monkeypatch):
    monkeypatch.setattr("nblora.formats.patterns.PATIENCE", 0.05)
    slow = Patterns("rank_pattern", {"[a]?" * 20000: 4}, PATH)
    with pytest.raises(FormatError, match=r"took more than 0\.05 s to match; write plain names"):
        slow.value("a" * 500, 8)


def test_too_long():
    with pytest.raises(FormatError, match="characters"):
        Patterns("rank_pattern", {"a" * (LONGEST + 1): 4}, PATH)


def test_many_honest_patterns_take_no_time():
    """As PEFT, and nblora, write one for each module of a large model; compiled anew each time they took 25 s."""
    letters = string.ascii_lowercase
    modules = [f"model.layers.{n}.self_attn.{letter}_proj" for n in range(40) for letter in letters]
    for form in (str, re.escape, lambda name: f"^{re.escape(name)}$"):
        patterns = Patterns("rank_pattern", {form(name): place for place, name in enumerate(modules)}, PATH)
        began = time.process_time()
        assert [patterns.value(module, None) for module in modules] == list(range(len(modules)))
        assert time.process_time() - began < 10
    one = Patterns("target_modules", {"|".join(map(re.escape, modules)): True}, PATH, whole=True)
    assert all(one.value(module, False) for module in modules)
    assert not one.value("model.layers.0", False)
