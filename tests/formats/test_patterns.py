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
        r"\^lin", r"\.lin",
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


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(a|a)*b", "(a*)*", "(ab)+c", "(?:a{1,9}){9}", "a{99999999999999999999}", "a{1,100000}", "(",
        r"(a)\1", "(?=a)b", "(?<!a)b", ".*.*.*.*.*", "[", "(" * 5000, "(?P<x>a)(?P=x)", "(.|a)+", "*",
    ],
)  # fmt: skip
def test_what_could_take_for_ever_is_refused_at_once(pattern):
    began = time.perf_counter()
    with pytest.raises(FormatError, match=r"adapter_config.json: rank_pattern holds"):
        Patterns("rank_pattern", {pattern: 4}, PATH).value("a" * 60, 8)
    assert time.perf_counter() - began < 5


def test_too_long():
    with pytest.raises(FormatError, match="characters"):
        Patterns("rank_pattern", {"a" * (LONGEST + 1): 4}, PATH)
    with pytest.raises(FormatError, match="characters"):
        Patterns("rank_pattern", {"[ab]": 4}, PATH).value("a" * 2000, 8)


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
