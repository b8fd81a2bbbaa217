"""How far apart stored numbers lie, and how far apart two blocks of them are."""

import math

import numpy as np

from nblora.kernels.common.jit import kernel, part

from .codes import BFLOAT16, DIFFERS, DOT, FLOAT16, FLOAT32, GAP, MOVED, SEGMENT, SQUARES, STEPS
from .merge import itemsize
from .numbers import decode, encode


@part
def spacing(number, magnitude):
    """The distance from |value| to the next larger number of the stored type; magnitude float64, not negative."""
    digits, smallest = 52, -1074
    if number == BFLOAT16:
        digits, smallest = 7, -133
    elif number == FLOAT16:
        digits, smallest = 10, -24
    elif number == FLOAT32:
        digits, smallest = 23, -149
    if magnitude == 0 or not np.isfinite(magnitude):
        return math.ldexp(1.0, smallest)
    _, exponent = math.frexp(magnitude)
    return math.ldexp(1.0, max(exponent - 1 - digits, smallest))


@kernel
def spacing_block(source, number):
    """Return (Σ u², the largest u), u the spacing of the stored type at each number; source uint8 (n · itemsize,)."""
    size = itemsize(number)
    count = source.shape[0] // size
    narrow, numbers = np.empty(SEGMENT, np.float32), np.empty(SEGMENT, np.float64)
    squares, largest = 0.0, 0.0
    for first in range(0, count, SEGMENT):
        n = min(SEGMENT, count - first)
        decode(source[first * size : (first + n) * size], number, narrow[:n], numbers[:n])
        for j in range(n):
            unit = spacing(number, abs(numbers[j]))
            squares += unit * unit
            largest = max(largest, unit)
    return squares, largest


@kernel
def compare_block(base, base_number, expected, actual, number, measured):
    """Compare what a merge would have written with what is there.

    base uint8 (n · itemsize,), stored as `base_number` says; expected, actual uint8 (n · itemsize,), as `number` says;
    measured float64 (6,), with e, a and w the numbers of the three:
    DOT Σ (a − w)(e − w) and SQUARES Σ (e − w)², finite ones only; DIFFERS and MOVED, how many entries of `actual`
    differ in their bits from `expected`, and from `base` as it would be stored; GAP the largest |a − e|, and STEPS the
    largest in spacings of the larger number, infinite where only one of the two is finite
    """
    size, base_size = itemsize(number), itemsize(base_number)
    count = expected.shape[0] // size
    narrow, scratch = np.empty(SEGMENT, np.float32), np.empty(SEGMENT, np.float32)
    e, a, w = np.empty(SEGMENT), np.empty(SEGMENT), np.empty(SEGMENT)
    stored = np.empty(SEGMENT * 8, np.uint8)
    for first in range(0, count, SEGMENT):
        n = min(SEGMENT, count - first)
        one, two = expected[first * size : (first + n) * size], actual[first * size : (first + n) * size]
        old = stored[: n * size]
        decode(base[first * base_size : (first + n) * base_size], base_number, narrow[:n], w[:n])
        decode(one, number, narrow[:n], e[:n])
        decode(two, number, narrow[:n], a[:n])
        encode(w[:n], number, narrow[:n], scratch[:n], old)
        for j in range(n):
            differs, moved = False, False
            for byte in range(j * size, (j + 1) * size):
                differs |= one[byte] != two[byte]
                moved |= old[byte] != two[byte]
            measured[DIFFERS] += differs
            measured[MOVED] += moved
            change = e[j] - w[j]
            if np.isfinite(change) and np.isfinite(a[j]):
                measured[DOT] += (a[j] - w[j]) * change
                measured[SQUARES] += change * change
            if differs and not (np.isnan(e[j]) and np.isnan(a[j])):
                gap = abs(a[j] - e[j]) if np.isfinite(e[j]) and np.isfinite(a[j]) else np.inf
                measured[GAP] = max(measured[GAP], gap)
                measured[STEPS] = max(measured[STEPS], gap / spacing(number, max(abs(e[j]), abs(a[j]))))
