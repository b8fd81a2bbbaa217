"""Tiles of scores: products along the features of two tiles of rows, and along one tile's rows.

A block has a tile of its own rows, queries or keys, and one of others, `columns`, at a time. Threads lie in a grid: a
thread has `lanes` neighbouring own rows, and of the columns vectors of `lanes` at equal distances. It holds values as
tuples in which all own rows of a column, or of a feature, lie side by side. Operands come from memory in steps of
`depth`, as in `linear.cuda.tiles`, the next one on its way while the current one is multiplied. So shared memory holds
two steps and one tile of weights, whatever the size of a head.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import (
    load,
    load_shared,
    outer_accumulate,
    part,
    repeated,
    shifted,
    store,
    store_shared,
    turned,
    with_part,
    within,
    zeros,
)
from nblora.kernels.common.cuda.target import cuda, device_function, int32, int64
from nblora.kernels.common.mixing import HEAD_STEP, KEY_STEP, ROW_STEP
from nblora.kernels.linear.cuda.tiles import carrier

LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453


@dataclass(frozen=True)
class Tile:
    """Sizes of a block's work, for heads of up to `size` features.

    `resident` blocks an SM are meant to run at once: the compiler must leave registers for them.
    """

    rows: int
    columns: int
    size: int
    threads: int
    depth: int = 8
    dtype: str = "float32"
    resident: int = 2

    tensor = False  # for `carrier`, as are `group` and `padding`

    @property
    def lanes(self) -> int:
        """Elements of a 128-bit vector."""
        return 16 // np.dtype(self.dtype).itemsize

    @property
    def group(self) -> int:
        """Threads that bring a step."""
        return self.threads

    @property
    def padding(self) -> int:
        """Elements after every row of a step, so that transposing stores meet few conflicts."""
        return self.lanes

    @property
    def across(self) -> int:
        """Threads along the columns."""
        return self.threads * self.lanes // self.rows

    @property
    def spacing(self) -> int:
        """Columns from one vector of a thread to its next."""
        return self.across * self.lanes

    @property
    def scores(self) -> int:
        """Scores a thread holds."""
        return self.rows * self.columns // self.threads

    @property
    def outputs(self) -> int:
        """Elements of the result that a thread holds."""
        return self.rows * self.size // self.threads

    @property
    def deep(self) -> "Tile":
        """The tile with steps of rows: as short as they may be for every thread to have a vector to bring."""
        return replace(self, depth=max(min(self.depth, 8), self.lanes * self.threads // self.size))

    @property
    def weights(self) -> int:
        """Where in shared memory the tile of weights is: behind two steps."""
        along_features = self.depth * (self.rows + self.columns + 2 * self.padding)
        return 2 * max(along_features, self.deep.depth * (self.size + self.padding))

    @property
    def figures(self) -> int:
        """Where rows' figures are: a number of each own row and thread along the columns, or two of each column."""
        return self.weights + self.rows * self.columns

    @property
    def shared_elements(self) -> int:
        """Elements of shared memory."""
        return self.figures + max(self.across * self.rows, 2 * self.columns)

    @property
    def type(self) -> Any:
        """Numba's type of an element."""
        return getattr(types, self.dtype)


class Rows(NamedTuple):
    """A head's features of some rows of an array."""

    array: Any  # (rows, stride)
    first: Any
    end: Any
    column: Any  # the head's first
    stride: Any


class Place(NamedTuple):
    """A block's work: first row, of a sequence whose queries and keys are these rows."""

    row: Any
    q0: Any
    q1: Any
    k0: Any
    k1: Any
    ahead: Any  # a causal query i, from q0 on, sees keys up to i + ahead, from k0 on


@device_function
def find(tiles, begins, key_begins, key_ends):
    """The block's `Place`, by its row of `tiles`: sequence and first row."""
    sequence, row = int32(tiles[cuda.blockIdx.x, 0]), int32(tiles[cuda.blockIdx.x, 1])
    q0, q1 = int32(begins[sequence]), int32(begins[sequence + 1])
    k0, k1 = int32(key_begins[sequence]), int32(key_ends[sequence])
    return Place(row, q0, q1, k0, k1, (k1 - k0) - (q1 - q0))


def signed(number: int) -> int:
    """An unsigned integer of 64 bits as the signed one of the same bits."""
    return number - 2**64 if number >= 2**63 else number


ROW, HEAD, KEY = signed(ROW_STEP), signed(HEAD_STEP), signed(KEY_STEP)


