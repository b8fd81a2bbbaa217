"""Files of records: their kinds and forms, and where faults are."""

import json

import pytest

from nblora.errors import FormatError
from nblora.text.labels import read_labels, write_labels
from nblora.text.records import read_parts, read_records

pytestmark = pytest.mark.small

KINDS = [
    ("labelled", {"text": 'a, "b"\nc', "label": "x"}),
    ("labelled", {"text": "a", "text_pair": "b", "label": "x"}),
    ("completion", {"prompt": "p", "completion": " c"}),
    ("text", {"text": "\u2028 é"}),
    ("text", {"text": "a", "text_pair": ""}),
]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("kind", "row"), KINDS)
def test_json_lines_have_their_kind_told_from_the_first_record(tmp_path, kind, row):
    found = read_records(write_lines(tmp_path / "d.jsonl", row, row))
    assert (found.kind, found.rows, found.lines) == (kind, [row, row], [1, 2])


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(("kind", "row"), KINDS)
def test_tables_hold_the_same_and_know_lines_of_records_that_span_several(tmp_path, kind, row, suffix):
    path = tmp_path / f"d{suffix}"
    delimiter = "," if suffix == ".csv" else "\t"
    quoted = ['"' + value.replace('"', '""') + '"' for value in row.values()]
    path.write_text("\ufeff" + "\r\n".join([delimiter.join(row), *[delimiter.join(quoted)] * 2, ""]), newline="")
    found = read_records(path)
    assert (found.kind, found.rows) == (kind, [row, row])
    spans = sum(value.count("\n") for value in row.values())
    assert found.lines == [2, 3 + spans]
    assert found.place(1) == f"{path}, line {3 + spans}"


def test_messages_integer_labels_and_blank_lines(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    assert read_records(write_lines(tmp_path / "m.jsonl", {"messages": talk})).rows == [{"messages": talk}]
    path = tmp_path / "l.jsonl"
    path.write_text('\n{"text": "a", "label": 3}\n\n{"label": "x", "text": "b"}\n  \n')
    found = read_records(path)
    assert found.column("label") == ["3", "x"]
    assert found.lines == [2, 4]
    assert found.column("text_pair") is None
    assert found.part([1]).rows == [{"label": "x", "text": "b"}]
    assert found.part([1]).place(0) == f"{path}, line 4"


GOOD = '{"text": "a", "label": "x"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records"),
        (GOOD + '{"text": "a" "label": "x"}\n', "line 2, column 14: not valid JSON"),
        (GOOD + '{"text": "a", "label": "x"\n', "line 2, column 27: not valid JSON"),
        (GOOD + '{"text": "a", "text": "b"}', "line 2: not valid JSON: the name 'text' occurs twice"),
        (GOOD + '{"text": "a", "label": NaN}', "line 2: not valid JSON: NaN"),
        (GOOD + "[1]", "line 2: expected a JSON object"),
        (GOOD + '{"text": "a"}', "line 2: has the fields text, and the first record (line 1) has text, label"),
        (GOOD + '{"prompt": "a", "completion": "b"}', "line 2: has the fields prompt, completion"),
        ('{"text": "a", "label": "x", "id": 3}', "line 1: the field 'id' is unknown; expected text and label"),
        ('{"prompt": "a"}', "line 1: has the fields prompt; expected"),
        ("{}", "line 1: has the fields (none)"),
        (GOOD + '{"text": null, "label": "x"}', "line 2: text must be a text, got None"),
        (GOOD + '{"text": "a", "label": 1.5}', "line 2: label must be a text or an integer, got 1.5"),
        (GOOD + '{"text": "a", "label": true}', "line 2: label must be a text or an integer, got True"),
        (GOOD + '{"text": "a", "label": " "}', "line 2: label must be"),
        (GOOD + '{"text": "\\ud800", "label": "x"}', "line 2: not valid JSON: .* surrogate"),
        ('{"messages": []}', "line 1: messages must be a list of messages"),
        ('{"messages": [{"role": "user"}]}', "line 1: message 0 must have a role"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "line 1: message 0 must have a role"),
        ('{"messages": ["hi"]}', "line 1: message 0 must have a role"),
    ],
)
def test_faults_of_json_lines_name_the_line(tmp_path, text, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    for part in message.split(" .* "):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no records"),
        (b"text,label\n", "holds no records"),
        (b"text,text\na,b\n", "line 1: the field 'text' occurs twice"),
        (b"text,label\na\n", "line 2: has 1 fields"),
        (b'text,label\n"a\nb",x\na,b,c\n', "line 4: has 3 fields"),
        (b'text,label\na,x\n"a"b,x\n', "line 3: not valid CSV"),
        (b"text,label\na,x\n\xff,x\n", "not UTF-8"),
        (b"text,label\na,x\nb,\n", "line 3: label must be"),
        (b"review,label\na,x\n", "line 2: the field 'review' is unknown"),
    ],
)
def test_faults_of_tables_name_the_line(tmp_path, data, message):
    path = tmp_path / "d.csv"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_other_files_and_missing_ones_are_named(tmp_path):
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(FormatError, match=r"ends in \.jsonl, \.csv, \.tsv"):
        read_records(tmp_path / "d.json")
    with pytest.raises(FormatError, match="is a folder"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")


def test_a_folder_holds_parts(tmp_path):
    with pytest.raises(FormatError, match=r"holds no file of records; expected train\.jsonl"):
        read_parts(tmp_path)
    write_lines(tmp_path / "valid.jsonl", {"label": "y", "text": "b"})
    with pytest.raises(FormatError, match=r"holds valid\.jsonl; expected train\.jsonl"):
        read_parts(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\na,x\n")
    (tmp_path / "notes.txt").write_text("not read")
    parts = read_parts(tmp_path)
    assert {part: records.column("label") for part, records in parts.items()} == {"train": ["x"], "valid": ["y"]}
    assert read_parts(tmp_path / "train.csv").keys() == {"train"}
    write_lines(tmp_path / "test.jsonl", {"text": "b"})
    with pytest.raises(FormatError, match=r"test.jsonl: its records have the fields text, and those of .*train.csv"):
        read_parts(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    write_lines(tmp_path / "train.jsonl", {"label": "y", "text": "b"})
    with pytest.raises(FormatError, match=r"holds train.csv and train.jsonl; expected one"):
        read_parts(tmp_path)


def test_a_part_under_another_name_is_not_left_out_in_silence(tmp_path):
    for name in ("train", "validation"):
        write_lines(tmp_path / f"{name}.jsonl", {"text": "b"})
    with pytest.raises(FormatError, match=r"validation.jsonl: is not read under this name; call it valid.jsonl"):
        read_parts(tmp_path)


def test_labels_come_back_in_their_order(tmp_path):
    assert read_labels(tmp_path) is None
    write_labels(tmp_path, ["spam", "ham", "é"])
    assert json.loads((tmp_path / "labels.json").read_text(encoding="utf-8")) == {"labels": ["spam", "ham", "é"]}
    assert read_labels(tmp_path) == read_labels(tmp_path, 3) == ["spam", "ham", "é"]
    with pytest.raises(FormatError, match="3 names, and the model has 2 classes"):
        read_labels(tmp_path, 2)


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", 1], "ab", None])
def test_labels_that_are_none_are_refused(tmp_path, names):
    (tmp_path / "labels.json").write_text(json.dumps({"labels": names}))
    with pytest.raises(FormatError, match=r"labels.json: labels must"):
        read_labels(tmp_path)
    if isinstance(names, list):
        with pytest.raises(ValueError, match="names must"):
            write_labels(tmp_path, names)
