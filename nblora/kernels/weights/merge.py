"""One block of a merged weight: read as stored, computed, measured and rounded in one sweep.

A block is a range of rows of a matrix that lies row-major in a file, or a range of columns of such rows. Columns are
walked in segments of `SEGMENT`, counted from the block's first column: a block that starts at a multiple of `SEGMENT`
gives every element and every per-row sum the bits that any other division into blocks gives.
"""

import numpy as np

from nblora.kernels.common.jit import kernel, part

from .codes import (
    BASE,
    BFLOAT16,
    BY_ROW,
    CHANGE,
    FLOAT32,
    FLOAT64,
    LOST,
    NOT_FINITE,
    SEGMENT,
)
from .numbers import decode, encode, round_to_odd
from .product import (
    GROUP,
    PADDING,
    fma,
    largest,
    low_rank_rows,
    pack_segment,
    sum_error,
)

FLAGS = 64
"""Flags of near ties that are looked at together."""


@part
def flag_near_ties(bits, powers, mask, half, doubt, flags):
    """flags[j] = 1 where a number lies within its `doubt` of a tie of the 16-bit rounding, else 0.

    bits int32 (n,) of float32 numbers; powers float32 (n,), scratch; mask: the bits that rounding drops; half: the tie
    among them; doubt: 2²³ times the error that a number may have; flags uint8 (≥ n,).
    """
    exponents = powers.view(np.int32)
    for j in range(bits.shape[0]):
        exponents[j] = np.int32(bits[j] & np.int32(0x7F800000))
    for j in range(bits.shape[0]):
        # In float32 from here on: 32-bit integers that are subtracted become 64-bit ones in Numba.
        steps = abs(np.float32(np.int32(bits[j] & mask)) - half) - np.float32(2)
        flags[j] = steps * powers[j] <= doubt


@part
def settle_ties(factors, i, start, first, number, error, powers, flags, value):
    """Compute again in float64 what float32 sums leave too close to a tie to be rounded to 16 bits.

    Such entries (about one in a thousand) are replaced by the float64 value, rounded to odd, so that the rounding that
    follows is the exact value's.

    factors: of the block, of which row i; start float32 (n,), what the sum is added to, before scaling; first: the
    segment's column; number: the stored type; error: what float32 may have lost in any entry before the last addition,
    in units of 2⁻²⁴; powers float32 (n,) and flags uint8 (a multiple of FLAGS ≥ n,), scratch; value float32 (n,),
    updated.
    """
    P, Q, row_scale, column_scale = factors
    bits = value.view(np.int32)
    dropped = np.int32(16 if number == BFLOAT16 else 13)
    mask, half = np.int32((1 << dropped) - 1), np.float32(1 << (dropped - 1))
    n = value.shape[0]
    words = flags.view(np.uint64)
    for j in range(n, flags.shape[0]):
        flags[j] = 0
    flag_near_ties(bits, powers, mask, half, np.float32(error / 2), flags)
    for left in range(0, n, FLAGS):  # nearly all flags are zero
        w = words[left >> 3 : (left + FLAGS) >> 3]
        if w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7] == 0:
            continue
        for j in range(left, min(left + FLAGS, n)):
            if flags[j]:
                total = 0.0
                for k in range(P.shape[1]):
                    total = fma(P[i, k], Q[k, first + j], total)
                scale = row_scale[i] if row_scale.shape[0] else 1.0
                if column_scale.shape[0]:
                    scale *= column_scale[first + j]
                round_to_odd(fma(scale, np.float64(start[j]), total), value, bits, j)


@part(fastmath={"reassoc", "nsz"})
def sum_of_squares(numbers):
    """Σ_j numbers[j]² in float64; numbers float32 or float64 (n,)."""
    total = 0.0
    for j in range(numbers.shape[0]):
        total += np.float64(numbers[j]) * np.float64(numbers[j])
    return total


