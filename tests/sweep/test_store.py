import json

import pytest

from nblora.errors import FormatError, NbloraError
from nblora.sweep.store import ResultsFile, read_results


def record(key, status="done"):
    return {"key": key, "status": status, "settings": {"rank": 1}, "metrics": {"val_loss": 0.1}}


def write(path, *keys):
    with ResultsFile(path) as file:
        for key in keys:
            file.append(record(key))


def test_appends_and_reads_back(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, "a", "b")
    before = path.read_bytes()
    write(path, "c")
    assert path.read_bytes().startswith(before)
    assert [found["key"] for found in read_results(path)] == ["a", "b", "c"]
    with ResultsFile(path) as file:
        assert file.is_finished("b")
        assert not file.is_finished("d")


@pytest.mark.parametrize("kept", [1, 5, 20, -2])
def test_torn_last_line_is_cut_off(tmp_path, kept):
    """A line of which a kill left only the beginning costs that run alone."""
    path = tmp_path / "results.jsonl"
    write(path, "a", "b")
    whole = path.read_bytes()
    last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    path.write_bytes(whole + last[:kept])
    assert len(read_results(path)) == 2
    write(path, "c")
    assert [found["key"] for found in read_results(path)] == ["a", "b", "c"]
    assert path.read_bytes().startswith(whole)


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-1])
    write(path, "c")
    assert [found["key"] for found in read_results(path)] == ["a", "b", "c"]


def test_failed_runs_are_repeated_and_diverged_ones_are_not(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path) as file:
        file.append(record("a", "failed"))
        file.append(record("b", "diverged"))
        assert not file.is_finished("a")
        assert file.is_finished("b")
        file.append(record("a"))
        assert file.is_finished("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"important notes\n", "line 1 is not JSON"),
        (b"important notes without an end", "not a results file"),
        (b'{"a": 1}\n', "no result of `nblora sweep`"),
        (b"[1]\n", "no result of `nblora sweep`"),
        (b'{"format": "nblora.sweep", "version": 2}\n', "format version 2"),
        (b'{"format": "nblora.sweep", "version": 1, "key": 3}\n', "'key' must be a str, got 3"),
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        ResultsFile(path)
    assert path.read_bytes() == content


def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "results.jsonl"
    with ResultsFile(path) as file:
        with pytest.raises(NbloraError, match="another sweep is writing"):
            ResultsFile(path)
        file.append(record("a"))
    write(path, "b")
    assert len(path.read_text().splitlines()) == 2


def test_lines_are_json_of_their_own(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, "a", "b")
    for line in path.read_text().splitlines():
        assert json.loads(line)["format"] == "nblora.sweep"
