"""`RegularFile`: an open file of which any bytes are read at will, in several threads at once."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from nblora.errors import FormatError

from .bounded import open_named, open_regular


class RegularFile:
    """An open regular file.

    Parameters
    ----------
    path : path-like
    follow_links : bool
        Open what a symbolic link leads to, which is refused by default.

    Attributes
    ----------
    path : Path
    nbytes : int
        Size of the file.

    Raises
    ------
    FormatError
        If it is not a regular file.
    OSError
        If it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        self.path = Path(path)
        self._descriptor = open_named(path) if follow_links else open_regular(path)
        self.nbytes = os.fstat(self._descriptor).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def pread(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (bytes) from the file's byte `offset` on; safe in several threads at once.

        Raises
        ------
        FormatError
            If the file ends before the buffer is full.
        """
        while len(buffer):
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise FormatError(f"{self.path}: ends at byte {offset}, inside a tensor; it was cut while being read")
            buffer, offset = buffer[count:], offset + count

    def _fault(self, fault: str) -> FormatError:
        return FormatError(f"{self.path}: {fault}")