@part(fastmath={"reassoc", "nsz"})
def count_lost(change, target, before, exponent, counts):
    """Count what rounding did to a segment; counts int64 (2,), [LOST, NOT_FINITE], is added to.

    change float32 or float64 (n,); target, before unsigned integers (n,), the bits stored after and before;
    exponent: the bits of infinity. Lost is an entry whose change is not zero and whose bits stayed; not finite is an
    entry of `target` that is an infinity or NaN. Counted in float32, exact for these n: a
    64-bit count is added in vectors a quarter as wide (0.21 against 0.11 ns an element).
    """
    lost, not_finite = np.float32(0), np.float32(0)
    for j in range(change.shape[0]):
        lost += np.float32(1) if (change[j] != 0) & (target[j] == before[j]) else np.float32(0)
    for j in range(change.shape[0]):
        not_finite += np.float32(1) if (target[j] & exponent) == exponent else np.float32(0)
    counts[LOST] += np.int64(lost)
    counts[NOT_FINITE] += np.int64(not_finite)


@part
def count_stored(change, number, target, before, counts):
    """`count_lost` on bytes; number: the code of the stored type; target, before uint8 (n · itemsize,)."""
    if number == FLOAT64:
        infinity = np.uint64(0x7FF0000000000000)
        count_lost(change, target.view(np.uint64), before.view(np.uint64), infinity, counts)
    elif number == FLOAT32:
        count_lost(change, target.view(np.uint32), before.view(np.uint32), np.uint32(0x7F800000), counts)
    else:
        infinity = np.uint16(0x7F80) if number == BFLOAT16 else np.uint16(0x7C00)
        count_lost(change, target.view(np.uint16), before.view(np.uint16), infinity, counts)


@part
def itemsize(number):
    """Bytes of one number of the type with this code."""
    if number == FLOAT64:
        return 8
    return 4 if number == FLOAT32 else 2


@part
def add_plain(start, rank, change, value):
    """value = start + change, all (n,) of one float type; of rank 0 the start itself, whose -0.0 a sum would lose."""
    if rank == 0:
        for j in range(value.shape[0]):
            value[j] = start[j]
        return
    for j in range(value.shape[0]):
        value[j] = start[j] + change[j]


@part
def add_scaled(start, row_scale, column_scale, first, change, scaled, value):
    """value = row_scale · column_scale ∘ start + change; returns what float32 may lose in it, in units of 2⁻²⁴.

    start, change, scaled (scratch), value (n,) of one float type; row_scale float64; column_scale float64 (columns,),
    of which the n from `first` on, or empty.
    """
    for j in range(value.shape[0]):
        scaled[j] = row_scale * column_scale[first + j] if column_scale.shape[0] else row_scale
    for j in range(value.shape[0]):
        scaled[j] *= start[j]
    for j in range(value.shape[0]):
        value[j] = scaled[j] + change[j]
    return 2 * largest(scaled)


