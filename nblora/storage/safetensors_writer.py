"""Layout of safetensors files, and a writer of what is in memory. More than that is streamed by its owner."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .atomic import replace_whole
from .dtypes import STORED, stored_as
from .safetensors_reader import element_count


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, dtype as the format spells it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return STORED[self.dtype].bits * element_count(self.shape) // 8


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
    """Write a safetensors file, whole or not at all.

    Parameters
    ----------
    path : path-like
    tensors : mapping of str to ndarray
        Of any type that the format has; uint16 is the bits of bfloat16.
    metadata : mapping of str to str, optional

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    names = {name: stored_as(array.dtype) for name, array in arrays.items()}
    # Widest first, so that every tensor is aligned to its own size.
    order = sorted(arrays, key=lambda name: -STORED[names[name]].bits)
    with replace_whole(path) as file:
        file.write(build_header((Entry(name, names[name], arrays[name].shape) for name in order), metadata))
        for name in order:
            file.write(arrays[name].reshape(-1).view(np.uint8).data)
