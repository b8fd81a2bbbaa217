"""Outputs that are whole or absent: written beside their place, flushed to the disk, renamed over it.

While it is written an output has a hidden name and is locked. A killed process leaves it there unlocked; the next one
that writes to the same place takes it away.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: there an open file cannot be removed, which serves as well
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replace_whole(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for binary writing; rename it to `path` when the block ends well.

    The bytes and the folder's entry are on the disk (fsync) when the block has ended. When the block raises, or the
    process is killed at any moment, `path` is what it was before. Permissions are `mode`; without it those of the file
    before, or what `open` gives a new one. An OSError names `path`, and not the temporary file.
    """
    target = Path(path)
    with _named(target), _replaced(target, mode) as file:
        yield file


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Name the target in an OSError that names its temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)).name.startswith(f".{target.name}."):
            raise type(error)(error.errno, error.strerror, str(target)) from error
        raise


@contextlib.contextmanager
def _replaced(target: Path, mode: int | None) -> Iterator[BinaryIO]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    created = 0o666 if mode is None else mode
    with _temporary(target, lambda name: os.open(name, flags, created)) as (hidden, descriptor):
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        if mode is None:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(hidden, target.stat().st_mode & 0o777)
        os.replace(hidden, target)
    fsync_folder(target.parent)


@contextlib.contextmanager
def temporary_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a hidden folder beside `path`, locked, to be renamed to it; what is left of it in the end is removed."""

    def make(name: Path) -> int:
        os.mkdir(name, 0o777)
        return os.open(name, os.O_RDONLY)

    with _temporary(Path(path), make) as (hidden, _):
        yield hidden


@contextlib.contextmanager
def _temporary(target: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A new hidden name beside `target` and the descriptor of what `make` made of it, locked."""
    remove_stale(target)
    while True:
        hidden = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
        with contextlib.suppress(FileExistsError):
            descriptor = make(hidden)
            if _lock(descriptor, hidden):
                break
    try:
        yield hidden, descriptor
    finally:
        with contextlib.suppress(OSError):
            _remove(hidden)
        os.close(descriptor)


def _lock(descriptor: int, hidden: Path) -> bool:
    """Lock what was just made; False where another process has taken it for a remainder before that."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(descriptor), os.stat(hidden)):
            return True
    except FileNotFoundError:
        pass
    except OSError:  # a file system without locks
        return True
    os.close(descriptor)
    return False


def remove_stale(target: Path) -> None:
    """Remove what killed processes left beside `target`; a lock tells the living from the dead."""
    prefix = f".{target.name}."
    with contextlib.suppress(OSError):
        names = os.listdir(target.parent)
        for name in names:
            if len(name) == len(prefix) + 12 and name.startswith(prefix) and name.endswith(".tmp"):
                _remove_if_dead(target.parent / name)


def _remove_if_dead(path: Path) -> None:
    if fcntl is None:
        with contextlib.suppress(OSError):
            path.unlink()
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def fsync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
