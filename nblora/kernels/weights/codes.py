"""Numbers that the kernels on weights and their callers agree on, for callers that do not load Numba yet."""

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