def numbers(tile: Tile) -> tuple[int, ...]:
    """Columns of a thread, from its first."""
    places = range(tile.scores // tile.lanes)
    return tuple(place // tile.lanes * tile.spacing + place % tile.lanes for place in places)


def multiples(step: int, places: tuple[int, ...]) -> tuple[int, ...]:
    """`step` times each place, in signed integers of 64 bits."""
    return tuple(signed(step * place % 2**64) for place in places)


def vectors(count: int, lanes: int, spacing: int) -> Callable:
    """A device function: `count` vectors of shared memory, `spacing` apart, as one tuple."""
    before = vectors(count - 1, lanes, spacing) if count > 1 else None
    LAST, LANES = (count - 1) * spacing, lanes

    @device_function
    def only(shared, offset):
        return load_shared(shared, offset, LANES)

    @device_function
    def several(shared, offset):
        return before(shared, offset) + load_shared(shared, offset + LAST, LANES)

    return several if count > 1 else only


def _multiplier(tile: Tile, depth: int, width: int, p_stride: int, q_stride: int) -> Callable:
    """A device function that adds `depth` products of own rows and of `width` columns, both in shared memory."""
    DOWN, LANES, DEPTH = tile.rows // tile.lanes, tile.lanes, depth
    P_STRIDE, Q_STRIDE = p_stride, q_stride
    columns = vectors(width // tile.spacing, tile.lanes, tile.spacing)

    @device_function
    def once(sums, shared, p, q):
        return outer_accumulate(sums, columns(shared, q), load_shared(shared, p, LANES))

    @device_function
    def multiply(sums, shared, p, q, t):
        p += t % DOWN * LANES
        q += t // DOWN * LANES
        for _ in range(0, DEPTH, 4):
            sums = once(sums, shared, p, q)
            sums = once(sums, shared, p + P_STRIDE, q + Q_STRIDE)
            sums = once(sums, shared, p + 2 * P_STRIDE, q + 2 * Q_STRIDE)
            sums = once(sums, shared, p + 3 * P_STRIDE, q + 3 * Q_STRIDE)
            p += 4 * P_STRIDE
            q += 4 * Q_STRIDE
        return sums

    return multiply


def _across(tile: Tile, extent: int) -> tuple[Callable, Callable]:
    """Two device functions for steps of features: `fetch` one of `extent` rows into registers, `put` it into shared
    memory. Where there are fewer vectors than threads, the last threads bring nothing."""
    CARRIERS, ZERO = min(tile.threads, extent * tile.depth // tile.lanes), tile.type(0)
    fetch_step, put_step = carrier(replace(tile, threads=CARRIERS), extent, True, None)

    @device_function
    def fetch(rows, done, size, aligned, t):
        end = rows.end if t < CARRIERS else rows.first
        column, stop = int32(rows.column + done), int32(rows.column + size)
        return fetch_step(rows.array, rows.array, ZERO, aligned, rows.first, end, column, stop, rows.stride, t)

    @device_function
    def put(shared, start, held, t):
        if t < CARRIERS:
            put_step(shared, start, held, t)

    return fetch, put


@functools.cache
def along_features(tile: Tile) -> Callable:
    """A device function that adds own · othersᵀ, over a head's features, to a thread's sums.

    It begins with a barrier, so products may follow one another in the same shared memory, and what was stored there
    before is seen after it.
    """
    DEPTH = tile.depth
    P_STRIDE, Q_STRIDE = tile.rows + tile.padding, tile.columns + tile.padding
    P_SIZE, Q_SIZE, Q_BEGIN = DEPTH * P_STRIDE, DEPTH * Q_STRIDE, 2 * DEPTH * P_STRIDE
    fetch_p, put_p = _across(tile, tile.rows)
    fetch_q, put_q = _across(tile, tile.columns)
    multiply = _multiplier(tile, DEPTH, tile.columns, P_STRIDE, Q_STRIDE)

    @device_function
    def accumulate(sums, shared, own, others, size, aligned):
        t = int32(cuda.threadIdx.x)
        done, buffer = int32(0), int32(0)
        next_p, next_q = fetch_p(own, done, size, aligned, t), fetch_q(others, done, size, aligned, t)
        cuda.syncthreads()  # what was in shared memory has been read
        while done < size:
            p, q = buffer * P_SIZE, Q_BEGIN + buffer * Q_SIZE
            put_p(shared, p, next_p, t)
            put_q(shared, q, next_q, t)
            cuda.syncthreads()  # the step is whole; the step before it has been read
            done = int32(done + DEPTH)
            next_p, next_q = fetch_p(own, done, size, aligned, t), fetch_q(others, done, size, aligned, t)
            sums = multiply(sums, shared, p, q, t)
            buffer = int32(1 - buffer)
        return sums

    return accumulate


@functools.cache
def along_rows(tile: Tile) -> Callable:
    """A device function that adds weightsᵀ · others, over the others' rows, to a thread's part of the result.

    The weights are in shared memory, one column after the other. It begins with a barrier, which they need.
    """
    DEPTH, ZERO, WEIGHTS, ROWS = tile.deep.depth, tile.type(0), tile.weights, tile.rows
    STRIDE = tile.size + tile.padding
    STEP = DEPTH * STRIDE
    fetch_step, put = carrier(tile.deep, tile.size, False, None)
    multiply = _multiplier(tile, DEPTH, tile.size, ROWS, STRIDE)

    @device_function
    def fetch(rows, done, size, aligned, t):
        first, end = int32(rows.first + done), int32(rows.column + size)
        return fetch_step(rows.array, rows.array, ZERO, aligned, rows.column, end, first, rows.end, rows.stride, t)

    @device_function
    def accumulate(sums, shared, others, size, aligned):
        t = int32(cuda.threadIdx.x)
        done, buffer, count = int32(0), int32(0), int32(others.end - others.first)
        held = fetch(others, done, size, aligned, t)
        cuda.syncthreads()  # the weights are there, and what else was in shared memory has been read
        while done < count:
            step, weights = buffer * STEP, WEIGHTS + done * ROWS
            put(shared, step, held, t)
            cuda.syncthreads()  # the step is whole; the step before it has been read
            done = int32(done + DEPTH)
            held = fetch(others, done, size, aligned, t)
            sums = multiply(sums, shared, weights, step, t)
            buffer = int32(1 - buffer)
        return sums

    return accumulate


@functools.cache
def places(tile: Tile) -> tuple[Callable, Callable, Callable]:
    """Device functions: `hold` puts a thread's weights into shared memory, `write` its part of the result, times a
    factor, into memory, `figures` reads numbers (rows, heads) of its own rows."""
    DOWN, LANES, SPACING, ROWS, WEIGHTS = tile.rows // tile.lanes, tile.lanes, tile.spacing, tile.rows, tile.weights
    SCORES, OUTPUTS, ZERO = tile.scores // tile.lanes, tile.outputs // tile.lanes, tile.type(0)

    @device_function
    def hold(shared, values, t):
        for j in range(SCORES):
            column = t // DOWN * LANES + j // LANES * SPACING + j % LANES
            store_shared(shared, WEIGHTS + column * ROWS + t % DOWN * LANES, part(values, int32(j), LANES))

    @device_function
    def write(values, rows, real, size, aligned, t):
        """Rows before `rows.end`: those from `real` on are zeros."""
        values = turned(values, LANES)
        for index in range(OUTPUTS):
            row = rows.first + t % DOWN * LANES + index % LANES
            column = t // DOWN * LANES + index // LANES * SPACING
            valid = size - column if row < rows.end else int32(0)
            vector = part(values, int32(index), LANES) if row < real else zeros(LANES, ZERO)
            store(rows.array, int64(row) * rows.stride + rows.column + column, valid, aligned, vector)

    @device_function
    def figures(array, row, end, head, heads):
        found = zeros(LANES, ZERO)
        for i in range(LANES):
            valid = int32(1) if row + i < end else int32(0)
            found = with_part(found, int32(i), load(array, int64(row + i) * heads + head, valid, int32(0), 1))
        return found

    return hold, write, figures


@functools.cache
def visible(tile: Tile) -> Callable:
    """A device function: scores of own queries with the keys that they see, else -inf: of the columns from a thread's
    first on, where causal, `last` for its first query and one more for each next, else `most`."""
    LANES, LANE, NUMBERS, NONE = tile.lanes, tuple(range(tile.lanes)), numbers(tile), tile.type(-np.inf)

    @device_function
    def visible(scores, causal, last, most):
        ends = shifted(LANE, last) if causal else repeated((most,), LANES)
        return within(scores, NUMBERS, repeated((int32(0),), LANES), ends, NONE)

    return visible
