"""Layout of safetensors files, and a writer for small ones. Large ones are streamed by their owner."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nblora.formats.safetensors_reader import BITS, FLOATS, element_count
from nblora.storage.atomic import replace_whole

_DTYPES = {np.dtype(dtype): name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, dtype as the format spells it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return BITS[self.dtype] * element_count(self.shape) // 8


def build_header(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the first bytes of a safetensors file: the header's length and the header, padded to eight bytes.

    Parameters
    ----------
    entries : iterable of Entry
        In the order in which their bytes will follow.
    metadata : mapping of str to str, optional

    Returns
    -------
    bytes
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a small safetensors file, whole or not at all.

    Parameters
    ----------
    path : path-like
    tensors : mapping of str to ndarray
        Of float64, float32 or float16; uint16 is the bits of bfloat16.
    metadata : mapping of str to str, optional

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    names = {name: _DTYPES[array.dtype] for name, array in arrays.items()}
    # Widest first, so that every tensor is aligned to its own size.
    order = sorted(arrays, key=lambda name: -BITS[names[name]])
    with replace_whole(path) as file:
        file.write(build_header((Entry(name, names[name], arrays[name].shape) for name in order), metadata))
        for name in order:
            file.write(arrays[name].tobytes())
