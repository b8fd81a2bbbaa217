"""A bounded reader of GGUF files, llama.cpp's format: the header is checked whole, tensors are read on demand.

Layout (ggml/docs/gguf.md): "GGUF", the version, the counts of tensors and of entries; the entries, each a key, a type
and a value; the tensors' names, shapes, types and offsets; then, aligned, their numbers. All little-endian. The `gguf`
package's own reader maps the file and believes its counts; here nothing is believed. The package turns blocks of
quantised numbers into floats.
"""

import os
import struct
from typing import Any

import numpy as np

from nblora.errors import FormatError, MissingExtraError

from .bounded import MOST_PARTS
from .regular import RegularFile
from .safetensors_reader import TensorInfo, element_count, iterate_chunks

MAX_HEADER = 100_000_000
"""Bytes of entries and tensor names, as for safetensors; a vocabulary of 256,000 with its merges takes 15 million."""
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34)}
"""Types of tensors that are read: the numbers of a block, and its bytes."""
_CODES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16"}
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1", 10: "u8", 11: "i8", 12: "f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MOST_AXES = 4  # ggml's own bound
_PIECE = 1 << 16  # bytes of a tensor that are turned into floats at once: SmolLM2 took 1.0 s, by a megabyte each 3.4 s
_READ = 1 << 22  # bytes of the header that are read at once


