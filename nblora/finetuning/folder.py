"""The output folder of a fine-tuning: what it holds, who writes to it, and what a killed run left there."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nblora._version import __version__
from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.storage.atomic import fsync_folder, replace_whole
from nblora.storage.bounded import parse_object, read_bounded

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DESCRIPTION = "finetune.json"
CHECKPOINT = "resume.safetensors"
HISTORY = "history.csv"
FIGURE = "history.png"
_PART = ".writing"
"""Where an adapter or a model is written, before its files are put into place one by one."""
_BLOCK = 1 << 20


class Folder:
    """The folder of one run, which holds it while it lives.

    Parameters
    ----------
    path : path-like
        Made where it is not there; its parent must be.

    Attributes
    ----------
    path : Path
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other runs from it; one that is empty at the end is removed.

        Raises
        ------
        FormatError
            For a file in its place, and where another run is at work.
        OSError
            Where it cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FormatError(f"{self.path}: expected a folder or nothing, got a file")
        self.path.mkdir(exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise FormatError(f"{self.path}: another run is writing to this folder") from None
                except OSError:  # a file system without locks
                    pass
            yield
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def description(self) -> dict[str, Any] | None:
        """What is known of the run in this folder; None where there is none.

        Raises
        ------
        FormatError
            For a folder with other things in it.
        """
        path = self.path / DESCRIPTION
        if path.is_file():
            held = parse_object(read_bounded(path, MAX_JSON), path)
            if held.get("status") not in ("running", "finished") or not isinstance(held.get("settings"), dict):
                raise FormatError(f"{path}: is not what nblora finetune writes")
            return held
        others = sorted(name for name in os.listdir(self.path) if not name.endswith(".tmp"))
        if others:
            raise FormatError(
                f"{self.path}: holds {others[0]!r}, and no {DESCRIPTION} of a run: choose a new folder for the output"
            )
        return None

    def describe(self, content: dict[str, Any]) -> None:
        """Write what is known of the run."""
        with replace_whole(self.path / DESCRIPTION) as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")

    def forget(self) -> None:
        """Take back what `describe` wrote, of a run that has made nothing."""
        description = self.description()
        if description is not None and description["status"] == "running":
            (self.path / DESCRIPTION).unlink()

    @property
    def checkpoint(self) -> Path:
        """The state that a killed run goes on from."""
        return self.path / CHECKPOINT

    @contextlib.contextmanager
    def put(self) -> Iterator[Path]:
        """Yield a new folder to write to, and put what it holds into this one: each file is whole or as it was."""
        place = self.path / _PART
        shutil.rmtree(place, ignore_errors=True)
        try:
            yield place
            for source in sorted(path for path in place.rglob("*") if path.is_file()):
                target = self.path / source.relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
            fsync_folder(self.path)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of the weights and configuration of a model's folder."""
    place = Path(path)
    if not place.is_dir():
        return _of_file(place)
    names = sorted(
        each.name for each in place.iterdir() if each.is_file() and each.suffix in (".safetensors", ".json", ".txt")
    )
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name} {_of_file(place / name)}\n".encode())
    return whole.hexdigest()


def _of_file(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Of what computes."""
    import numba
    import numpy as np

    from nblora.text.extras import import_tokenizers

    return {
        "nblora": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "tokenizers": import_tokenizers().__version__,
    }
