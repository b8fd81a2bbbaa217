"""Where every tensor of the output goes: shard by shard, header first, each byte's place known beforehand."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nblora.formats.model_files import INDEX_SUFFIX, ModelFiles
from nblora.storage.dtypes import FLOATS
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo
from nblora.storage.safetensors_writer import Entry, build_header


@dataclass(frozen=True)
class Placed:
    """A tensor of the output: where it is read, its dtype there, and the byte of the shard where it begins."""

    file: SafetensorsFile
    info: TensorInfo
    dtype: str
    start: int


@dataclass(frozen=True)
class OutputShard:
    """One file of the output."""

    name: str
    header: bytes
    tensors: list[Placed]
    nbytes: int


def lay_out(model: ModelFiles, dtype: str | None = None, shard_size: int | None = None) -> list[OutputShard]:
    """Lay out an output with the base's names, order and metadata.

    Parameters
    ----------
    model : ModelFiles
    dtype : str, optional
        What floating-point tensors become (as safetensors spells it); as they are by default.
    shard_size : int, optional
        Bytes of tensors that a shard may hold (a larger tensor has one of its own); the base's shards by default.

    Returns
    -------
    list of OutputShard
    """
    if shard_size is None:
        return [_shard(shard.path.name, shard, list(_members(shard)), dtype) for shard in model.shards]
    groups: list[list[tuple[SafetensorsFile, TensorInfo]]] = []
    filled = 0
    for shard in model.shards:
        for member in _members(shard):
            size = _entry(member[1], dtype).nbytes
            if not groups or filled + size > shard_size:
                groups.append([])
                filled = 0
            groups[-1].append(member)
            filled += size
    stem = _stem(model)
    names = [f"{stem}-{at:05d}-of-{len(groups):05d}.safetensors" for at in range(1, len(groups) + 1)]
    if len(groups) <= 1:
        names, groups = [f"{stem}.safetensors"], groups or [[]]
    return [
        _shard(name, None, group, dtype, model.shards[0].metadata) for name, group in zip(names, groups, strict=True)
    ]


def _members(shard: SafetensorsFile) -> list[tuple[SafetensorsFile, TensorInfo]]:
    return [(shard, info) for info in shard.tensors.values()]


def _stem(model: ModelFiles) -> str:
    name = model.index.name.removesuffix(INDEX_SUFFIX) if model.index else model.shards[0].path.stem
    return re.sub(r"-\d+-of-\d+$", "", name)


def _entry(info: TensorInfo, dtype: str | None) -> Entry:
    return Entry(info.name, dtype if dtype and info.dtype in FLOATS else info.dtype, info.shape)


def _shard(
    name: str,
    same: SafetensorsFile | None,
    members: list[tuple[SafetensorsFile, TensorInfo]],
    dtype: str | None,
    metadata: Mapping[str, str] | None = None,
) -> OutputShard:
    entries = [_entry(info, dtype) for _, info in members]
    if same and all(entry.dtype == info.dtype for entry, (_, info) in zip(entries, members, strict=True)):
        header = same.header
    else:
        header = build_header(entries, same.metadata if same else metadata)
    placed, at = [], len(header)
    for entry, (file, info) in zip(entries, members, strict=True):
        placed.append(Placed(file, info, entry.dtype, at))
        at += entry.nbytes
    return OutputShard(name, header, placed, at)


def build_index(model: ModelFiles, shards: list[OutputShard]) -> tuple[str, bytes] | None:
    """The index of an output, as a name and its bytes; None where the base has none and its files are kept."""
    if model.index is None and (len(shards) < 2 or len(shards) == len(model.shards)):
        return None
    weight_map = {placed.info.name: shard.name for shard in shards for placed in shard.tensors}
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    old = model.index_data
    metadata = old["metadata"] if isinstance(old.get("metadata"), dict) else {}
    if model.index and old["weight_map"] == weight_map and metadata.get("total_size", total) == total:
        return model.index.name, model.index_bytes
    order = sorted(weight_map) if old.get("weight_map", {}).keys() != weight_map.keys() else old["weight_map"]
    new = {
        **old,
        "metadata": {**metadata, "total_size": total},
        "weight_map": {name: weight_map[name] for name in order},
    }
    name = model.index.name if model.index else _stem(model) + INDEX_SUFFIX
    return name, json.dumps(new, indent=2).encode() + b"\n"


def output_place(model: ModelFiles, output: Path, shards: list[OutputShard]) -> tuple[Path, bool]:
    """Where the output goes, and whether that is a folder.

    A folder makes a folder and a file a file, except that one unsharded file of a folder may be written to a
    `.safetensors` file, and a single file into an existing folder.
    """
    single = len(shards) == 1 and model.index is None
    if model.is_folder:
        return output, not (single and output.suffix == ".safetensors" and not output.is_dir())
    if not single:
        return output, True
    return (output / shards[0].name, False) if output.is_dir() else (output, False)
