"""The threads of the CPU backend: how many a call may use, and those that stand by to help it."""

import os
import sys
import threading
from typing import Any

import numpy as np
from numba import get_num_threads
from numba.core import config
from numba.np.ufunc import parallel

from nblora.kernels.common.threads import ASLEEP, IDLE, SLOT, serve

PATIENCE = 2600
"""Turns for which a helper stands by before it sleeps: some 0.2 ms, since waking it takes 50 µs."""


def thread_count() -> int:
    """Threads that a call may use: what the user has set in Numba, which need not start its own threads for that."""
    if parallel._is_initialized:
        return int(get_num_threads())
    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # Numba sets it from the environment


class Crew:
    """Helpers for one caller at a time; who finds them busy computes alone. They start at their first use."""

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)  # threads stay with the parent

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._board = np.zeros(SLOT, np.int64)
        self._bells: list[threading.Lock] = []
        self._most = sys.maxsize

    def run(self, kernel: Any, task: Any, workers: int) -> None:
        """Call a kernel that works off its task in so many shares."""
        if workers == 1 or not self._lock.acquire(blocking=False):
            kernel(task, workers, self._board, 0)
            return
        try:
            helpers = self._muster(workers - 1)  # first, since it may bring a larger board
            kernel(task, workers, self._board, helpers)
        finally:
            self._lock.release()

    def _muster(self, count: int) -> int:
        """Start the helpers that are missing, wake those that sleep, and return how many there are for the caller."""
        count = min(count, self._most)
        if len(self._bells) < count:
            self._start(count)
            count = min(count, self._most)
        board = self._board
        for helper in range(1, count + 1):
            if board[helper * SLOT] == ASLEEP:
                board[helper * SLOT] = IDLE
                self._bells[helper - 1].release()
        return count

    def _start(self, count: int) -> None:
        """Start helpers at a larger board; those of the old one fall asleep for good."""
        self._board = np.zeros((count + 1) * SLOT, np.int64)
        serve(np.zeros(2 * SLOT, np.int64), 1, 0)  # compiled here, not in each thread
        self._bells = []
        for helper in range(1, count + 1):
            bell = threading.Lock()
            bell.acquire()
            arguments = self._board, helper, bell
            thread = threading.Thread(target=_stand_by, args=arguments, name=f"nblora-{helper}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads for this process: go on with those that there are
                self._most = helper - 1
                break
            self._bells.append(bell)


def _stand_by(board: np.ndarray, helper: int, bell: threading.Lock) -> None:
    while True:
        serve(board, helper, PATIENCE)
        bell.acquire()
