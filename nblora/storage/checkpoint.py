"""One file, one object: tensors as safetensors, everything else as JSON in its metadata."""

import errno
import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from nblora._version import __version__
from nblora.errors import FormatError

from .safetensors_reader import SafetensorsFile
from .safetensors_writer import write_safetensors

FORMAT = "nblora"
FORMAT_VERSION = 1

Built = TypeVar("Built")


def write_checkpoint(
    path: str | os.PathLike[str], kind: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write `tensors` and what makes an object of them to `path`, whole or not at all."""
    text = json.dumps(config, allow_nan=False, sort_keys=True)
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "nblora_version": __version__,
        "kind": kind,
        "config": text,
        "checksum": _checksum(kind, text, arrays),
    }
    write_safetensors(path, arrays, metadata)


def read_checkpoint(
    path: str | os.PathLike[str], build: Callable[[str, dict[str, Any], dict[str, np.ndarray]], Built]
) -> Built:
    """Read what `write_checkpoint` wrote and return `build(kind, config, tensors)`.

    Raises
    ------
    FormatError
        That names the file and the fault: not a safetensors file, truncated, changed since it was written, not
        nblora's, another format version, or contents from which `build` can make nothing.
    """
    name = os.fspath(path)
    metadata, tensors = _read_tensors(name)
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{name}: a safetensors file, but not one that nblora saved")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise FormatError(
            f"{name}: format version {metadata.get('format_version')!r}; nblora {__version__} reads {FORMAT_VERSION}"
        )
    try:
        kind, text = metadata["kind"], metadata["config"]
        if metadata["checksum"] != _checksum(kind, text, tensors):
            raise FormatError(f"{name}: the contents do not match their checksum: the file was damaged or edited")
        return build(kind, json.loads(text), tensors)
    except FormatError:
        raise
    except KeyError as error:
        raise FormatError(f"{name}: {error.args[0]!r} is missing or unknown") from error
    except (TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise FormatError(f"{name}: {error}") from error


def _read_tensors(name: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Read, and not mapped: a mapping of a file that shrinks meanwhile would end the process."""
    if os.path.isdir(name):  # an OSError, as for a missing file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    try:
        with SafetensorsFile(name, follow_links=True) as file:
            return file.metadata, {key: file.array(key) for key in file.tensors}
    except FormatError as error:
        raise FormatError(f"{name}: not a readable safetensors file: {str(error).removeprefix(f'{name}: ')}") from None


def _checksum(kind: str, config: str, tensors: Mapping[str, np.ndarray]) -> str:
    """CRC-32 of everything that an object is made from."""
    value = zlib.crc32(f"{kind} {config}".encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f" {name} {tensor.dtype} {tensor.shape} ".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def take_tensor(tensors: Mapping[str, np.ndarray], name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return one tensor of the very dtype and shape; ValueError otherwise."""
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"tensor {name!r} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tensor.shape}"
        )
    return tensor
