"""Bounds on what a file may hold, counted before anything of it is parsed."""

import struct
import time

import pytest

from nblora.errors import FormatError
from nblora.formats import PeftAdapter, SafetensorsFile
from nblora.formats.model_files import open_model
from nblora.storage.bounded import MOST_PARTS, parse_json

pytestmark = pytest.mark.small


def header(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


@pytest.mark.parametrize(
    "text",
    [b'{"a":[' + b"[]," * MOST_PARTS + b"[]]}", b'{"__metadata__":{' + b'"a":"b",' * MOST_PARTS + b'"a":"b"}}'],
    ids=["lists", "metadata"],
)
def test_a_header_of_too_many_parts_is_refused_before_it_is_parsed(text, tmp_path):
    began = time.process_time()
    with pytest.raises(FormatError, match=rf"commas, colons and brackets, more than the {MOST_PARTS}"):
        SafetensorsFile(header(tmp_path / "file", text))
    assert time.process_time() - began < 2


def test_as_many_tensors_as_a_large_shard_has_are_read(tmp_path):
    one = b'"t%d":{"dtype":"F32","shape":[0,4096],"data_offsets":[0,0]}'
    path = header(tmp_path / "file", b"{" + b",".join(one % place for place in range(20_000)) + b"}")
    with SafetensorsFile(path) as file:
        assert len(file.tensors) == 20_000


def test_configurations_and_indices_are_bounded_in_bytes(tmp_path):
    blanks = b" " * (65 * 2**20)
    (tmp_path / "adapter_config.json").write_bytes(b"{" + blanks + b"}")
    (tmp_path / "model.safetensors.index.json").write_bytes(b"{" + blanks + b"}")
    with pytest.raises(FormatError, match=r"adapter_config.json: larger than"):
        PeftAdapter(tmp_path)
    with pytest.raises(FormatError, match=r"index.json: larger than"), open_model(tmp_path):
        pass


def test_a_long_value_is_cut_in_the_message(tmp_path):
    name = b"x" * 1_000_000
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(header(tmp_path / "file", b'{"' + name + b'":{"dtype":"F33","shape":[],"data_offsets":[0,4]}}'))
    message = str(caught.value)
    assert len(message) < 4000
    assert message.startswith(str(tmp_path / "file"))
    assert "characters) …" in message
    assert "known are" in message


def test_nesting_without_end_is_no_crash():
    for text in (b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(ValueError, match="deeply"):
            parse_json(text)
