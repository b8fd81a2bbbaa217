"""One file, one object: tensors as safetensors, everything else as JSON in its metadata."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nblora._version import __version__
from nblora.errors import FormatError

from .atomic import replace_whole

FORMAT = "nblora"
FORMAT_VERSION = 1

Built = TypeVar("Built")


def write_checkpoint(
    path: str | os.PathLike[str], kind: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write `tensors` and what makes an object of them to `path`, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "nblora_version": __version__,
        "kind": kind,
        "config": json.dumps(config, allow_nan=False, sort_keys=True),
    }
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with replace_whole(path) as file:
        file.write(save(arrays, metadata))


def read_checkpoint(
    path: str | os.PathLike[str], build: Callable[[str, dict[str, Any], dict[str, np.ndarray]], Built]
) -> Built:
    """Read what `write_checkpoint` wrote and return `build(kind, config, tensors)`.

    Raises
    ------
    FormatError
        That names the file and the fault: not a safetensors file, truncated, not nblora's, another format version,
        or contents from which `build` can make nothing.
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
        kind, config = metadata["kind"], json.loads(metadata["config"])
        return build(kind, config, tensors)
    except FormatError:
        raise
    except KeyError as error:
        raise FormatError(f"{name}: {error.args[0]!r} is missing or unknown") from error
    except (TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise FormatError(f"{name}: {error}") from error


def _read_tensors(name: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with open(name, "rb"):  # a missing or unreadable file is an OSError, as everywhere
        pass
    try:
        with safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{name}: not a readable safetensors file: {error}") from error
    return metadata, tensors


def take_tensor(tensors: Mapping[str, np.ndarray], name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return one tensor of the very dtype and shape; ValueError otherwise."""
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"tensor {name!r} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tensor.shape}"
        )
    return tensor
