"""Tiles of matrix products: read from global memory, kept in shared memory, summed in registers.

A block computes a tile of C = P Q with P (rows, inner) and Q (inner, columns). It walks along `inner` in steps of
`depth`: the next step's elements are on their way into registers while the current one, in shared memory, is
multiplied. Shared memory holds two steps of each operand, every step as [inner][rows] and [inner][columns], so one
barrier a step is enough. Sums are accumulated in the dtype of the tile.

A small tile has several groups of threads: each takes its turn of the steps in shared memory of its own, and at the end
the groups' sums are added up there, always in the same way. So a product of few tiles has many warps.

Either operand may lie in memory with the inner dimension contiguous (`inner` layout) or with the other one. An operand
may be changed on its way into shared memory: `combine="delta"` makes it W + c D, `combine="mask"` x ∘ mask, and
`combine="slope"` gy ∘ act'(z), which is written to memory too: there `other` is the pair of z and that memory, and the
factor the activation's code.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import (
    add_scaled,
    load,
    load_shared,
    multiply,
    outer_accumulate,
    part,
    store,
    store_shared,
    tensor_accumulate,
    to_tf32,
    with_part,
    zeros,
)
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.target import cuda, device_function, int32, int64


@dataclass(frozen=True)
class Tile:
    """Sizes of a tile. Every thread sums 2 x 2 squares of `lanes` x `lanes`; on tensor cores every warp 32 x 32.

    `groups`, a power of two, share the inner dimension. What follows from the sizes is worked out once: a step asks for
    it a thousand times.
    """

    rows: int
    columns: int
    depth: int
    dtype: str = "float32"
    tensor: bool = False
    groups: int = 1

    @functools.cached_property
    def lanes(self) -> int:
        """Elements of a 128-bit vector."""
        return 16 // np.dtype(self.dtype).itemsize

    @functools.cached_property
    def group(self) -> int:
        """Threads a group."""
        if self.tensor:
            return self.rows * self.columns // 32
        return self.rows * self.columns // (2 * self.lanes) ** 2

    @functools.cached_property
    def threads(self) -> int:
        """Threads a block."""
        return self.groups * self.group

    @functools.cached_property
    def blocks(self) -> int:
        """Blocks an SM that the compiler must leave registers for.

        Float64 kernels without groups fit two by themselves, but for the masked input gradient on compute capability
        10.0: held to 128 registers it would keep values in local memory.
        """
        return self.resident if self.dtype == "float32" or self.groups > 1 else 1

    @functools.cached_property
    def resident(self) -> int:
        """Blocks an SM that are meant to run at once: two of 256 threads, three of the grouped skinny products', whose
        sums and steps take more than the 128 registers that four would leave them."""
        return max(2, 384 // self.threads) if self.threads < 512 else 1

    @functools.cached_property
    def padding(self) -> int:
        """Elements after every row of shared memory, so that transposing stores and tensor loads meet few conflicts.

        With eight the quarter of a warp that a 128-bit load serves at once, four inner elements by two groups of
        four rows, reads from 32 different banks.
        """
        return 8 if self.tensor else self.lanes

    @functools.cached_property
    def sums(self) -> int:
        """Sums a thread holds."""
        return 32 if self.tensor else (2 * self.lanes) ** 2

    @functools.cached_property
    def shared_elements(self) -> int:
        """Elements of shared memory: two steps a group, or half of every group's sums."""
        return max(self.groups * self.share, self.groups // 2 * self.rows * self.columns)

    @functools.cached_property
    def parts(self) -> int:
        """Vectors of the result that a thread writes."""
        return self.sums // self.lanes // self.groups

    @functools.cached_property
    def share(self) -> int:
        """Elements of shared memory that two steps of a group take."""
        return 2 * self.depth * (self.rows + self.columns + 2 * self.padding)

    @functools.cached_property
    def type(self) -> Any:
        """Numba's type of an element."""
        return getattr(types, self.dtype)


def vectors_per_thread(tile: Tile, extent: int) -> int:
    """How many vectors of an operand with `extent` rows or columns every thread carries in one step."""
    count, rest = divmod(extent * tile.depth, tile.lanes * tile.group)
    if rest or count == 0 or tile.depth % tile.lanes:
        raise ValueError(f"{tile} does not split {extent} x {tile.depth} elements evenly among {tile.group} threads")
    return count


def carrier(tile: Tile, extent: int, inner: bool, combine: str | None) -> tuple[Callable, Callable]:
    """Two device functions for one operand: `fetch` its elements of one step into registers, `put` them into shared.

    `extent` is the operand's share of the tile, `inner` its layout in memory.
    """
    LANES, THREADS, STRIDE = tile.lanes, tile.group, extent + tile.padding
    COUNT = vectors_per_thread(tile, extent)
    TOTAL = COUNT * LANES
    ACROSS = (tile.depth if inner else extent) // LANES  # vectors in a contiguous run
    ZERO, TENSOR = tile.type(0), tile.tensor
    through = rules(tile.dtype).through_lanes[LANES]

    @device_function
    def place(vector):
        """(inner, outer) within the tile of a vector's first element."""
        along, across = vector // ACROSS, vector % ACROSS * LANES
        if inner:
            return across, along
        return along, across

    @device_function
    def fetch(array, other, factor, aligned, outer0, outer_end, k0, k_end, stride, t):
        held = zeros(TOTAL, ZERO)
        for i in range(COUNT):
            k, o = place(t + i * THREADS)
            k += k0
            o += outer0
            if inner:
                offset = int64(o) * stride + k
                valid = k_end - k if o < outer_end else int32(0)
            else:
                offset = int64(k) * stride + o
                valid = outer_end - o if k < k_end else int32(0)
            values = load(array, offset, valid, aligned, LANES)
            if combine == "delta":
                values = add_scaled(values, load(other, offset, valid, aligned, LANES), factor)
            if combine == "slope":
                values = through(values, load(other[0], offset, valid, aligned, LANES), factor)
                store(other[1], offset, valid, aligned, values)
            if combine == "mask":
                values = multiply(values, load(other, offset, valid, aligned, LANES))
            held = with_part(held, int32(i), values)
        return held

    @device_function
    def put(shared, start, held, t):
        for i in range(COUNT):
            k, o = place(t + i * THREADS)
            values = part(held, int32(i), LANES)
            if TENSOR:
                values = to_tf32(values)
            if inner:
                for lane in range(LANES):
                    shared[start + (k + lane) * STRIDE + o] = part(values, int32(lane), 1)[0]
            else:
                store_shared(shared, start + k * STRIDE + o, values)

    return fetch, put


@functools.cache
def geometry(tile: Tile) -> tuple[Callable, Callable]:
    """Two device functions: `step` multiplies one step in shared memory, `where` locates the parts of a thread's sums.

    `where(part, thread)` is (row, column) within the tile of the first of `lanes` neighbours.
    """
    return _tensor_geometry(tile) if tile.tensor else _plain_geometry(tile)


def _plain_geometry(tile: Tile) -> tuple[Callable, Callable]:
    LANES, DEPTH = tile.lanes, tile.depth
    P_STRIDE, Q_STRIDE = tile.rows + tile.padding, tile.columns + tile.padding
    HALF_ROWS, HALF_COLUMNS = tile.rows // 2, tile.columns // 2
    ACROSS = tile.columns // (2 * LANES)  # threads along a row of the tile

    @device_function
    def step(sums, shared, p, q, t):
        p += t // ACROSS * LANES
        q += t % ACROSS * LANES
        for _ in range(DEPTH):
            x = load_shared(shared, p, LANES) + load_shared(shared, p + HALF_ROWS, LANES)
            y = load_shared(shared, q, LANES) + load_shared(shared, q + HALF_COLUMNS, LANES)
            sums = outer_accumulate(sums, x, y)
            p += P_STRIDE
            q += Q_STRIDE
        return sums

    @device_function
    def where(index, t):
        i = index // 2
        row = t // ACROSS * LANES + i % LANES + i // LANES * HALF_ROWS
        return row, t % ACROSS * LANES + index % 2 * HALF_COLUMNS

    return step, where


def _tensor_geometry(tile: Tile) -> tuple[Callable, Callable]:
    """A warp sums 32 x 32 by two times four products of 16 x 8; which lane has what, `simulated.mma_wiring` tells."""
    DEPTH, WARPS_ACROSS = tile.depth, tile.columns // 32
    P_STRIDE, Q_STRIDE = tile.rows + tile.padding, tile.columns + tile.padding

    @device_function
    def step(sums, shared, p, q, t):
        warp, lane = t // 32, t % 32
        group, member = lane // 4, lane % 4
        p += warp // WARPS_ACROSS * 32 + 4 * group + member * P_STRIDE
        q += warp % WARPS_ACROSS * 32 + 4 * group + member * Q_STRIDE
        for _ in range(0, DEPTH, 8):
            p0, p1 = load_shared(shared, p, 4), load_shared(shared, p + 4 * P_STRIDE, 4)
            q0, q1 = load_shared(shared, q, 4), load_shared(shared, q + 4 * Q_STRIDE, 4)
            sums = tensor_accumulate(sums, p0, p1, q0, q1)
            p += 8 * P_STRIDE
            q += 8 * Q_STRIDE
        return sums

    @device_function
    def where(index, t):
        warp, lane = t // 32, t % 32
        row = warp // WARPS_ACROSS * 32 + lane // 4 * 4 + index // 2
        return row, warp % WARPS_ACROSS * 32 + lane % 4 * 8 + index % 2 * 4

    return step, where


@functools.cache
def accumulator(
    tile: Tile, p_inner: bool, q_inner: bool, p_combine: str | None = None, q_combine: str | None = None
) -> Callable:
    """A device function that adds P Q over `begin <= inner < end` to a thread's sums.

    Arguments: sums; shared memory; P, what it is combined with, whether vectors of it are aligned; likewise Q; the
    factor c of a combination; rows, columns and inner dimension of the whole product; begin and end; the tile's first
    row and column. It begins with a barrier, so products may follow one another in the same shared memory. With groups
    each thread has its group's sums, which `gathering` adds up.
    """
    DEPTH, GROUP, GROUPS, SHARE = tile.depth, tile.group, tile.groups, tile.share
    TURN = DEPTH * GROUPS
    fetch_p, put_p = carrier(tile, tile.rows, p_inner, p_combine)
    fetch_q, put_q = carrier(tile, tile.columns, q_inner, q_combine)
    step, _ = geometry(tile)
    P_SIZE, Q_SIZE = DEPTH * (tile.rows + tile.padding), DEPTH * (tile.columns + tile.padding)

    @device_function
    def accumulate(
        sums,
        shared,
        p,
        p_other,
        p_aligned,
        q,
        q_other,
        q_aligned,
        factor,
        rows,
        columns,
        inner,
        begin,
        end,
        row,
        column,
    ):
        t = int32(cuda.threadIdx.x)
        first, start = int32(begin), int32(0)
        if GROUPS > 1:
            group = t // GROUP
            t -= group * GROUP
            first += group * DEPTH
            start = group * SHARE
        p_stride = inner if p_inner else rows
        q_stride = inner if q_inner else columns
        next_p = fetch_p(p, p_other, factor, p_aligned, row, rows, first, end, p_stride, t)
        next_q = fetch_q(q, q_other, factor, q_aligned, column, columns, first, end, q_stride, t)
        buffer = int32(0)
        cuda.syncthreads()  # what was in shared memory has been read
        for _ in range(begin, end, TURN):
            p_start, q_start = start + buffer * P_SIZE, start + 2 * P_SIZE + buffer * Q_SIZE
            put_p(shared, p_start, next_p, t)
            put_q(shared, q_start, next_q, t)
            cuda.syncthreads()  # the step is whole; the step before it has been read
            first = int32(first + TURN)
            next_p = fetch_p(p, p_other, factor, p_aligned, row, rows, first, end, p_stride, t)
            next_q = fetch_q(q, q_other, factor, q_aligned, column, columns, first, end, q_stride, t)
            sums = step(sums, shared, p_start, q_start, t)
            buffer = 1 - buffer
        return sums

    return accumulate


@device_function
def _as_they_are(sums, shared, group, t):
    return sums


def _then(first: Callable, rest: Callable) -> Callable:
    @device_function
    def both(sums, shared, group, t):
        return rest(first(sums, shared, group, t), shared, group, t)

    return both


def _exchange(tile: Tile, bit: int) -> Callable:
    """A device function: groups that differ in `bit` each keep one half of their sums, and add the other's half to it.

    The larger bits come first, so what is exchanged halves each time.
    """
    HALF, GROUP, LANES, BIT = tile.sums * bit // tile.groups, tile.group, tile.lanes, bit
    PARTS, ZERO, ONE = HALF // LANES, tile.type(0), tile.type(1)

    @device_function
    def exchange(sums, shared, group, t):
        upper = int32(group // BIT % 2)
        kept, given = part(sums, upper, HALF), part(sums, int32(1 - upper), HALF)
        cuda.syncthreads()  # what was in shared memory has been read
        for index in range(PARTS):
            # Neighbouring threads write neighbouring vectors.
            place = (group * PARTS + index) * GROUP + t
            store_shared(shared, place * LANES, part(given, int32(index), LANES))
        cuda.syncthreads()  # what the other group gives is there
        other = group + BIT - 2 * BIT * upper
        got = zeros(HALF, ZERO)
        for index in range(PARTS):
            place = (other * PARTS + index) * GROUP + t
            got = with_part(got, int32(index), load_shared(shared, place * LANES, LANES))
        return add_scaled(kept, got, ONE)

    return exchange


@functools.cache
def gathering(tile: Tile) -> tuple[Callable, Callable]:
    """Two device functions: `gather` adds the groups' sums up, `place` locates the parts of the result.

    `gather(sums, shared)` leaves each thread `tile.parts` vectors of the result, those that it is to write;
    `place(part, thread)` is (row, column) within the tile of the first element of one.
    """
    _, where = geometry(tile)
    GROUP, EACH = tile.group, tile.parts
    add_up = _as_they_are
    for place in range(tile.groups.bit_length() - 1):
        add_up = _then(_exchange(tile, 1 << place), add_up)

    @device_function
    def gather(sums, shared):
        group = int32(cuda.threadIdx.x) // GROUP
        return add_up(sums, shared, group, int32(cuda.threadIdx.x) - group * GROUP)

    @device_function
    def place(index, thread):
        group = thread // GROUP
        return where(group * EACH + index, thread - group * GROUP)

    return gather, place
