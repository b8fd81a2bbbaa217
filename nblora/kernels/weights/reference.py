"""The kernels on weights as a specification, in NumPy and float64: what they are tested against, and what runs where
the compiler is off."""

import math
from typing import Any

import ml_dtypes
import numpy as np

from .codes import (
    BASE,
    BFLOAT16,
    BY_ROW,
    CHANGE,
    DIFFERS,
    DOT,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GAP,
    LOST,
    MOVED,
    NOT_FINITE,
    SQUARES,
    STEPS,
    Factors,
    Stored,
)

_TYPES: dict[int, Any] = {FLOAT64: np.float64, FLOAT32: np.float32, FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}


def _decode(stored: np.ndarray, code: int) -> np.ndarray:
    """The numbers that lie in these bytes, in float64."""
    with np.errstate(all="ignore"):
        return stored.view(_TYPES[code]).astype(np.float64)


def _encode(numbers: np.ndarray, code: int) -> np.ndarray:
    """The bytes of these numbers, rounded once: bfloat16 is reached by float32, rounded to odd."""
    with np.errstate(all="ignore"):
        if code == BFLOAT16:
            narrow = np.ascontiguousarray(numbers).astype(np.float32)
            error, bits = narrow - numbers, narrow.view(np.int32)
            bits += ((abs(error) > 0) & (bits & 1 == 0)) * np.where((error > 0) == (bits < 0), 1, -1).astype(np.int32)
            numbers = narrow
        return np.ascontiguousarray(numbers.astype(_TYPES[code])).reshape(-1).view(np.uint8)


def _spacing(numbers: np.ndarray, code: int) -> np.ndarray:
    """The distance to the next larger number of the stored type; of zero and of what is not finite the smallest."""
    kind = ml_dtypes.finfo(_TYPES[code])
    smallest = math.frexp(float(kind.smallest_subnormal))[1] - 1
    exponents = np.frexp(numbers)[1] - 1 - kind.nmant
    usual = np.isfinite(numbers) & (numbers != 0)
    return np.ldexp(1.0, np.where(usual, np.maximum(exponents, smallest), smallest))


def _as_bits(stored: np.ndarray, code: int) -> np.ndarray:
    """One integer for every number."""
    return stored.view(f"uint{8 * np.dtype(_TYPES[code]).itemsize}")


def merge_block(
    source: Stored,
    base: Stored,
    factors: Factors,
    working: np.ndarray,
    target: Stored,
    sums: np.ndarray,
    counts: np.ndarray,
) -> None:
    """target = round(g ∘ source + P Q); sums += Σ (value - base)², Σ base² of each row; counts += entries whose change
    the rounding lost, and entries that are not finite."""
    P, Q, row_scale, column_scale = factors
    shape = len(P), Q.shape[1]
    start, before = (_decode(each.numbers, each.code).reshape(shape) for each in (source, base))
    product, scaled = P @ Q, len(row_scale) + len(column_scale) > 0
    g = (row_scale[:, None] if len(row_scale) else 1.0) * (column_scale if len(column_scale) else 1.0)
    with np.errstate(all="ignore"):
        value = g * start + product if P.shape[1] or scaled else start
        same = source.code == base.code and source.numbers.ctypes.data == base.numbers.ctypes.data
        change = product if same and not scaled else value - before
        target.numbers[:] = _encode(value, target.code)
        sums[:, CHANGE] += (change**2).sum(axis=1)
        sums[:, BASE] += (before**2).sum(axis=1)
    old, new = (_as_bits(each, target.code) for each in (_encode(before, target.code), target.numbers))
    counts[LOST] += np.count_nonzero((change.reshape(-1) != 0) & (old == new))
    counts[NOT_FINITE] += np.count_nonzero(~np.isfinite(_decode(target.numbers, target.code)))


def norm_block(source: Stored, P: np.ndarray, Q: np.ndarray, axis: int, squares: np.ndarray) -> None:
    """squares += Σ (source + P Q)² of each row (BY_ROW) or column (BY_COLUMN)."""
    value = _decode(source.numbers, source.code).reshape(len(P), Q.shape[1]) + P @ Q
    squares += (value**2).sum(axis=1 if axis == BY_ROW else 0)


def fold_rows(sums: np.ndarray, totals: np.ndarray) -> None:
    """totals += sums, row after row."""
    for row in sums:
        totals += row


def encode_all(numbers: np.ndarray, number: int, narrow: np.ndarray, scratch: np.ndarray, target: np.ndarray) -> None:
    """target = numbers, rounded once to the stored type."""
    target[:] = _encode(numbers, number)


def spacing_block(source: np.ndarray, number: int) -> tuple[float, float]:
    """(Σ u², the largest u), u the spacing of the stored type at each number."""
    units = _spacing(_decode(source, number), number)
    return float((units**2).sum()), float(units.max(initial=0.0))


def compare_block(
    base: np.ndarray, base_number: int, expected: np.ndarray, actual: np.ndarray, number: int, measured: np.ndarray
) -> None:
    """DOT Σ (a - w)(e - w) and SQUARES Σ (e - w)²; DIFFERS and MOVED: a ≠ e and a ≠ w in bits; GAP max |a - e|, STEPS
    the same in spacings of the larger number."""
    w, e, a = _decode(base, base_number), _decode(expected, number), _decode(actual, number)
    old, new, bits = (_as_bits(each, number) for each in (_encode(w, number), expected, actual))
    with np.errstate(all="ignore"):
        finite = np.isfinite(e - w) & np.isfinite(a)
        measured[DOT] += ((a - w) * (e - w))[finite].sum()
        measured[SQUARES] += ((e - w) ** 2)[finite].sum()
        gap = np.where(np.isfinite(e) & np.isfinite(a), abs(a - e), np.inf)
        gap[(bits == new) | (np.isnan(e) & np.isnan(a))] = 0
        steps = gap / _spacing(np.maximum(abs(e), abs(a)), number)
    measured[DIFFERS] += np.count_nonzero(bits != new)
    measured[MOVED] += np.count_nonzero(bits != old)
    measured[GAP] = max(measured[GAP], gap.max(initial=0.0))
    measured[STEPS] = max(measured[STEPS], steps.max(initial=0.0))
