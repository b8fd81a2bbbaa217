"""PEFT LoRA adapters: a folder with `adapter_config.json` and `adapter_model.safetensors`, read and written."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from nblora.errors import FormatError
from nblora.formats.peft_config import CONFIG_NAME, MAX_CONFIG, PeftConfig, parse_config
from nblora.formats.peft_tensors import PREFIX, TENSORS_NAME, LoraModule, sort_tensors
from nblora.formats.peft_writer import write_adapter
from nblora.storage.bounded import read_bounded
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo

__all__ = ["CONFIG_NAME", "PREFIX", "TENSORS_NAME", "LoraModule", "PeftAdapter", "PeftConfig"]


class PeftAdapter:
    """An open PEFT adapter. Tensors are read when they are asked for.

    Parameters
    ----------
    path : path-like
        The folder with the two files, or its `adapter_model.safetensors`.

    Attributes
    ----------
    path : Path
        The folder.
    config : PeftConfig
    file : SafetensorsFile
    modules : dict of str to LoraModule
        The adapted layers by name.
    replaced : dict of str to TensorInfo
        Whole tensors (`modules_to_save`, trained biases, saved embeddings) by the parameter they replace.

    Raises
    ------
    FormatError
        If a file is broken, the two contradict each other, or the adapter does what nblora does not support.
    OSError
        If a file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        self.path = given if given.is_dir() else given.parent
        if not given.is_dir() and given.name != TENSORS_NAME:
            if not given.exists():
                raise FileNotFoundError(2, "no such adapter folder", str(given))
            raise FormatError(f"{given}: expected a folder with {CONFIG_NAME} and {TENSORS_NAME}")
        self.config = parse_config(read_bounded(self.path / CONFIG_NAME, MAX_CONFIG), self.path / CONFIG_NAME)
        if not (self.path / TENSORS_NAME).exists() and (self.path / "adapter_model.bin").exists():
            raise FormatError(
                f"{self.path}: holds adapter_model.bin, a pickle; save it again as safetensors with PEFT "
                "(save_pretrained(..., safe_serialization=True))"
            )
        self.file = SafetensorsFile(self.path / TENSORS_NAME)
        try:
            tensors = sort_tensors(self.file, self.config)
        except BaseException:
            self.file.close()
            raise
        self.modules, self.replaced = tensors.modules, tensors.replaced

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rename(self, names: Mapping[str, str]) -> None:
        """Call modules, and the parameters that are replaced, as a model does that spells them in another way."""
        self.modules = {names[name]: replace(module, name=names[name]) for name, module in self.modules.items()}
        self.replaced = {names[name]: info for name, info in self.replaced.items()}

    def close(self) -> None:
        """Close the file of tensors."""
        self.file.close()

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the adapter to a folder: every tensor bit by bit, every key of the configuration.

        Parameters
        ----------
        folder : path-like
            What nblora wrote there before is replaced.
        force : bool
            Replace a folder that is there already, though nblora did not write it.

        Raises
        ------
        FormatError
            If there is such a folder.
        OSError
            If the folder cannot be written; then it is as it was.
        """
        write_adapter(folder, self.config.raw, {name: self.file.read(name) for name in self.file.tensors}, force)

    def read(self, info: TensorInfo) -> np.ndarray:
        """Return a tensor of the adapter as `SafetensorsFile.read` does."""
        return self.file.read(info.name)