class GGUFFile(RegularFile):
    """An open GGUF file, its header checked.

    Parameters
    ----------
    path : path-like
        A regular file, which may be reached by links.

    Attributes
    ----------
    metadata : dict
        Entries by their keys: int, float, bool, str, a list of str, or an array of numbers.
    tensors : dict of str to TensorInfo
        In the order of the file; the dtypes are those of `BLOCKS`, shapes as NumPy has them, rows first.

    Raises
    ------
    FormatError
        If the file is not a well-formed GGUF file, or holds tensors of a type that is not in `BLOCKS`.
    OSError
        If it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, follow_links=True)
        try:
            header = _Header(self)
            self.metadata = header.metadata
            self.tensors = header.tensors
        except BaseException:
            self.close()
            raise

    def read_as(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Return one tensor in this dtype, float32 or float64: the numbers of `gguf.dequantize`.

        Of what the file holds no more than a piece is in memory beside the result.
        """
        info = self.tensors[name]
        numbers, size = BLOCKS[info.dtype]
        result = np.empty(info.size, dtype)
        step = max(1, _PIECE // size)
        for start, stop in iterate_chunks(info.size // numbers, step):
            raw = np.empty((stop - start, size), np.uint8)
            self.pread(raw.reshape(-1).data, info.start + start * size)
            result[start * numbers : stop * numbers] = _as_floats(raw, info.dtype).reshape(-1)
        return result.reshape(info.shape)

    def bytes_of(self, name: str) -> bytes:
        """The bytes of one tensor, as stored."""
        info = self.tensors[name]
        raw = bytearray(info.nbytes)
        self.pread(memoryview(raw), info.start)
        return bytes(raw)


def import_gguf() -> Any:
    """The `gguf` package."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("GGUF files need the gguf package: pip install 'nblora[gguf]'") from error
    return gguf


def _as_floats(raw: np.ndarray, kind: str) -> np.ndarray:
    """Blocks of numbers, shape (blocks, bytes), as floats."""
    if kind == "F32":
        return raw.view("<f4")
    gguf = import_gguf()
    with np.errstate(invalid="ignore", over="ignore"):  # a scale of infinity, or one that is no number
        return gguf.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[kind])  # a row of any length


class _Header:
    """Reads the header from its first byte on."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, self._data, self._at, self._strings = file, b"", 0, 0
        if file.nbytes < 24 or self._bytes(4) != b"GGUF":
            raise self.fault("is not a GGUF file")
        version = self._number("u4")
        if version not in (2, 3):
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            what = "of a big-endian machine" if big else f"of version {version}"
            raise self.fault(f"is a GGUF file {what}; supported are versions 2 and 3, little-endian")
        tensors, entries = self._number("u8"), self._number("u8")
        self._expect(entries, 13, "entries")  # a key of length 0, a type, a byte
        self._expect(tensors, 32, "tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text("a key")
            if key in self.metadata:
                raise self.fault(f"the entry {key!r} occurs twice")
            self.metadata[key] = self._value(key, self._number("u4"))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fault(f"general.alignment is {alignment!r}; expected a power of two")
        infos = [self._tensor(alignment) for _ in range(tensors)]
        base = -(-self._at // alignment) * alignment
        self.tensors = {info.name: _moved(info, base) for info in infos}
        if len(self.tensors) != tensors:
            raise self.fault("two tensors have the same name")
        end, before = base, ""
        for info in sorted(self.tensors.values(), key=lambda info: (info.start, info.stop)):
            if info.start < end and info.nbytes:
                raise self.fault(f"the tensors {before!r} and {info.name!r} overlap")
            end, before = max(end, info.stop), info.name
        if self.tensors and end > file.nbytes:
            raise self.fault(f"the tensors end at byte {end} of {file.nbytes}: the file is cut")

    def fault(self, text: str) -> FormatError:
        """An error of this file."""
        return FormatError(f"{self._file.path}: {text}")

    def _expect(self, count: int, size: int, what: str) -> None:
        """FormatError where so many things of at least `size` bytes cannot follow."""
        if count * size > self._file.nbytes - self._at:
            raise self.fault(f"says that {count} {what} follow byte {self._at}, and has {self._file.nbytes} bytes")

    def _bytes(self, count: int) -> bytes:
        stop = self._at + count
        if stop > len(self._data):
            if stop > min(self._file.nbytes, MAX_HEADER):
                limit = "is cut" if stop > self._file.nbytes else f"is larger than the allowed {MAX_HEADER} bytes"
                raise self.fault(f"the header {limit}, at byte {self._at}")
            more = bytearray(min(max(count, _READ), self._file.nbytes - len(self._data)))
            self._file.pread(memoryview(more), len(self._data))
            self._data += bytes(more)
        found = self._data[self._at : stop]
        self._at = stop
        return found

    def _number(self, code: str) -> Any:
        return np.frombuffer(self._bytes(int(code[1])), f"<{code}")[0].item()

    def _text(self, what: str) -> str:
        (length,) = struct.unpack("<Q", self._bytes(8))
        self._expect(length, 1, f"bytes of {what}")
        self._strings += 1
        if self._strings > MOST_PARTS:
            raise self.fault(f"holds more than the {MOST_PARTS} strings that such a file may have")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self.fault(f"{what} before byte {self._at} is not UTF-8") from None

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text(f"the entry {key!r}")
        if kind == _ARRAY:
            return self._array(key, self._number("u4"), self._number("u8"))
        if kind not in _SCALARS:
            raise self.fault(f"the entry {key!r} is of the unknown type {kind}")
        value = self._number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str, kind: int, count: int) -> Any:
        if kind == _STRING:
            self._expect(count, 8, f"strings of the entry {key!r}")
            return [self._text(f"the entry {key!r}") for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fault(f"the entry {key!r} is an array of the unsupported type {kind}")
        size = int(_SCALARS[kind][1])
        self._expect(count, size, f"numbers of the entry {key!r}")
        return np.frombuffer(self._bytes(count * size), f"<{_SCALARS[kind]}")

    def _tensor(self, alignment: int) -> TensorInfo:
        """One tensor, its bytes counted from the first tensor's."""
        name = self._text("a tensor's name")
        axes = self._number("u4")
        if axes > _MOST_AXES:
            raise self.fault(f"the tensor {name!r} has {axes} axes; expected at most {_MOST_AXES}")
        shape = tuple(reversed([self._number("u8") for _ in range(axes)]))
        code, offset = self._number("u4"), self._number("u8")
        if code not in _CODES:
            raise self.fault(
                f"the tensor {name!r} is of the type {_called(code)}, which is not supported; supported are "
                f"{', '.join(BLOCKS)}"
            )
        numbers, size = BLOCKS[_CODES[code]]
        if 0 in shape or not shape or shape[-1] % numbers:
            raise self.fault(
                f"the tensor {name!r} of type {_CODES[code]} has the shape {shape}; expected rows of {numbers}·n"
            )
        if offset % alignment:
            raise self.fault(f"the tensor {name!r} begins at {offset}, which the alignment {alignment} does not divide")
        nbytes = element_count(shape) // numbers * size
        if nbytes > self._file.nbytes:
            raise self.fault(f"the tensor {name!r} of shape {shape} has {nbytes} bytes, the file {self._file.nbytes}")
        return TensorInfo(name, _CODES[code], shape, offset, offset + nbytes)


def _moved(info: TensorInfo, base: int) -> TensorInfo:
    return TensorInfo(info.name, info.dtype, info.shape, base + info.start, base + info.stop)


def _called(code: int) -> str:
    """What the format calls a type."""
    try:
        return import_gguf().GGMLQuantizationType(code).name
    except (ValueError, MissingExtraError):
        return str(code)
