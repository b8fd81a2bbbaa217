"""Look into a base: what a checkpoint holds, and which of its layers an adapter could change."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nblora.formats.model_files import ModelFiles, open_model
from nblora.storage.dtypes import FLOATS
from nblora.weights.report import plain

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a dotted name that is a number


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ in the numbers of their names alone, such as one weight in every layer.

    Attributes
    ----------
    name : str
        With `*` for a number that differs.
    count : int
    shape : tuple of int
    dtype : str
        As safetensors spells it.
    parameters : int
        Elements of all of them.
    adaptable : bool
        Whether this is the weight of a linear layer or an embedding, as a LoRA adapter changes it.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    adaptable: bool


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds.

    Attributes
    ----------
    path : str
    files : list of str
        The safetensors files.
    nbytes, parameters : int
        Of all tensors.
    config : dict
        `config.json` beside the weights; empty without one.
    tensors : list of TensorGroup
    """

    path: str
    files: list[str]
    nbytes: int
    parameters: int
    config: dict[str, Any]
    tensors: list[TensorGroup]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return plain(asdict(self))

    def table(self) -> str:
        """Return the report as text, a line for every group of tensors."""
        width = max([len(group.name) for group in self.tensors] + [6])
        lines = [f"{'tensor':<{width}}  {'count':>5}  {'dtype':>5}  {'shape':>15}  {'parameters':>13}  LoRA"]
        for group in self.tensors:
            shape = "×".join(map(str, group.shape)) or "scalar"
            line = f"{group.name:<{width}}  {group.count:>5}  {group.dtype:>5}  {shape:>15}  {group.parameters:>13,d}"
            lines.append(f"{line}  yes" if group.adaptable else line)
        kind = self.config.get("model_type")
        count = sum(group.count for group in self.tensors)
        files = f"{len(self.files)} files" if len(self.files) > 1 else self.files[0]
        lines.append(
            f"{f'{kind}, ' if isinstance(kind, str) else ''}{count} tensors, {self.parameters:,d} parameters, "
            f"{self.nbytes:,d} bytes in {files}"
        )
        return "\n".join(lines)


def inspect_checkpoint(path: Path) -> CheckpointReport:
    """Describe a safetensors file, the index of a sharded checkpoint, or a folder that holds either."""
    with open_model(path) as model:
        infos = [info for _, info in model.tensors.values()]
        return CheckpointReport(
            path=str(path),
            files=[shard.path.name for shard in model.shards],
            nbytes=sum(info.nbytes for info in infos),
            parameters=sum(info.size for info in infos),
            config=dict(model.config),
            tensors=_groups(model),
        )


def _groups(model: ModelFiles) -> list[TensorGroup]:
    found: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, (_, info) in model.tensors.items():
        found.setdefault((_NUMBER.sub("*", name), info.dtype, tuple(info.shape)), []).append(name)
    sizes: Mapping[str, int] = {name: info.size for name, (_, info) in model.tensors.items()}
    return [
        TensorGroup(
            name=pattern if len(names) > 1 else names[0],
            count=len(names),
            shape=shape,
            dtype=dtype,
            parameters=sum(sizes[name] for name in names),
            adaptable=dtype in FLOATS and len(shape) == 2 and pattern.endswith(".weight"),
        )
        for (pattern, dtype, shape), names in found.items()
    ]
