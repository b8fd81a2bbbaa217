"""The building blocks of `intrinsics` in plain Python, for Numba's simulator and for the tests' emulator.

Guards are stricter than on a device: an access outside an array, or a misaligned vector, raises. What is a tuple on a
device may be a NumPy vector here, which is never changed in place: that halves the time.
"""

import ctypes

import numpy as np

from nblora.kernels.common.mixing import FIRST_MIX, SECOND_MIX


def flat(array):
    """The memory of a C-contiguous array as one vector (a view), whatever a simulator wrapped it in."""
    array = getattr(array, "_item", array)
    array = getattr(array, "_ary", array)
    return array.reshape(-1)


def to_bfloat16(values):
    """float32 rounded to nearest even, as the upper 16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(values):
    """Upper 16 bits of a float32, as float32."""
    return (np.asarray(values, np.uint16).astype(np.uint32) << 16).view(np.float32)


def memory(address, count, zero):
    """`count` elements from an address, as a vector; `zero` tells their type."""
    dtype = np.dtype(type(zero))
    held = (ctypes.c_char * (int(count) * dtype.itemsize)).from_address(int(address))
    return np.frombuffer(held, dtype)


def check_access(size, offset, count, lanes, vector):
    """IndexError outside of an array of `size`, and for a vector that does not begin at a multiple of its lanes."""
    if count and not 0 <= offset <= size - count:
        raise IndexError(f"{count} elements at {offset} of an array of {size}")
    if vector and offset % lanes:
        raise IndexError(f"a vector of {lanes} at {offset} is misaligned")


def load(array, offset, valid, aligned, lanes):
    """`lanes` elements from `offset`, those from `valid` on replaced by zero; one vector where `aligned`."""
    memory = flat(array)
    count = max(0, min(int(valid), lanes))
    check_access(memory.size, offset, count, lanes, bool(aligned) and count == lanes)
    values = memory[offset : offset + count]
    if values.dtype == np.uint16:
        values = from_bfloat16(values)
    return (*values, *(values.dtype.type(0),) * (lanes - count))


def store(array, offset, valid, aligned, values):
    """Store those of `values` before `valid`; one vector where `aligned`."""
    memory = flat(array)
    count = max(0, min(int(valid), len(values)))
    check_access(memory.size, offset, count, len(values), bool(aligned) and count == len(values))
    memory[offset : offset + count] = values[:count]


def load_shared(array, offset, lanes):
    """`lanes` elements of shared memory as one vector."""
    check_access(array.size, offset, lanes, lanes, True)
    return tuple(array[offset : offset + lanes])


def store_shared(array, offset, values):
    """One vector into shared memory."""
    check_access(array.size, offset, len(values), len(values), True)
    array[offset : offset + len(values)] = values


def zeros(count, zero):
    """`count` times `zero`."""
    return np.full(count, zero)


def outer_accumulate(sums, x, y):
    """sums[i, j] + x[i] y[j], `sums` being row-major."""
    with np.errstate(all="ignore"):
        return np.asarray(sums) + np.multiply.outer(x, y).ravel()


def add_scaled(values, others, factor):
    """values + factor others, lane by lane."""
    with np.errstate(all="ignore"):
        return np.asarray(values) + factor * np.asarray(others)


def multiply(values, others):
    """Values times others, lane by lane."""
    with np.errstate(all="ignore"):
        return np.asarray(values) * np.asarray(others)


def scale(values, factor):
    """Values times a scalar."""
    with np.errstate(all="ignore"):
        return np.asarray(values) * factor


def part(values, index, lanes):
    """The `index`-th group of `lanes` elements."""
    return values[index * lanes : (index + 1) * lanes]


def with_part(values, index, group):
    """`values` with its `index`-th group replaced."""
    changed = np.array(values)
    changed[index * len(group) : (index + 1) * len(group)] = group
    return changed


def repeated(values, count):
    """The whole tuple, `count` times."""
    return np.tile(values, count)


def stretched(values, count):
    """Each element `count` times."""
    return np.repeat(values, count)


def turned(values, lanes):
    """Each square of `lanes` x `lanes` elements transposed."""
    return np.asarray(values).reshape(-1, lanes, lanes).swapaxes(1, 2).reshape(-1)


def lane_sums(values, lanes):
    """Sums over the groups of `lanes` elements, lane by lane."""
    with np.errstate(all="ignore"):
        return np.asarray(values).reshape(-1, lanes).sum(axis=0)


def lane_maxima(values, lanes):
    """Largest elements of the groups of `lanes`, lane by lane; NaN only where there is nothing else."""
    return np.fmax.reduce(np.asarray(values).reshape(-1, lanes), axis=0)


def maximum(values, others):
    """The larger of two, lane by lane; NaN only where there is nothing else."""
    return np.fmax(values, others)


def above(values, least):
    """Values that are more than `least`, 0 for the others and for NaN."""
    values = np.asarray(values)
    return np.where(values > least, values, values.dtype.type(0))


def exp2(values):
    """2 to the power of each; float32 with an error of two in the last place, and 0 for what is not normal."""
    with np.errstate(all="ignore"):
        return np.exp2(np.asarray(values))


def shifted(numbers, by):
    """Integers plus one, lane by lane, of its type."""
    return tuple(int(number) + int(by) for number in numbers)


def within(values, numbers, lows, ends, otherwise):
    """Values whose number is in the range of their lane, lows <= number < ends; for the others `otherwise`.

    A group of as many values as there are lanes has one number.
    """
    numbers = np.asarray(numbers)[:, None]
    inside = (np.asarray(lows) <= numbers) & (numbers < np.asarray(ends))
    return np.where(inside.reshape(-1), values, otherwise)


def _words(numbers):
    return np.array([int(number) & 0xFFFFFFFFFFFFFFFF for number in numbers], np.uint64)


def mixed(numbers):
    """`SplitMix64`'s mix of integers of 64 bits, lane by lane."""
    z = _words(numbers)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST_MIX)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND_MIX)
    return z ^ (z >> np.uint64(31))


def kept(values, states, steps, bar, gain):
    """gain values where the upper 53 bits of mixed(states + steps) are at least `bar`, else 0, lane by lane."""
    numbers = mixed(_words(states) + _words(steps)) >> np.uint64(11)
    values = np.asarray(values)
    return np.where(numbers.astype(np.int64) >= bar, gain * values, values.dtype.type(0))


def to_tf32(values):
    """float32 rounded to the ten bits of mantissa that tensor cores take, ties away from zero."""
    values = np.asarray(values, np.float32)
    rounded = ((values.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def mma_wiring():
    """Which values of a lane are the operands of each of the eight products of 16 x 8 that make 32 x 32.

    Yields (a, b, c): `a` and `b` are pairs (which tuple of P or Q, which element), `c` four places among the sums. A
    product's row g is the warp's row 4 g + 2 block, its row g + 8 the one below; its column n is column 4 n + j. So
    four rows, or columns, that a lane needs lie side by side in shared memory, and so do four of its sums.
    """
    for block in range(2):
        for j in range(4):
            a = [(0, 2 * block), (0, 2 * block + 1), (1, 2 * block), (1, 2 * block + 1)]
            b = [(0, j), (1, j)]
            c = [16 * block + 8 * below + 4 * half + j for below in range(2) for half in range(2)]
            yield a, b, c


def tensor_accumulate(sums, p0, p1, q0, q1):
    """Not here: one thread alone cannot; the tests' emulator gathers the warp."""
    raise NotImplementedError("tensor cores are not simulated: use precision='float32' under NUMBA_ENABLE_CUDASIM=1")
