"""Outputs of merges, which are whole or absent: a large file or a folder of files, and what they must not replace."""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from nblora.errors import FormatError
from nblora.storage.atomic import fsync_folder, replace_whole, temporary_folder

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_MARK = "user.nblora.output"


def check_output(
    output: Path, inputs: Collection[Path], known: Collection[str] | None = None, force: bool = False
) -> None:
    """Refuse an output that is an input, that is a link, or that would replace what nblora did not write.

    Parameters
    ----------
    output : Path
    inputs : collection of Path
        Files and folders that are read.
    known : collection of str, optional
        Files that the output folder will hold, by their paths from there; None for a file.
    force : bool
        Replace whatever is there, but never an input.

    Raises
    ------
    FormatError
        The message names the output and the fault.
    OSError
        If the output's parent does not exist.
    """
    if output.is_symlink():
        raise FormatError(f"{output}: the output is a symbolic link; give the place itself")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the output's folder does not exist", str(output.absolute().parent))
    if not output.exists():
        return
    place = Path(os.path.realpath(output))
    for path in inputs:
        if path.exists() and os.path.samefile(path, output):
            raise FormatError(f"{output}: is the output and the input {path} at once; choose another output")
        if place in Path(os.path.realpath(path)).parents:
            raise FormatError(f"{output}: holds the input {path}, which this would remove; choose another output")
    if known is None:
        if not output.is_file():
            raise FormatError(
                f"{output}: expected a file or nothing at the output's place, got a folder or special file"
            )
    elif not output.is_dir():
        raise FormatError(f"{output}: expected a folder or nothing at the output's place, got a file")
    if not force:
        _check_ours(output, known)


def _check_ours(output: Path, known: Collection[str] | None) -> None:
    """Refuse to replace a file or a folder that nblora did not write, or to which something was added since."""
    ours = _is_marked(output)
    foreign: list[str] = []
    if known is not None:
        top = {Path(name).parts[0] for name in known}
        foreign = sorted(_names_below(output) - set(known) if ours else set(os.listdir(output)) - top)
    if foreign:
        raise FormatError(
            f"{output}: the output folder holds {foreign[0]!r}, which this would remove; choose another, or have it "
            "replaced with --force (force=True)"
        )
    if not ours and (known is None or os.listdir(output)):
        raise FormatError(
            f"{output}: is there already, and nblora did not write it; choose another place, or have it replaced with "
            "--force (force=True)"
        )


def _names_below(folder: Path) -> set[str]:
    """Every file below a folder, and every folder without any, by its path from there."""
    found = set()
    for place, folders, names in os.walk(folder):
        found |= {Path(place, name) for name in names} | (set() if names or folders else {Path(place)})
    return {str(path.relative_to(folder)) for path in found - {folder}}


def _mark(place: int | Path) -> None:
    """Note on a file or folder that nblora wrote it, where the system can: an attribute beside its contents."""
    with contextlib.suppress(OSError, AttributeError):
        os.setxattr(place, _MARK, b"1")


def _is_marked(place: Path) -> bool:
    try:
        return bool(os.getxattr(place, _MARK))
    except (OSError, AttributeError):
        return False


def check_space(output: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if the disk cannot take `needed` more bytes."""
    free = shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"the disk is full: {needed} bytes are needed and {free} are free", str(output))


@contextlib.contextmanager
def named_output(output: Path) -> Iterator[None]:
    """Name the output in an OSError that names its temporary file, or nothing."""
    try:
        yield
    except OSError as error:
        hidden = str(Path(os.path.realpath(output)).parent / f".{output.name}.")
        if error.filename is None or str(Path(error.filename).absolute()).startswith(hidden):
            raise OSError(error.errno, error.strerror or str(error), str(output)) from error
        raise


@contextlib.contextmanager
def replace_file(output: Path) -> Iterator[BinaryIO]:
    """`replace_whole`, with errors that name the output."""
    with named_output(output), replace_whole(output) as file:
        _mark(file.fileno())
        yield file


@contextlib.contextmanager
def replace_folder(output: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `output` to write into; put it in its place when the block ends well.

    Files must be flushed to the disk by who writes them. An existing folder is exchanged in one step where the system
    can (Linux), else in two between which there is none.
    """
    place = Path(os.path.realpath(output))
    with named_output(output), temporary_folder(place) as hidden:
        _mark(hidden)
        yield hidden
        fsync_folder(hidden)
        _put(hidden, place)
        fsync_folder(place.parent)


def _put(hidden: Path, output: Path) -> None:
    if not output.exists():
        os.rename(hidden, output)
    elif not _exchange(hidden, output):
        aside = hidden.with_suffix(".old")
        os.rename(output, aside)
        try:
            os.rename(hidden, output)
        except BaseException:
            os.rename(aside, output)
            raise
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
