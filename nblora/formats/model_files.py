"""A model's weights as they lie on the disk: one safetensors file, a sharded set with its index, or a folder."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nblora.errors import FormatError
from nblora.formats.peft_tensors import TENSORS_NAME
from nblora.storage.bounded import parse_object, read_bounded
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo

INDEX_SUFFIX = ".safetensors.index.json"
ORIGINALS_SUFFIX = ".nblora-originals"
MAX_JSON = 64 * 2**20
_WEIGHTS = (
    ".safetensors",
    INDEX_SUFFIX,
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ORIGINALS_SUFFIX,
)


@dataclass
class ModelFiles:
    """An open checkpoint.

    Attributes
    ----------
    path : Path
        As it was given.
    shards : list of SafetensorsFile
        In the order of their names; their file names are the output's too.
    index : Path or None
        The index of a sharded checkpoint.
    index_bytes, index_data : bytes, dict
        The index as it is and as it was read; empty without one.
    is_folder : bool
        Whether the output is a folder: the base is one, or its index was given.
    config_bytes, config : bytes, dict
        `config.json` beside the weights, as it is and as it was read; empty without one.
    companions : list of Path
        The other files of the folder (configuration, tokenizer, `1_Pooling/`), and empty folders in it, which a merged
        folder takes along.
    left_out : list of str
        Subfolders with weights of their own, which it does not.
    overlay : SafetensorsFile or None
        Tensors that stand in for those of the shards.
    """

    path: Path
    shards: list[SafetensorsFile]
    index: Path | None = None
    index_bytes: bytes = b""
    index_data: dict[str, Any] = field(default_factory=dict)
    is_folder: bool = False
    config_bytes: bytes = b""
    config: dict[str, Any] = field(default_factory=dict)
    companions: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    overlay: SafetensorsFile | None = None

    @property
    def tensors(self) -> dict[str, tuple[SafetensorsFile, TensorInfo]]:
        """Every tensor by name, with the file that holds it."""
        files = [*self.shards, self.overlay] if self.overlay else self.shards
        return {name: (file, info) for file in files for name, info in file.tensors.items()}

    @property
    def folder(self) -> Path:
        """The folder of the shards."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def inputs(self) -> list[Path]:
        """Every file that was read."""
        return [shard.path for shard in self.shards] + ([self.index] if self.index else [])


@contextlib.contextmanager
def open_model(path: str | os.PathLike[str]) -> Iterator[ModelFiles]:
    """Open a checkpoint: a safetensors file, an index of shards, or a folder that holds either.

    Raises
    ------
    FormatError
        If a file is broken, the index leads out of its folder or contradicts the shards, or it is unclear which files
        belong to the checkpoint.
    OSError
        If a file cannot be read.
    """
    given = Path(path)
    if given.is_dir():
        names, index = _choose(given)
        model, folder = ModelFiles(given, [], index, is_folder=True), given
    elif given.name.endswith(INDEX_SUFFIX):
        names, index, folder = [], given, given.parent
        model = ModelFiles(given, [], index, is_folder=True)
    else:
        names, folder = [given.name], given.parent
        model = ModelFiles(given, [])
    if model.is_folder:
        model.companions, model.left_out = _companions(folder)
    if model.index:
        model.index_bytes = read_bounded(model.index, MAX_JSON)
        model.index_data = parse_object(model.index_bytes, model.index)
        names = _shard_names(model.index, model.index_data)
    if (folder / "config.json").is_file():
        model.config_bytes = read_bounded(folder / "config.json", MAX_JSON)
        model.config = parse_object(model.config_bytes, folder / "config.json")
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                model.shards.append(stack.enter_context(SafetensorsFile(folder / name)))
            except FileNotFoundError:
                if model.index is None:
                    raise
                raise FormatError(f"{model.index}: names the shard {name!r}, which is not there") from None
        _check_names(model)
        yield model


def _choose(folder: Path) -> tuple[list[str], Path | None]:
    """Which files of a folder are the checkpoint: the names without an index, or the index."""
    entries = sorted(os.listdir(folder))
    indexes = [name for name in entries if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        indexes = [name for name in indexes if name == "model" + INDEX_SUFFIX] or indexes
    if len(indexes) == 1:
        return [], folder / indexes[0]
    if indexes:
        raise FormatError(f"{folder}: holds several indexes ({', '.join(indexes)}); pass the one that is meant")
    names = [n for n in entries if n.endswith(".safetensors") and n != TENSORS_NAME]
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    if not names:
        raise FormatError(f"{folder}: holds no safetensors file; expected model.safetensors or shards with an index")
    return names, None


def _companions(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a folder beside its weights, those of subfolders included; and the subfolders that stay behind.

    A subfolder with weights of its own holds the same model in another form (an ONNX export, a trainer's checkpoint),
    which a merge does not reach: it stays behind, unless `modules.json` names it as a part of the model.
    """
    parts = _parts_of_the_model(folder)
    files: list[Path] = []
    left_out: list[str] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            inside = _files_below(entry)
            if entry.name in parts or not any(file.name.endswith(_WEIGHTS) for file in inside):
                files += inside
            else:
                left_out.append(entry.name)
        elif entry.is_file() and not entry.name.endswith(_WEIGHTS):
            files.append(entry)
    return files, left_out


def _parts_of_the_model(folder: Path) -> set[str]:
    """The subfolders that sentence-transformers' `modules.json` names."""
    if not (folder / "modules.json").is_file():
        return set()
    data = read_bounded(folder / "modules.json", MAX_JSON)
    try:
        entries = json.loads(data)
        return {entry["path"].partition("/")[0] for entry in entries if entry["path"]}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()  # someone else's file of that name


def _files_below(folder: Path) -> list[Path]:
    """Every file below a folder, and every folder without any; but for hidden ones and what lies behind links."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [path for name in sorted(names) if not name.startswith(".") and (path := Path(place, name)).is_file()]
        found += files if files or folders else [Path(place)]  # as sentence-transformers' 2_Normalize is
    return found


def _shard_names(index: Path, data: dict[str, Any]) -> list[str]:
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise FormatError(f"{index}: expected a weight_map from tensor names to shard names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_plain_name(name):
            raise FormatError(f"{index}: names the shard {name!r}, which is not a plain file name of the same folder")
        if not name.endswith(".safetensors"):
            raise FormatError(f"{index}: names the shard {name!r}, which is not a safetensors file")
    return names


def is_plain_name(name: str) -> bool:
    """Whether a name that a file gives is one of a file of the same folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\\0:")


def _check_names(model: ModelFiles) -> None:
    owners: dict[str, SafetensorsFile] = {}
    for shard in model.shards:
        for name in shard.tensors:
            if name in owners:
                raise FormatError(f"{shard.path}: holds the tensor {name!r}, which {owners[name].path.name} holds too")
            owners[name] = shard
    for name, shard_name in model.index_data.get("weight_map", {}).items():
        if name not in owners or owners[name].path.name != shard_name:
            raise FormatError(f"{model.index}: says that {shard_name} holds {name!r}, which it does not")
