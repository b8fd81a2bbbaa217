"""Records as token ids and what is learnt of them: as TRL has it."""

import json

import numpy as np
import pytest

import nblora
from nblora.errors import FormatError
from nblora.text.examples import check_vocabulary, class_examples, language_examples, show_example
from nblora.text.records import Records
from tests.processes import ROOT

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

HELD = json.loads((ROOT / "tests" / "data" / "finetuning" / "examples.json").read_text(encoding="utf-8"))
SAMPLES = [(name, place) for name in ("phi", "marked") for place in range(5)]


def records(*rows):
    kinds = {"messages": "messages", "prompt": "completion", "label": "labelled", "text": "text"}
    kind = next(kind for field, kind in kinds.items() if field in rows[0])
    return Records(kind, list(rows), "data.jsonl", list(range(1, len(rows) + 1)))


@pytest.fixture
def tokenizer(tmp_path):
    def make(name, template=None):
        for file, content in HELD[name]["files"].items():
            (tmp_path / file).write_text(json.dumps(content))
        (tmp_path / "chat_template.jinja").write_text(HELD[name]["template"] if template is None else template)
        return nblora.load_tokenizer(tmp_path)

    return make


@pytest.mark.parametrize(("name", "place"), SAMPLES)
def test_ids_and_labels_are_those_of_trl(tokenizer, name, place):
    sample = HELD[name]["samples"][place]
    found = language_examples(records(sample["record"]), tokenizer(name), 10**6)
    assert found.ids[0].tolist() == sample["whole"]["ids"]
    assert found.targets[0].tolist() == sample["whole"]["labels"]
    assert (found.cut, found.dropped, found.places) == (0, (), [0])
    learnt = sum(label != -100 for label in sample["whole"]["labels"])
    assert learnt > 0
    assert (learnt == len(sample["whole"]["ids"])) == ("text" in sample["record"])


@pytest.mark.parametrize("name", ["phi", "marked"])
def test_what_is_too_long_is_cut_and_left_out_as_by_trl(tokenizer, name):
    samples = HELD[name]["samples"]
    for sample in samples:
        length = len(sample["whole"]["ids"])
        found = language_examples(records(sample["record"]), tokenizer(name), HELD["length"])
        assert found.cut == (length > HELD["length"])
        assert (found.dropped == (0,)) == (sample["cut"] is None)
        if sample["cut"] is not None:
            assert found.ids[0].tolist() == sample["cut"]["ids"]
            assert found.targets[0].tolist() == sample["cut"]["labels"]
    assert any(sample["cut"] is None for sample in samples)


@pytest.mark.parametrize(("name", "place"), SAMPLES)
def test_all_is_learnt_where_that_is_asked_for(tokenizer, name, place):
    sample = HELD[name]["samples"][place]
    found = language_examples(records(sample["record"]), tokenizer(name), 10**6, learn_prompt=True)
    assert found.targets[0].tolist() == found.ids[0].tolist() == sample["whole"]["ids"]


def test_the_end_of_a_turn_is_learnt_and_what_asks_for_it_is_not(tokenizer):
    made = tokenizer("phi")
    talk = HELD["phi"]["samples"][4]["record"]["messages"]
    found = language_examples(records({"messages": talk}), made, 10**6)
    learnt = found.ids[0][found.targets[0] != -100]
    assert made.decode(learnt, special=True) == " Two. <|end|>\nA city \U0001f600<|end|>\n<|endoftext|>"
    shown = show_example(found, 0, made)
    assert shown.splitlines()[-1] == f"learnt: {len(learnt)} of {len(found.ids[0])} tokens, marked *"
    assert sum(line.startswith("*") for line in shown.splitlines()) == len(learnt)


def test_a_template_whose_beginning_depends_on_what_follows_is_refused(tokenizer):
    template = "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = tokenizer("phi", template)
    with pytest.raises(FormatError, match=r"data.jsonl, line 1: .*differently when more follows"):
        language_examples(records({"messages": talk}), made, 99)
    assert len(language_examples(records({"messages": talk}), made, 99, learn_prompt=True)) == 1
    with pytest.raises(FormatError, match=r"line 1: .*begins with the assistant"):
        language_examples(records({"messages": talk[1:]}), made, 99)


def test_a_template_that_reaches_out_of_the_sandbox_is_an_error_of_its_file(tokenizer):
    made = tokenizer("phi", "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(FormatError, match=r"data.jsonl, line 1: .*the chat template fails: .*unsafe"):
        language_examples(records({"messages": talk}), made, 99)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "line 1: .*no turn of the assistant"),
        ({"text": ""}, "line 1: .*fewer than two tokens"),
    ],
)
def test_what_teaches_nothing_is_refused(tokenizer, row, message):
    with pytest.raises(FormatError, match=message):
        language_examples(records(row), tokenizer("phi"), 99)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    made = tokenizer("phi")
    rows = records({"text": "a"}, {"text": "the sky"})
    found = language_examples(rows, made, 99)
    most = max(int(ids.max()) for ids in found.ids)
    check_vocabulary(found, rows, made, most + 1)
    with pytest.raises(FormatError, match=rf"does not fit the model: data.jsonl, line 2 gives the token {most}"):
        check_vocabulary(found, rows, made, most)


def test_classes(tokenizer):
    made = tokenizer("marked")
    rows = records({"text": "the sky", "label": "b"}, {"text": "a " * 20, "label": "a"})
    found = class_examples(rows, made, ["b", "a"], 9)
    assert found.targets.tolist() == [0, 1]
    assert found.cut == 1
    assert len(found.ids[1]) == 9
    assert found.kinds is None
    assert list(found.inputs) == ["input_ids"]
    part = found.part([1])
    assert (part.places, part.targets.tolist(), len(part), part.tokens) == ([1], [1], 1, 9)
    assert show_example(found, 0, made, ["b", "a"]).endswith("label: b")
    with pytest.raises(FormatError, match=r"data.jsonl, line 2: the label 'a' is none of those learnt \('b', 'c'\)"):
        class_examples(rows, made, ["b", "c"], 9)


def test_pairs_have_kinds_where_the_model_tells_them_apart(tmp_path):
    from tests.text.folders import sentence_folder

    made = nblora.load_tokenizer(sentence_folder(tmp_path / "m"))
    rows = records({"text": "cat", "text_pair": "the mat", "label": "a"})
    found = class_examples(rows, made, ["a", "b"], 99)
    assert found.kinds[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert list(found.inputs) == ["input_ids", "token_type_ids"]
    assert class_examples(rows, made, ["a", "b"], 99, kinds=False).kinds is None
    assert np.array_equal(class_examples(rows, made, ["a", "b"], 5).kinds[0], [0, 0, 0, 1, 1])
