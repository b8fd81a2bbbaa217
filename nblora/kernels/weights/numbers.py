"""Stored numbers to working numbers and back: float64, float32, float16 and bfloat16 as they lie in a file.

16-bit numbers are read and written as the bits they are (`uint16`), so neither NumPy nor Numba needs to know them.
Every conversion to a narrower type rounds once, to nearest, ties to even; infinities and NaN stay what they are.
The integer arithmetic is written so that no intermediate leaves 32 bits: Numba would widen it to 64 and halve the
vectors (measured: 0.25 against 0.12 ns a bfloat16).
"""

import numpy as np

from nblora.kernels.common.jit import kernel, part

from .codes import BFLOAT16, FLOAT32, FLOAT64


@part
def _widen_bfloat16(source, bits):
    """bits = source; source uint16 (n,) of bfloat16; bits uint32 (n,) of float32."""
    for j in range(bits.shape[0]):
        bits[j] = np.uint32(source[j]) << np.uint32(16)


@part
def _widen_float16(source, bits, numbers):
    """numbers = source; source uint16 (n,) of float16; bits uint32 (n,), the memory of numbers float32 (n,).

    The exponent is rebased by one exact product with 2¹¹², which also normalises subnormal numbers.
    """
    for j in range(bits.shape[0]):
        bits[j] = np.uint32(source[j] & np.uint16(0x7FFF)) << np.uint32(13)
    for j in range(bits.shape[0]):
        numbers[j] = numbers[j] * np.float32(2.0**112)
    for j in range(bits.shape[0]):
        special = np.uint32(0x7F800000) if (source[j] & np.uint16(0x7C00)) == np.uint16(0x7C00) else np.uint32(0)
        bits[j] = bits[j] | special | np.uint32(source[j] & np.uint16(0x8000)) << np.uint32(16)


@part
def decode(source, number, narrow, numbers):
    """numbers = source, exactly where `numbers` is at least as wide.

    source uint8 (n · itemsize,); number: one of the codes above; narrow float32 (n,), scratch;
    numbers float32 or float64 (n,).
    """
    if number == FLOAT64:
        wide = source.view(np.float64)
        for j in range(numbers.shape[0]):
            numbers[j] = wide[j]
        return
    if number == FLOAT32:
        single = source.view(np.float32)
        for j in range(numbers.shape[0]):
            numbers[j] = single[j]
    elif numbers.itemsize == 4:
        if number == BFLOAT16:
            _widen_bfloat16(source.view(np.uint16), numbers.view(np.uint32))
        else:
            _widen_float16(source.view(np.uint16), numbers.view(np.uint32), numbers)
    else:
        if number == BFLOAT16:
            _widen_bfloat16(source.view(np.uint16), narrow.view(np.uint32))
        else:
            _widen_float16(source.view(np.uint16), narrow.view(np.uint32), narrow)
        for j in range(numbers.shape[0]):
            numbers[j] = narrow[j]


@part
def _round_bfloat16(bits, target):
    """target = bits; bits int32 (n,) of float32; target uint16 (n,) of bfloat16."""
    for j in range(target.shape[0]):
        u = bits[j]
        high = (u >> np.int32(16)) & np.int32(0xFFFF)
        carry = ((u & np.int32(0xFFFF)) + np.int32(0x7FFF) + (high & np.int32(1))) >> np.int32(16)
        nan = (u & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000)
        target[j] = np.uint16((high | np.int32(0x40)) if nan else (high + carry))


@part
def _round_float16(bits, scaled, target):
    """target = bits; bits int32 (n,) of float32; scaled float32 (n,), scratch; target uint16 (n,) of float16.

    Below 2⁻¹⁴ the spacing is constant: adding ½ to the magnitude leaves the rounded steps in the low bits of the sum.
    """
    for j in range(target.shape[0]):
        scaled[j] = abs(scaled[j]) + np.float32(0.5)
    steps = scaled.view(np.int32)
    for j in range(target.shape[0]):
        u = bits[j] & np.int32(0x7FFFFFFF)
        sign = (bits[j] >> np.int32(16)) & np.int32(0x8000)
        odd = (u >> np.int32(13)) & np.int32(1)
        normal = (u - np.int32(0x38000000) + np.int32(0xFFF) + odd) >> np.int32(13)
        small = steps[j] - np.int32(0x3F000000)
        magnitude = small if u < np.int32(0x38800000) else normal
        if u >= np.int32(0x47800000):
            magnitude = np.int32(0x7C00)
        if u > np.int32(0x7F800000):
            magnitude = np.int32(0x7E00)
        target[j] = np.uint16(sign | magnitude)


@part
def round_to_odd(number, narrow, bits, j):
    """narrow[j] = number, rounded to odd: what a later rounding to 16 bits needs in order to be the only one.

    number float64; narrow float32 (n,), and bits int32 (n,), the same memory.
    """
    narrow[j] = np.float32(number)
    error = np.float64(narrow[j]) - number
    if abs(error) > 0 and (bits[j] & np.int32(1)) == 0:
        bits[j] += np.int32(1) if (error > 0) == (bits[j] < 0) else np.int32(-1)


@part
def encode(numbers, number, narrow, scratch, target):
    """target = numbers, rounded once.

    numbers float32 or float64 (n,); number: one of the codes above; narrow and scratch float32 (n,);
    target uint8 (n · itemsize,).
    """
    if number == FLOAT64:
        wide = target.view(np.float64)
        for j in range(numbers.shape[0]):
            wide[j] = numbers[j]
        return
    if number == FLOAT32:
        single = target.view(np.float32)
        for j in range(numbers.shape[0]):
            single[j] = np.float32(numbers[j])
        return
    if numbers.itemsize == 8:
        bits = narrow.view(np.int32)
        for j in range(numbers.shape[0]):
            round_to_odd(np.float64(numbers[j]), narrow, bits, j)
    else:
        bits = numbers.view(np.int32)
    if number == BFLOAT16:
        _round_bfloat16(bits, target.view(np.uint16))
    else:
        magnitudes = bits.view(np.float32)
        for j in range(numbers.shape[0]):
            scratch[j] = magnitudes[j]
        _round_float16(bits, scratch, target.view(np.uint16))


@kernel
def encode_all(numbers, number, narrow, scratch, target):
    """`encode` for callers in Python."""
    encode(numbers, number, narrow, scratch, target)
