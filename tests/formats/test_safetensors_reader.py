"""The bounded reader: hostile files, and agreement with the reference implementation."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from nblora.errors import FormatError
from nblora.formats import SafetensorsFile
from nblora.storage.dtypes import STORED
from nblora.storage.safetensors_writer import write_safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = bytes(range(8))


def pack(header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def two(first, second):
    return {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": first},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": second},
    }


BROKEN = {
    "empty": (b"", "shorter than the 8"),
    "seven bytes": (b"1234567", "shorter than the 8"),
    "huge header": ((10**9).to_bytes(8, "little") + b"{}", "more than the allowed"),
    "largest header": ((2**64 - 1).to_bytes(8, "little") + b"{}", "more than the allowed"),
    "header past the end": ((50).to_bytes(8, "little") + b"{}", "only 2 follow"),
    "no JSON": (pack(b"{]"), "header is not valid"),
    "a list": (pack(b"[]"), "not a JSON object"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "not UTF-8"),
    "deep nesting": (pack(b"[" * 100_000), "nested too deeply"),
    "duplicate name": (pack(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2)), "'a' occurs twice"),
    "duplicate field": (pack(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "occurs twice"),
    "unknown dtype": (pack({"a": ENTRY | {"dtype": "F7"}}), "unknown dtype 'F7'"),
    "dtype of another type": (pack({"a": ENTRY | {"dtype": 3}}), "unknown dtype 3"),
    "unknown field": (pack({"a": ENTRY | {"more": 1}}), "exactly dtype, shape and data_offsets"),
    "missing field": (pack({"a": {"dtype": "F32", "shape": [2]}}), "exactly dtype, shape and data_offsets"),
    "negative size": (pack({"a": ENTRY | {"shape": [-2]}}), "expected a list of sizes"),
    "minus zero": (pack(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "expected a list of sizes"),
    "float size": (pack({"a": ENTRY | {"shape": [2.0]}}), "expected a list of sizes"),
    "true for a size": (pack({"a": ENTRY | {"shape": [True]}}), "expected a list of sizes"),
    "size beyond 64 bits": (pack({"a": ENTRY | {"shape": [2**64]}}), "expected a list of sizes"),
    "size of many digits": (pack(b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 5000)), "sizes"),
    "size overflow": (pack({"a": ENTRY | {"shape": [2**40, 2**40]}}), "overflows"),
    "three offsets": (pack({"a": ENTRY | {"data_offsets": [0, 4, 8]}}), "expected two offsets"),
    "offsets that do not fit": (pack({"a": ENTRY | {"data_offsets": [0, 7]}}), "needs 8 bytes"),
    "offsets backwards": (pack({"a": ENTRY | {"data_offsets": [8, 0]}}), "needs 8 bytes"),
    "offsets out of range": (pack({"a": ENTRY | {"data_offsets": [8, 16]}}), "leaves a hole"),
    "overlap": (pack(two([0, 4], [2, 6])), "'b' at data_offsets \\[2, 6\\] overlaps"),
    "same bytes twice": (pack(two([0, 4], [0, 4])), "overlaps"),
    "hole": (pack(two([0, 4], [5, 9])), "leaves a hole"),
    "cut data": (pack({"a": ENTRY}, DATA[:7]), "the file is cut"),
    "data to spare": (pack({"a": ENTRY}, DATA + b"x"), "no tensor covers"),
    "half a byte": (pack({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"ab"), "needs 1.5 bytes"),
    "numbers in the metadata": (pack({"__metadata__": {"a": 1}, "a": ENTRY}), "__metadata__"),
    "half a surrogate pair": (pack(b'{"\\ud800": %b}' % json.dumps(ENTRY).encode()), "surrogate"),
    "NaN": (pack(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "NaN is not"),
    "zip file": (b"PK\x03\x04" + bytes(100), "the file is cut"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_with_its_name_and_fault(case, tmp_path):
    data, fault = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=fault) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_link_folder_and_pipe_are_refused(tmp_path):
    real = tmp_path / "real.safetensors"
    real.write_bytes(pack({"a": ENTRY}))
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, fault in (("link", "symbolic link"), ("pipe", "regular file"), ("folder", "regular file")):
        with pytest.raises(FormatError, match=fault):
            SafetensorsFile(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "nothing")


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    blob = tmp_path / "models--a--b" / "blobs" / "123"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(pack({"a": ENTRY}))
    link = tmp_path / "models--a--b" / "snapshots" / "rev" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../blobs/123")
    with SafetensorsFile(link) as file:
        assert file.read("a").tobytes() == DATA
    link.unlink()
    outside = tmp_path / "blobs" / "123"
    outside.parent.mkdir()
    shutil.copy(blob, outside)
    link.symlink_to(outside)
    with pytest.raises(FormatError, match="symbolic link"):
        SafetensorsFile(link)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"a": ENTRY}))
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FormatError, match="cut while being read"):
            file.read("a")


@pytest.mark.parametrize("metadata", ["[]", '""', "0", "false", '{"a": null}', '{"a": 1}'])
def test_metadata_that_is_no_map_of_strings_is_refused(metadata, tmp_path):
    text = f'{{"__metadata__": {metadata}}}'.encode()
    blob = len(text).to_bytes(8, "little") + text
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(blob)
    path = tmp_path / "t.safetensors"
    path.write_bytes(blob)
    with pytest.raises(FormatError, match=r"t\.safetensors: __metadata__"):
        SafetensorsFile(path)


def test_an_empty_tensor_of_an_impossible_shape_is_an_error_when_it_is_read(tmp_path):
    header = {"t": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with SafetensorsFile(path) as file, pytest.raises(FormatError, match=r"t\.safetensors: tensor 't' has the shape"):
        file.read("t")


def test_every_dtype_is_read_as_its_bits(tmp_path, rng):
    arrays = {
        "F64": rng.standard_normal((2, 3)), "F32": rng.standard_normal(5).astype(np.float32),
        "F16": rng.standard_normal((1, 2)).astype(np.float16), "scalar": np.array(2.5),
        "BF16": rng.standard_normal(3).astype(ml_dtypes.bfloat16).view(np.uint16), "empty": np.empty((0, 4)),
    }  # fmt: skip
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays, {"format": "pt"})
    reference = dict(safetensors.deserialize(path.read_bytes()))
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.read(name), array)
            assert reference[name]["data"] == array.tobytes()
            assert tuple(reference[name]["shape"]) == array.shape == file.read(name).shape
        np.testing.assert_array_equal(
            file.read_wide("BF16"), arrays["BF16"].view(ml_dtypes.bfloat16).astype(np.float64)
        )


def agree(data, path):
    """What the reference rejects is rejected; what both accept reads equal. Returns whether both accepted."""
    path.write_bytes(data)
    try:
        reference = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:
        with pytest.raises(FormatError):
            SafetensorsFile(path)
        return False
    try:
        file = SafetensorsFile(path)
    except FormatError:
        return False
    with file:
        assert file.tensors.keys() == reference.keys()
        for name, info in file.tensors.items():
            assert (info.dtype, list(info.shape)) == (reference[name]["dtype"], reference[name]["shape"])
            assert file.read(name).tobytes() == bytes(reference[name]["data"])
    return True


SIZES = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def headers(draw):
    """A header that is right, or nearly."""
    names = draw(st.lists(st.text(max_size=3), max_size=4, unique=True))
    header, at = {}, 0
    for name in names:
        dtype, shape = draw(st.sampled_from([*STORED, "F32", "F32"])), draw(SIZES)
        size = (STORED[dtype].bits * int(np.prod(shape, dtype=object)) + 7) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2))
    return header, at


FAULTS = st.one_of(
    st.integers(-(2**65), 2**65), st.floats(), st.none(), st.booleans(), st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=200)
@given(headers(), st.data())
def test_structured_headers_agree_with_the_reference(tmp_path_factory, made, data):
    path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    header, size = made
    entries = [name for name in header if name != "__metadata__"]
    for _ in range(data.draw(st.integers(0, 2))):
        if entries:
            name = data.draw(st.sampled_from(entries))
            if isinstance(header[name], dict):
                header[name] = {
                    **header[name],
                    data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"])): data.draw(FAULTS),
                }
        else:
            header[data.draw(st.text(max_size=2))] = data.draw(FAULTS)
    spare = data.draw(st.sampled_from([0, 0, 0, 1, -1]))
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    text += b" " * data.draw(st.integers(0, 3))
    agree(pack(text, bytes(max(size + spare, 0))), path)


@settings(max_examples=200)
@given(st.data())
def test_mutated_bytes_agree_with_the_reference(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    valid = bytearray(pack({"__metadata__": {"k": "v"}, **two([0, 4], [4, 8])}))
    assert agree(bytes(valid), path)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(valid) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        byte = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b'{}[]",:0123456789-.eE \\u'))))
        if kind == "set":
            valid[at] = byte
        elif kind == "insert":
            valid.insert(at, byte)
        elif kind == "delete":
            del valid[at]
        else:
            del valid[max(at, 1) :]
        if len(valid) > 8 and data.draw(st.booleans()):  # a length that fits again, so that the header is looked at
            end = valid.rfind(b"}}") + 2
            valid[:8] = max(end - 8, 0).to_bytes(8, "little")
    agree(bytes(valid), path)


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_agree_with_the_reference(tmp_path_factory, blob):
    path = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    agree(blob, path)
    agree(pack(blob, b""), path)
    agree(pack(b"{" + blob + b"}", b""), path)
