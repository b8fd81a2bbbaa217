"""Numbers that the kernels on weights and their callers agree on, for callers that do not load Numba yet."""

from typing import NamedTuple

import numpy as np

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2, 3
CODES = {"F64": FLOAT64, "F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
"""The codes that tell kernels how numbers are stored, by the names that safetensors gives the types."""
SEGMENT = 1024
"""Columns that a kernel walks at a time."""
BY_ROW, BY_COLUMN = 0, 1
"""Directions of `norm_block`."""
CHANGE, BASE = 0, 1
"""Places in the sums of squares of `merge_block`."""
LOST, NOT_FINITE = 0, 1
"""Places in the counts of `merge_block`."""
DOT, SQUARES, DIFFERS, MOVED, GAP, STEPS = 0, 1, 2, 3, 4, 5
"""Places in what `compare_block` measures."""


class Stored(NamedTuple):
    """Numbers as they lie in a file: uint8 (count · itemsize,), and the code of their type."""

    numbers: np.ndarray
    code: int


class Factors(NamedTuple):
    """What a block becomes: g ∘ block + P Q with g[i, j] = row_scale[i] · column_scale[j].

    P (rows, K), Q (K, columns): stacked low-rank factors, scalings folded in; row_scale (rows,), column_scale
    (columns,), empty where g is 1. All float64.
    """

    P: np.ndarray
    Q: np.ndarray
    row_scale: np.ndarray
    column_scale: np.ndarray
