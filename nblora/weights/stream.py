"""Tensors through kernels in row blocks: bounded buffers, a few threads, each block read, computed and written by one.

The kernels run without the interpreter lock, so threads of Python suffice: while one block waits for the disk another
is computed. No result depends on the number of threads or on the size of a block.
"""

import functools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from nblora.kernels.weights.codes import BY_COLUMN, BY_ROW, CODES, SEGMENT, Factors, Stored
from nblora.storage.dtypes import itemsize
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo
from nblora.weights.factors import Stack, held
from nblora.weights.plan import COLUMNS, Recipe
from nblora.weights.sinks import Sink

MIN_MEMORY = 2**20
_PIECE = 2**20  # bytes of a buffer: large enough for the disk, small enough for the cache
_MAX_THREADS = 16


@dataclass(frozen=True)
class Matrix:
    """A stored tensor as a row-major matrix: where its bytes are, and how they are to be read."""

    file: SafetensorsFile
    info: TensorInfo
    rows: int
    columns: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element, as it is stored."""
        return self.info.nbytes // max(self.info.size, 1)

    def read(self, buffer: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Fill the front of `buffer` (bytes) with a block and return that part."""
        part = buffer[: (rows[1] - rows[0]) * (columns[1] - columns[0]) * self.itemsize]
        for piece, offset in self._pieces(part, rows, columns, self.itemsize):
            self.file.pread(piece.data, self.info.start + offset)
        return part

    def _pieces(
        self, part: np.ndarray, rows: tuple[int, int], columns: tuple[int, int], item: int
    ) -> Iterator[tuple[np.ndarray, int]]:
        """The contiguous runs of a block, each with its offset in the tensor."""
        if columns == (0, self.columns):
            yield part, rows[0] * self.columns * item
            return
        width = (columns[1] - columns[0]) * item
        for at, row in enumerate(range(*rows)):
            yield part[at * width : (at + 1) * width], (row * self.columns + columns[0]) * item

    def write(self, sink: Sink, start: int, part: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        """Hand a block of the same matrix, of whatever itemsize, to a sink that has it at byte `start`."""
        item = part.size // max((rows[1] - rows[0]) * (columns[1] - columns[0]), 1)
        for piece, offset in self._pieces(part, rows, columns, item):
            sink.write(piece.data, start + offset)


@dataclass
class Change:
    """What happened to one tensor.

    Attributes
    ----------
    squares : ndarray of float64, shape (2,)
        Σ (new − old)², Σ old².
    counts : ndarray of int64, shape (2,)
        Entries lost to rounding, entries not finite.
    measured : list of ndarray
        What the caller's `finish` returned for every block, in the order of the rows.
    """

    squares: np.ndarray
    counts: np.ndarray
    measured: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def none(cls) -> "Change":
        """A change to be added to."""
        return cls(np.zeros(2), np.zeros(2, np.int64))

    @classmethod
    def unknown(cls) -> "Change":
        """A change that was not computed."""
        return cls(np.full(2, np.nan), np.zeros(2, np.int64))


@dataclass(frozen=True)
class Block:
    """A finished block: the old and the new numbers as bytes, the ranges they cover, and room for as many more."""

    old: np.ndarray
    new: np.ndarray
    rows: tuple[int, int]
    columns: tuple[int, int]
    spare: np.ndarray


Finish = Callable[[Block], np.ndarray | None]


class Stream:
    """Runs blocks on threads, in bounded memory, and gathers what they measured in the order of their rows.

    Parameters
    ----------
    max_memory : int
        Bytes for buffers and factors together.
    threads : int, optional
        As many as Numba would use, at most 16.
    progress : callable, optional
        Called with the number of bytes of every finished piece, from the calling thread.
    """

    def __init__(
        self, max_memory: int, threads: int | None = None, progress: Callable[[int], object] = lambda count: None
    ) -> None:
        if max_memory < MIN_MEMORY:
            raise ValueError(f"max_memory is {max_memory} bytes; at least {MIN_MEMORY} (1MiB) are needed")
        wanted = threads or min(_numba_threads(), _MAX_THREADS)
        self.threads = max(1, min(wanted, max_memory // MIN_MEMORY))
        # One more than compute: writes come one after the other, and who waits for one should not leave a core idle.
        workers = self.threads + 1
        self._piece = min(_PIECE, max_memory // (8 * workers))
        self._factor_limit = max_memory // (8 * (workers + 1))
        self._stack_limit = max_memory // 4
        self._progress = progress
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="nblora")
        self._buffers: queue.SimpleQueue[list[np.ndarray]] = queue.SimpleQueue()
        for _ in range(workers):
            self._buffers.put([np.empty(self._piece, np.uint8) for _ in range(3)])
        self._pending: deque[tuple[Future, Change, int, int]] = deque()
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def prepare(self, working: Iterable[type]) -> None:
        """Load, or compile, the kernels for these working types on a thread of its own while tensors are copied."""
        threading.Thread(target=load_kernels, args=(set(working),), name="nblora-load").start()

    def copy(self, matrix: Matrix, sink: Sink, start: int) -> None:
        """Copy a tensor as it is to the sink's byte `start`."""
        for at in range(0, matrix.info.nbytes, self._piece):
            count = min(self._piece, matrix.info.nbytes - at)

            def block(buffers: list[np.ndarray], at: int = at, count: int = count) -> Any:
                part = buffers[0][:count].data
                matrix.file.pread(part, matrix.info.start + at)
                sink.write(part, start + at)

            self._submit(block, Change.none(), count, 0)

    def merge(self, base: Matrix, recipe: Recipe, dtype: str, finish: Finish) -> Change:
        """Compute one merged tensor and hand it on, block by block.

        Parameters
        ----------
        base : Matrix
        recipe : Recipe
            Without terms and replacement the tensor is converted to `dtype`.
        dtype : str
            Of the result, as safetensors spells it.
        finish : callable
            Called with every Block, from several threads at once; the block's memory is used again afterwards.

        Returns
        -------
        Change
            Complete once `wait` has returned.
        """
        source = replace(base, file=recipe.replacement[0], info=recipe.replacement[1]) if recipe.replacement else base
        working: np.ndarray = np.empty(0, working_type(source.info.dtype, base.info.dtype, dtype))
        stack = self._stack(source, recipe)
        codes = CODES[source.info.dtype], CODES[base.info.dtype], CODES[dtype]
        change = Change.none()
        height, width = self._block_shape(recipe, max(source.itemsize, base.itemsize, itemsize(dtype)))

        def block(buffers: list[np.ndarray], rows: tuple[int, int]) -> list[np.ndarray]:
            sums, counts, measured = np.zeros((rows[1] - rows[0], 2)), np.zeros(2, np.int64), []
            P = stack.P(*rows)
            for left in range(0, recipe.columns, width):
                columns = left, min(left + width, recipe.columns)
                old = base.read(buffers[0], rows, columns)
                start = old if source is base else source.read(buffers[1], rows, columns)
                new = buffers[2][: (rows[1] - rows[0]) * (columns[1] - columns[0]) * itemsize(dtype)]
                scales = stack.row_scale[slice(*rows)], stack.column_scale[slice(*columns)]
                source_, base_, target = map(Stored, (start, old, new), codes)
                factors = Factors(P, stack.Q(*columns), *scales)
                _kernels().merge_block(source_, base_, factors, working, target, sums, counts)
                measured.append(finish(Block(old, new, rows, columns, buffers[1])))
            return [sums, counts, *(array for array in measured if array is not None)]

        for first in range(0, recipe.rows, height):
            rows = first, min(first + height, recipe.rows)
            count = (rows[1] - rows[0]) * recipe.columns * base.itemsize
            self._submit(functools.partial(block, rows=rows), change, count, stack.nbytes if first == 0 else 0)
        return change

    def wait(self) -> None:
        """Wait for every block that was handed in."""
        while self._pending:
            self._gather()

    def _stack(self, source: Matrix, recipe: Recipe) -> Stack:
        expected = sum(min(count * recipe.rank * 8, self._factor_limit) for count in (recipe.rows, recipe.columns))
        while self._pending and self._held + expected > self._stack_limit:
            self._gather()
        stack = Stack(recipe, self._factor_limit)
        if recipe.dora:
            stack.fold_magnitude(self._norms(source, recipe))
        return stack

    def _norms(self, source: Matrix, recipe: Recipe) -> np.ndarray:
        """‖W + sBA‖ of the DoRA term alone, float64, along its axis."""
        term = recipe.dora
        assert term
        alone = Recipe(recipe.rows, recipe.columns, terms=[replace(term, magnitude=None)])
        stack = Stack(alone, self._factor_limit)
        by_column = term.axis == COLUMNS
        axis = BY_COLUMN if by_column else BY_ROW
        squares = np.zeros(recipe.columns if by_column else recipe.rows)
        height, width = self._block_shape(alone, source.itemsize)

        def block(buffers: list[np.ndarray], rows: tuple[int, int]) -> None:
            P = stack.P(*rows)
            for left in range(0, recipe.columns, width):
                columns = left, min(left + width, recipe.columns)
                part = source.read(buffers[0], rows, columns)
                total = squares[slice(*columns)] if by_column else squares[slice(*rows)]
                _kernels().norm_block(Stored(part, CODES[source.info.dtype]), P, stack.Q(*columns), axis, total)

        for first in range(0, recipe.rows, height):
            rows = first, min(first + height, recipe.rows)
            self._submit(functools.partial(block, rows=rows), Change.none(), 0, 0)
            if by_column:  # sums down a column keep the order of the rows
                self.wait()
        self.wait()
        return np.sqrt(squares)

    def _block_shape(self, recipe: Recipe, item: int) -> tuple[int, int]:
        """Rows and columns of a block: whole rows wherever they fit, else whole segments of them."""
        width = max(self._piece // item // SEGMENT, 1) * SEGMENT
        per_line = recipe.rank * 8
        if not held(recipe.columns, recipe, self._factor_limit):
            width = min(width, max(self._factor_limit // per_line // SEGMENT, 1) * SEGMENT)
        width = min(width, max(recipe.columns, 1))
        height = max(self._piece // (item * width), 1)
        if not held(recipe.rows, recipe, self._factor_limit):
            height = min(height, max(self._factor_limit // per_line, 1))
        return height, width

    def _submit(self, block: Callable[[list[np.ndarray]], Any], change: Change, count: int, held: int) -> None:
        while len(self._pending) >= 4 * self.threads:
            self._gather()
        self._held += held
        self._pending.append((self._pool.submit(self._run, block), change, count, held))

    def _run(self, block: Callable[[list[np.ndarray]], Any]) -> Any:
        buffers = self._buffers.get()
        try:
            return block(buffers)
        finally:
            self._buffers.put(buffers)

    def _gather(self) -> None:
        future, change, count, held = self._pending.popleft()
        measured = future.result()
        self._held -= held
        if measured is not None:
            _kernels().fold_rows(measured[0], change.squares)
            change.counts += measured[1]
            change.measured += measured[2:]
        self._progress(count)


def working_type(source: str, base: str, target: str) -> type:
    """What a merge computes in: float32 for 16-bit results, unless something that goes into them is float64."""
    narrow = target in ("F16", "BF16") and "F64" not in (source, base)
    return np.float32 if narrow else np.float64


def _kernels() -> Any:
    """Return the kernels, imported at the first call: loading Numba takes as long as copying some 500 MB."""
    from nblora.kernels.weights import blocks

    return blocks


def load_kernels(working: Iterable[type]) -> None:
    """Load, or compile, what `Stream.merge` needs for these working types, by merging one number."""
    kernels = _kernels()
    one, none = np.ones((1, 1)), np.empty(0)
    for kind in working:
        number, target = (Stored(np.zeros(2, np.uint8), CODES["BF16"]) for _ in range(2))
        sums, counts = np.zeros((1, 2)), np.zeros(2, np.int64)
        kernels.merge_block(number, number, Factors(one, one, none, none), np.empty(0, kind), target, sums, counts)
        kernels.fold_rows(sums, np.zeros(2))


def _numba_threads() -> int:
    """As many threads as Numba would use, found out without it."""
    wanted = os.environ.get("NUMBA_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
