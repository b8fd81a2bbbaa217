"""A bounded reader of safetensors files: the header is checked whole, tensors are read with `pread` on demand.

Nothing is mapped into memory and nothing is believed: what the reference implementation rejects is rejected here, and
so are duplicate names, fields that the format does not know, symbolic links and special files.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nblora.errors import FormatError

from .bounded import parse_json
from .dtypes import FLOATS, STORED
from .regular import RegularFile

MAX_HEADER = 100_000_000  # bytes, the reference implementation's own bound
_LARGEST = 2**64 - 1  # sizes and offsets are unsigned 64-bit numbers


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


class SafetensorsFile(RegularFile):
    """An open safetensors file, its header checked.

    Parameters
    ----------
    path : path-like
        A regular file.
    follow_links : bool
        Open what a symbolic link leads to, which is refused by default.

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

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        super().__init__(path, follow_links=follow_links)
        try:
            self.header = self._read_header()
            self.metadata, self.tensors = parse_header(self.header, self.path, self.nbytes)
        except BaseException:
            self.close()
            raise

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
        self.pread(raw.data, info.start)
        dtype = STORED[info.dtype].array if info.dtype in FLOATS else None
        try:
            return raw if dtype is None else raw.view(dtype).reshape(info.shape)
        except ValueError:  # no numbers, in a shape whose other sizes are beyond an array's
            raise self._fault(f"tensor {name!r} has the shape {list(info.shape)}, which no array can have") from None

    def array(self, name: str) -> np.ndarray:
        """Return one tensor of any type that NumPy has, as an array that owns its memory, in its own shape and type."""
        dtype = STORED[self.tensors[name].dtype].array
        if dtype is None:
            raise self._fault(f"tensor {name!r} is of type {self.tensors[name].dtype}, which no array has")
        return self.read(name).reshape(-1).view(np.uint8).view(dtype).reshape(self.tensors[name].shape)

    def read_wide(self, name: str) -> np.ndarray:
        """Return one floating-point tensor as float64, exactly."""
        info = self.tensors[name]
        return widen(self.read(name).reshape(-1).view(np.uint8), info.dtype).reshape(info.shape)

    def read_as(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Return one floating-point tensor in this dtype, float32 or float64: as it is where it has it, else cast."""
        info = self.tensors[name]
        if STORED[info.dtype].array == dtype.type:
            return self.read(name)
        raw = self.read(name).reshape(-1).view(np.uint8)
        if info.dtype == "BF16":
            return _widen_bfloat16(raw).astype(dtype, copy=False).reshape(info.shape)
        return raw.view(STORED[info.dtype].array).astype(dtype).reshape(info.shape)

    def mapped(self, name: str) -> np.ndarray:
        """Return one tensor of a type that NumPy has, mapped: read when it is looked at, copied where written.

        A file that shrinks while it is mapped ends the process.
        """
        info = self.tensors[name]
        dtype = STORED[info.dtype].array
        if dtype is None:
            raise self._fault(f"tensor {name!r} is of type {info.dtype}, which no array has")
        if not info.size:
            return np.empty(info.shape, dtype)
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            whole = np.memmap(file, np.uint8, "c", info.start, (info.nbytes,))
        return np.asarray(whole).view(dtype).reshape(info.shape)

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


def parse_header(header: bytes, path: Path, nbytes: int | None = None) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Check a safetensors header.

    Parameters
    ----------
    header : bytes
        Its length included.
    path : Path
        The file, for messages.
    nbytes : int, optional
        Size of the file, which the tensors must cover; not checked when left out.

    Returns
    -------
    metadata : dict of str to str
    tensors : dict of str to TensorInfo
        In the order of their bytes.

    Raises
    ------
    FormatError
        The message names the file, the tensor and the fault.
    """
    try:
        parsed = parse_json(header[8:])
    except ValueError as error:
        raise FormatError(f"{path}: the header is not valid: {error}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    infos = [_check_tensor(path, len(header), name, entry) for name, entry in parsed.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_coverage(path, len(header), infos, nbytes)
    return metadata, {info.name: info for info in infos}


def _check_tensor(path: Path, base: int, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED:
        raise FormatError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}; known are {', '.join(STORED)}")
    if not _is_sizes(shape):
        raise FormatError(f"{path}: tensor {name!r} has the shape {shape!r}; expected a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{path}: tensor {name!r} has data_offsets {offsets!r}; expected two offsets")
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST:
            raise FormatError(f"{path}: tensor {name!r} has the shape {shape!r}; its size overflows 64 bits")
    bits = STORED[dtype].bits * count
    start, stop = offsets
    if bits > _LARGEST or bits % 8 or stop - start != bits // 8:
        raise FormatError(
            f"{path}: tensor {name!r}: {dtype} of shape {shape} needs {bits / 8:g} bytes, but data_offsets "
            f"[{start}, {stop}] hold {stop - start}"
        )
    return TensorInfo(name, dtype, tuple(shape), base + start, base + stop)


def _check_coverage(path: Path, base: int, infos: list[TensorInfo], nbytes: int | None) -> None:
    end = base
    for info in infos:
        if info.start != end:
            fault = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            offsets = f"[{info.start - base}, {info.stop - base}]"
            raise FormatError(f"{path}: tensor {info.name!r} at data_offsets {offsets} {fault}; expected {end - base}")
        end = info.stop
    if nbytes is not None and end != nbytes:
        fault = "data is missing: the file is cut" if end > nbytes else "bytes follow that no tensor covers"
        raise FormatError(f"{path}: the tensors end at byte {end} of {nbytes}; {fault}")


def widen(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Return stored numbers as float64.

    Parameters
    ----------
    raw : ndarray of uint8, shape (n · itemsize,)
    dtype : str
        As safetensors spells it: F64, F32, F16 or BF16.

    Returns
    -------
    ndarray of float64, shape (n,)
    """
    numbers = _widen_bfloat16(raw) if dtype == "BF16" else raw.view(STORED[dtype].array)
    return numbers.astype(np.float64)


def _widen_bfloat16(raw: np.ndarray) -> np.ndarray:
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _LARGEST for size in value)


def iterate_chunks(nbytes: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) pieces of at most `chunk` that cover `nbytes`."""
    for start in range(0, nbytes, chunk):
        yield start, min(start + chunk, nbytes)
