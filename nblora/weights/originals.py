"""The originals of a merge: the bytes that it changed, and the headers they lay under, kept beside its output."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nblora.errors import FormatError
from nblora.formats.model_files import ORIGINALS_SUFFIX, ModelFiles
from nblora.storage.bounded import parse_json
from nblora.storage.safetensors_reader import SafetensorsFile
from nblora.storage.safetensors_writer import Entry, build_header
from nblora.weights.output import OutputShard
from nblora.weights.plan import Recipe, WeightedAdapter

_KEY = "nblora-originals"
_VERSION = 1


@dataclass(frozen=True)
class Originals:
    """A file of originals that is to be written: its header, and where each tensor begins."""

    header: bytes
    starts: dict[str, int]


def originals_path(place: Path, is_folder: bool) -> Path:
    """Where the originals of an output are kept."""
    return place / f"model{ORIGINALS_SUFFIX}" if is_folder else place.with_name(place.name + ORIGINALS_SUFFIX)


def originals_of(
    model: ModelFiles,
    shards: Sequence[OutputShard],
    recipes: Mapping[str, Recipe],
    adapters: Sequence[WeightedAdapter],
    config_text: str | None = None,
) -> Originals:
    """Lay out the originals of a merge: every tensor whose bytes it does not just copy.

    Parameters
    ----------
    model : ModelFiles
    shards : sequence of OutputShard
    recipes : mapping of str to Recipe
    adapters : sequence of WeightedAdapter
        Noted in the record.
    config_text : str, optional
        The base's `config.json`, where the output's differs.

    Returns
    -------
    Originals
    """
    infos = [
        placed.info
        for shard in shards
        for placed in shard.tensors
        if placed.info.name in recipes or placed.dtype != placed.info.dtype
    ]
    record = {
        "version": _VERSION,
        "headers": {shard.path.name: shard.header[8:].decode() for shard in model.shards},
        "index": model.index.name if model.index else None,
        "index_text": model.index_bytes.decode(errors="replace"),
        "config_text": config_text,
        "adapters": [{"path": str(each.adapter.path), "weight": each.weight} for each in adapters],
    }
    entries = [Entry(info.name, info.dtype, info.shape) for info in infos]
    header = build_header(entries, {_KEY: json.dumps(record)})
    starts, at = {}, len(header)
    for entry in entries:
        starts[entry.name] = at
        at += entry.nbytes
    return Originals(header, starts)


def read_record(file: SafetensorsFile) -> dict[str, Any]:
    """The record that `originals_of` left in a file of originals.

    Raises
    ------
    FormatError
        If the file holds none, or one of another version.
    """
    try:
        record = parse_json(file.metadata[_KEY].encode())
        if record["version"] != _VERSION:
            raise FormatError(f"{file.path}: was written by another version of nblora")
        if not isinstance(record["headers"], dict) or not isinstance(record["index_text"], str):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file.path}: is not a file of originals that nblora merge --keep-original wrote") from None
    return record
