"""Where finished bytes go: positioned writes to a file, and a disk that writes while later blocks are computed."""

import contextlib
import os
import threading
from typing import Protocol

_FLUSH_EVERY = 64 * 2**20


class Sink(Protocol):
    """Where finished bytes go; called from several threads at once."""

    def write(self, data: memoryview, offset: int) -> None:
        """Take `data` for the output's byte `offset` on."""


class FileSink:
    """Positioned writes to a descriptor, one at a time.

    A file system lets one thread at a time write to a file, and a second one spins until the first is done; where a
    lock of ours makes it sleep, its core computes.

    Parameters
    ----------
    descriptor : int
    path : str
        The output's name, for messages.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor, self._path = descriptor, path
        self._one = threading.Lock()

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`; safe in several threads at once."""
        try:
            with self._one:
                while len(data):
                    count = os.pwrite(self._descriptor, data, offset)
                    data, offset = data[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from None


class FlushingSink(FileSink):
    """A sink that has the disk write while later blocks are computed, so that the last flush finds little to do."""

    def __init__(self, descriptor: int, path: str) -> None:
        super().__init__(descriptor, path)
        self._written, self._flushed = 0, 0
        self._more = threading.Condition()
        self._done = False
        self._thread = threading.Thread(target=self._flush, name="nblora-flush", daemon=True)

    def __enter__(self) -> "FlushingSink":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        with self._more:
            self._done = True
            self._more.notify()
        self._thread.join()

    def write(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`; safe in several threads at once."""
        super().write(data, offset)
        with self._more:
            self._written += len(data)
            if self._written - self._flushed >= _FLUSH_EVERY:
                self._more.notify()

    def _flush(self) -> None:
        while True:
            with self._more:
                while not self._done and self._written - self._flushed < _FLUSH_EVERY:
                    self._more.wait()
                if self._done:
                    return
                written = self._written
            # What cannot be flushed now is flushed, and its fault reported, by the owner's last fsync.
            with contextlib.suppress(OSError):
                os.fdatasync(self._descriptor)
            self._flushed = written
