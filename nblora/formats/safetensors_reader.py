"""A bounded reader of safetensors files: the header is checked whole, tensors are read with `pread` on demand.

Nothing is mapped into memory and nothing is believed: what the reference implementation rejects is rejected here, and
so are duplicate names, fields that the format does not know, symbolic links and special files.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from nblora.errors import FormatError

MAX_HEADER = 100_000_000  # bytes, the reference implementation's own bound
_LARGEST = 2**64 - 1  # sizes and offsets are unsigned 64-bit numbers
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Bits of one element of every dtype that the format knows."""
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""The dtypes that take part in arithmetic, and the NumPy type that holds their bits."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its name, dtype as the format spells it, shape, and bytes [start, stop) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return element_count(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


def element_count(shape: tuple[int, ...]) -> int:
    """Product of the sizes in `shape`."""
    count = 1
    for size in shape:
        count *= size
    return count


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises
    ------
    FormatError
        If `path` is a symbolic link (other than a Hugging Face cache's own) or not a regular file.
    OSError
        If it cannot be opened.
    """
    target = resolve_link(Path(path))
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(target, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path}: expected a regular file, got a folder or a special file")
    return descriptor


def resolve_link(path: Path) -> Path:
    """Return `path`, or what it points to if it is a link of a Hugging Face cache (snapshots/… to blobs/…).

    Raises
    ------
    FormatError
        For any other symbolic link: it may lead out of the checkpoint, or into the output.
    """
    if not path.is_symlink():
        return path
    target = path.resolve()
    repository = target.parent.parent
    inside = path.absolute().parent.resolve()
    if target.parent.name == "blobs" and inside.is_relative_to(repository / "snapshots"):
        return target
    raise FormatError(f"{path}: is a symbolic link (to {target}); pass the real file or a folder that holds it")


class SafetensorsFile:
    """An open safetensors file, its header checked.

    Parameters
    ----------
    path : path-like
        A regular file.

    Attributes
    ----------
    path : Path
    tensors : dict of str to TensorInfo
        In the order of their bytes.
    metadata : dict of str to str
        Empty where the file has none.
    header : bytes
        The header as stored, its length included: the first `len(header)` bytes of the file.
    nbytes : int
        Size of the file.

    Raises
    ------
    FormatError
        If the file is not a well-formed safetensors file; the message names the file and the fault.
    OSError
        If it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor = open_regular(path)
        try:
            self.nbytes = os.fstat(self._descriptor).st_size
            self.header = self._read_header()
            self.metadata, self.tensors = self._parse()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def same_file(self, path: str | os.PathLike[str]) -> bool:
        """Whether `path` leads to this very file."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        return False

    def pread(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (bytes) from the file's byte `offset` on; safe in several threads at once.

        Raises
        ------
        FormatError
            If the file ends before the buffer is full.
        """
        while len(buffer):
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise FormatError(f"{self.path}: ends at byte {offset}, inside a tensor; it was cut while being read")
            buffer, offset = buffer[count:], offset + count

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as an array that owns its memory.

        Parameters
        ----------
        name : str

        Returns
        -------
        ndarray
            Of float64, float32 or float16; bfloat16 comes as the uint16 of its bits, every other dtype as uint8 bytes.
        """
        info = self.tensors[name]
        raw = np.empty(info.nbytes, np.uint8)
        self.pread(memoryview(raw), info.start)
        dtype = FLOATS.get(info.dtype)
        return raw if dtype is None else raw.view(dtype).reshape(info.shape)

    def _fault(self, fault: str) -> FormatError:
        return FormatError(f"{self.path}: {fault}")

    def _read_header(self) -> bytes:
        if self.nbytes < 8:
            raise self._fault(f"not a safetensors file: {self.nbytes} bytes, shorter than the 8 of a header's length")
        prefix = bytearray(8)
        self.pread(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise self._fault(f"the header claims {length} bytes, more than the allowed {MAX_HEADER}")
        if length + 8 > self.nbytes:
            raise self._fault(f"the header claims {length} bytes, but only {self.nbytes - 8} follow; the file is cut")
        header = bytearray(8 + length)
        self.pread(memoryview(header), 0)
        return bytes(header)

    def _parse(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        try:
            header = parse_json(self.header[8:])
        except ValueError as error:
            raise self._fault(f"the header is not valid: {error}") from None
        if not isinstance(header, dict):
            raise self._fault("the header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._fault("__metadata__ must map strings to strings")
        infos = [self._tensor(name, entry) for name, entry in header.items()]
        infos.sort(key=lambda info: (info.start, info.stop))
        self._check_coverage(infos)
        return metadata, {info.name: info for info in infos}

    def _tensor(self, name: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._fault(f"tensor {name!r} must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise self._fault(f"tensor {name!r} has the unknown dtype {dtype!r}; known are {', '.join(BITS)}")
        if not _is_sizes(shape):
            raise self._fault(f"tensor {name!r} has the shape {shape!r}; expected a list of sizes")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise self._fault(f"tensor {name!r} has data_offsets {offsets!r}; expected two offsets")
        bits = BITS[dtype]
        count = 1
        for size in shape:
            count *= size
            if count > _LARGEST:
                raise self._fault(f"tensor {name!r} has the shape {shape!r}; its size overflows 64 bits")
        bits *= count
        start, stop = offsets
        if bits > _LARGEST or bits % 8 or stop - start != bits // 8:
            raise self._fault(
                f"tensor {name!r}: {dtype} of shape {shape} needs {bits / 8:g} bytes, but data_offsets "
                f"[{start}, {stop}] hold {stop - start}"
            )
        base = len(self.header)
        return TensorInfo(name, dtype, tuple(shape), base + start, base + stop)

    def _check_coverage(self, infos: list[TensorInfo]) -> None:
        base = end = len(self.header)
        for info in infos:
            if info.start != end:
                fault = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
                offsets = f"[{info.start - base}, {info.stop - base}]"
                raise self._fault(f"tensor {info.name!r} at data_offsets {offsets} {fault} (expected {end - base})")
            end = info.stop
        if end != self.nbytes:
            fault = "data is missing: the file is cut" if end > self.nbytes else "bytes follow that no tensor covers"
            raise self._fault(f"the tensors end at byte {end} of {self.nbytes}; {fault}")


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _LARGEST for size in value)


def parse_json(data: bytes) -> Any:
    """Parse JSON as strictly as the format's reference implementation does, and without duplicate names.

    Parameters
    ----------
    data : bytes
        UTF-8.

    Returns
    -------
    object
        What `json.loads` gives; integers beyond 64 bits and minus zero come as floats.

    Raises
    ------
    ValueError
        For anything that is not strict JSON; the message says what.
    """
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_int=lambda digits: float(digits) if digits == "-0" or len(digits) > 20 else int(digits),
            parse_constant=_reject_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name!r} occurs twice")
            seen.add(name)
    for name, value in pairs:
        _check_text(name)
        if isinstance(value, str):
            _check_text(value)
    return result


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the string {text!r} holds half of a surrogate pair") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def iterate_chunks(nbytes: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) pieces of at most `chunk` that cover `nbytes`."""
    for start in range(0, nbytes, chunk):
        yield start, min(start + chunk, nbytes)
