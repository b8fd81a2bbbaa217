"""The originals of a merge: the bytes that it changed, and the headers they lay under, kept beside its output."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nblora.errors import FormatError
from nblora.formats.model_files import ORIGINALS_SUFFIX, ModelFiles
from nblora.storage.bounded import parse_json
from nblora.storage.safetensors_reader import SafetensorsFile, iterate_chunks
from nblora.storage.safetensors_writer import Entry, build_header
from nblora.weights.output import OutputShard
from nblora.weights.plan import Recipe, WeightedAdapter

_KEY = "nblora-originals"
_VERSION = 2  # the first had no digests
_HASHED = 1 << 20
_DIGITS = 32


@dataclass(frozen=True)
class Originals:
    """A file of originals that is to be written: what it holds, where each tensor begins, and its record.

    The header has room for the tensors' digests, which are known when their bytes are there.
    """

    entries: list[Entry]
    starts: dict[str, int]
    record: dict[str, Any]

    def header(self, digests: Mapping[str, str] | None = None) -> bytes:
        """The first bytes of the file, as long with digests as without."""
        known = digests or {entry.name: "0" * _DIGITS for entry in self.entries}
        return build_header(self.entries, {_KEY: json.dumps(self.record | {"digests": known})})

    def sealed(self, pread: Callable[[memoryview, int], None]) -> bytes:
        """The header with the digests of what was written, read back by `pread(buffer, offset)`."""
        return self.header({e.name: _digest(pread, self.starts[e.name], e.nbytes) for e in self.entries})


def _digest(pread: Callable[[memoryview, int], None], start: int, nbytes: int) -> str:
    digest, buffer = hashlib.blake2b(digest_size=_DIGITS // 2), bytearray(min(nbytes, _HASHED))
    for begin, end in iterate_chunks(nbytes, _HASHED):
        piece = memoryview(buffer)[: end - begin]
        pread(piece, start + begin)
        digest.update(piece)
    return digest.hexdigest()


def check_digests(file: SafetensorsFile, record: Mapping[str, Any]) -> None:
    """Raise FormatError where a kept tensor is not what was kept. Files of the first version cannot be checked."""
    digests = record.get("digests")
    if digests is None:
        return
    for name, info in file.tensors.items():
        if digests.get(name) != _digest(file.pread, info.start, info.nbytes):
            raise FormatError(f"{file.path}: the original of {name} was damaged since it was kept; it is not restored")


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
    originals = Originals(entries, {}, record)
    at = len(originals.header())
    for entry in entries:
        originals.starts[entry.name] = at
        at += entry.nbytes
    return originals


def read_record(file: SafetensorsFile) -> dict[str, Any]:
    """The record that `originals_of` left in a file of originals.

    Raises
    ------
    FormatError
        If the file holds none, or one of another version.
    """
    try:
        record = parse_json(file.metadata[_KEY].encode())
        if record["version"] not in (1, _VERSION):
            raise FormatError(f"{file.path}: was written by another version of nblora")
        if not isinstance(record["headers"], dict) or not isinstance(record["index_text"], str):
            raise TypeError
        if any(record[name] is not None and not isinstance(record[name], str) for name in ("index", "config_text")):
            raise TypeError
        if not isinstance(record.get("digests"), dict) and (record["version"] > 1 or record.get("digests") is not None):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file.path}: is not a file of originals that nblora merge --keep-original wrote") from None
    return record