@kernel
def merge_block(source, base, factors, working, target, sums, counts):
    """target = round(g ∘ source + P Q), and what that did to `base`.

    source `Stored`: the numbers to start from
    base `Stored`: what the checkpoint holds; the same array as `source` unless an adapter replaces the weight
    factors `Factors`
    working (any,): its type, float32 or float64, is the one that is computed in; float32 only for 16-bit targets
    target `Stored`, written
    sums float64 (rows, 2), added to: Σ (value − base)², Σ base²; counts int64 (2,), added to: see `count_lost`
    """
    P, Q, row_scale, column_scale = factors
    rows, columns = P.shape[0], Q.shape[1]
    source_number, base_number, target_number = source.code, base.code, target.code
    same = source_number == base_number and source.numbers.ctypes.data == base.numbers.ctypes.data
    scaled = row_scale.shape[0] + column_scale.shape[0] > 0
    s_size, b_size, t_size = itemsize(source_number), itemsize(base_number), itemsize(target_number)
    width = min(SEGMENT, columns)
    narrow, scratch = np.empty(width, np.float32), np.empty(width, np.float32)
    before, start = np.empty(width, working.dtype), np.empty(width, working.dtype)
    value, g = np.empty(width, working.dtype), np.ones(width, working.dtype)
    packed, peaks = np.empty((Q.shape[0], width + PADDING), working.dtype), np.empty(Q.shape[0])
    narrowed, changes = np.zeros((GROUP, P.shape[1]), working.dtype), np.empty((GROUP, width + PADDING), working.dtype)
    rounded, flags = np.empty(width * 8, np.uint8), np.empty(-(-width // FLAGS) * FLAGS, np.uint8)
    for first in range(0, columns, SEGMENT):
        n = min(SEGMENT, columns - first)
        pack_segment(Q, first, n, packed, peaks)
        w, x, v, h, near, far = before[:n], start[:n], value[:n], g[:n], narrow[:n], scratch[:n]
        for i in range(rows):
            if i % GROUP == 0:
                low_rank_rows(P, i, min(GROUP, rows - i), packed, n, narrowed, changes)
            d = changes[i % GROUP, :n]
            at = i * columns + first
            stored = base.numbers[at * b_size : (at + n) * b_size]
            decode(stored, base_number, near, w)
            if same:
                x = w
            else:
                decode(source.numbers[at * s_size : (at + n) * s_size], source_number, near, x)
            error = sum_error(P, i, peaks)
            scale = row_scale[i] if row_scale.shape[0] else 1.0
            if scaled:
                error += add_scaled(x, scale, column_scale, first, d, h, v)
            else:
                add_plain(x, P.shape[1], d, v)
            if working.itemsize == 4 and (scaled or P.shape[1] > 0):
                settle_ties(factors, i, x, first, target_number, error, far, flags, v)
            if scaled or not same:
                for j in range(n):
                    d[j] = v[j] - w[j]
            written = target.numbers[at * t_size : (at + n) * t_size]
            encode(v, target_number, near, far, written)
            if base_number != target_number:
                stored = rounded[: n * t_size]
                encode(w, target_number, near, far, stored)
            count_stored(d, target_number, written, stored, counts)
            sums[i, CHANGE] += sum_of_squares(d)
            sums[i, BASE] += sum_of_squares(w)


@kernel
def norm_block(source, P, Q, axis, squares):
    """Add Σ (source + P Q)², one number a row (BY_ROW) or a column (BY_COLUMN), to `squares`; all in float64.

    source `Stored`; P (rows, K), Q (K, columns) float64;
    squares float64, (rows,) or (columns,). With BY_COLUMN rows are added one after the other: blocks must come in
    the order of their rows.
    """
    rows, columns = P.shape[0], Q.shape[1]
    size = itemsize(source.code)
    width = min(SEGMENT, columns)
    narrow, start = np.empty(width, np.float32), np.empty(width, P.dtype)
    packed, peaks = np.empty((Q.shape[0], width + PADDING), P.dtype), np.empty(Q.shape[0])
    factors, changes = np.zeros((GROUP, P.shape[1]), P.dtype), np.empty((GROUP, width + PADDING), P.dtype)
    for first in range(0, columns, SEGMENT):
        n = min(SEGMENT, columns - first)
        pack_segment(Q, first, n, packed, peaks)
        x, total = start[:n], squares[first : first + n]
        for i in range(rows):
            if i % GROUP == 0:
                low_rank_rows(P, i, min(GROUP, rows - i), packed, n, factors, changes)
            d = changes[i % GROUP, :n]
            at = i * columns + first
            decode(source.numbers[at * size : (at + n) * size], source.code, narrow[:n], x)
            for j in range(n):
                d[j] += x[j]
            if axis == BY_ROW:
                squares[i] += sum_of_squares(d)
            else:
                for j in range(n):
                    total[j] += np.float64(d[j]) * np.float64(d[j])


@kernel
def fold_rows(sums, totals):
    """totals += sums, row after row; sums float64 (rows, 2), totals float64 (2,)."""
    for i in range(sums.shape[0]):
        totals[0] += sums[i, 0]
        totals[1] += sums[i, 1]
