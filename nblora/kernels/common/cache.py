"""Compiled kernels on the disk: one file for each function and its types, found again, never stale, never a stranger's.

One digest over every source file of `nblora.kernels` names the folder: Numba names a cached function by its own file's
time stamp, so that a helper edited in another file would leave a stale kernel. The folder is the first usable of

1. `$NUMBA_CACHE_DIR/nblora-<digest>`, where the user has set that variable,
2. `__pycache__/nblora-<digest>` beside the kernels,
3. the user's cache folder (`$XDG_CACHE_HOME/nblora`, `~/Library/Caches/nblora`, `%LOCALAPPDATA%\\nblora`).

Files hold machine code and pickles, which are run, so a folder is used only if it is the user's own or root's and
nobody else may write there, and a file in it likewise; those made here are the user's alone. A file begins with a
digest of its name and of what follows: a damaged one is compiled again. A warm folder that cannot be written to is
read. Folders of older sources are taken away, but for the newest and for those that a process is using. With no folder
at all kernels compile in every process, after one warning. Nothing is looked up before the first kernel is called.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import shutil
import stat
import sys
import tempfile
import warnings
from pathlib import Path

import numba
from numba.core import config
from numba.core.serialize import dumps

from nblora.storage.atomic import replace_whole

try:
    import fcntl
except ImportError:  # Windows, where a folder in use cannot be removed
    fcntl = None

KERNELS = Path(__file__).parents[1]
KEPT_FOLDERS = 3
"""Folders of older sources that stay beside a new one: other branches and versions that are still run."""


@functools.cache
def source_digest() -> str:
    """Digest of every kernel source file and of what else shapes the machine code."""
    digest = hashlib.sha256()
    settings = (numba.__version__, config.BOUNDSCHECK, config.OPT, os.environ.get("NBLORA_VECTOR_BITS"))
    digest.update(repr(settings).encode())
    for path in sorted(KERNELS.rglob("*.py")):
        if "cuda" in path.relative_to(KERNELS).with_suffix("").parts:
            continue  # a change of a GPU's kernels leaves the CPU's as they are
        digest.update(str(path.relative_to(KERNELS)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- folders -----------------------------------------------------------------------------------------------------


def _user_cache() -> Path:
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nblora"


def _candidates() -> list[Path]:
    folder = f"nblora-{source_digest()}"
    roots = [Path(config.CACHE_DIR)] if config.CACHE_DIR else []
    roots.append(KERNELS / "__pycache__")
    with contextlib.suppress(RuntimeError):  # a user without a home directory
        roots.append(_user_cache())
    return [root / folder for root in roots]


def _is_trusted(folder: Path) -> bool:
    """Whether nobody but this user and root can have put files into a folder, or the folder into its place."""
    try:
        own, above = os.lstat(folder), os.stat(folder.parent)
    except OSError:
        return False
    if not stat.S_ISDIR(own.st_mode) or not _is_guarded(own):
        return False
    if not hasattr(os, "getuid"):
        return True
    return above.st_uid in (os.getuid(), 0) and (not above.st_mode & stat.S_IWOTH or bool(above.st_mode & stat.S_ISVTX))


def _is_guarded(state: os.stat_result) -> bool:
    """Whether a file or a folder is this user's or root's, and nobody else may write to it."""
    if not hasattr(os, "getuid"):
        return True
    return state.st_uid in (os.getuid(), 0) and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_writable(folder: Path) -> bool:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def _folders() -> tuple[Path | None, tuple[Path, ...]]:
    """The folder to write to, None where there is none, and those to read from."""
    warm = []
    for folder in _candidates():
        new = False
        with contextlib.suppress(OSError):
            folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            new = not folder.exists()
            folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_trusted(folder):
            continue
        warm.append(folder)
        if _is_writable(folder):
            _hold(folder)
            if new:
                _prune(folder)
            return folder, tuple(warm)
    if not warm:
        warnings.warn(
            "nblora found no folder for its compiled kernels that is this user's own and writable, and will compile "
            "them in every process; set NUMBA_CACHE_DIR to such a folder to keep them",
            RuntimeWarning,
            stacklevel=2,
        )
    return None, tuple(warm)


def cache_folder() -> Path | None:
    """The folder that new kernels are kept in, made if need be; None where nothing is writable."""
    return _folders()[0]


_held: list[int] = []


def _hold(folder: Path) -> None:
    """Tell other processes, for the life of this one, that the folder is in use."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            _held.append(os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | getattr(os, "O_CLOEXEC", 0)))
            fcntl.flock(_held[-1], fcntl.LOCK_SH | fcntl.LOCK_NB)


def _prune(folder: Path) -> None:
    """Take away the folders of older sources beside a new one, but for the newest and those in use."""
    with contextlib.suppress(OSError):
        others = [path for path in folder.parent.glob("nblora-" + "[0-9a-f]" * 16) if path != folder]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[KEPT_FOLDERS:]:
            if _is_trusted(path) and not _is_used(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_used(folder: Path) -> bool:
    if fcntl is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# --- files -------------------------------------------------------------------------------------------------------


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote under this name; None where it is not there, not what it was, or not ours alone."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or not _is_guarded(state):
                return None
            held = file.read()
    except OSError:
        return None
    seal, payload = held[:32], held[32:]
    return payload if seal == _seal(path, payload) else None


def write_checked(path: Path, payload: bytes) -> None:
    """Write a file whole, after a digest of its name and its contents; a full disk writes none."""
    with contextlib.suppress(OSError), replace_whole(path, mode=0o600) as file:
        file.write(_seal(path, payload) + payload)


def _seal(path: Path, payload: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + b"\0" + payload).digest()


class KernelFiles:
    """The files of one function: a compiled form for each signature and processor."""

    def __init__(self, function) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}".replace("<", "").replace(">", "")
        closure = tuple(cell.cell_contents for cell in function.__closure__ or ())
        self._code = hashlib.sha256(function.__code__.co_code + (dumps(closure) if closure else b"")).hexdigest()

    def _file_name(self, signature, codegen) -> str:
        parts = (self._name, str(signature), codegen.magic_tuple(), self._code, sys.version_info[:2])
        return f"{self._name[-80:]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.kernel"

    def load(self, signature, codegen):
        """What was kept for this signature; None where nothing was, or nothing whole."""
        name = self._file_name(signature, codegen)
        for folder in _folders()[1]:
            payload = read_checked(folder / name)
            if payload is not None:
                return pickle.loads(payload)
        return None

    def save(self, signature, codegen, reduced) -> None:
        """Keep a compiled form for the next process."""
        folder = cache_folder()
        if folder is not None:
            write_checked(folder / self._file_name(signature, codegen), dumps(reduced))
