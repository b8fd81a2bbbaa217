"""The types of numbers that safetensors files hold: the one table of them."""

from typing import Any, NamedTuple

import numpy as np


class DType(NamedTuple):
    """A type: its name in NumPy (and ml_dtypes), the bits of one element, and the NumPy type that holds these bits,
    None where no array does."""

    name: str
    bits: int
    array: Any


STORED = {
    "F64": DType("float64", 64, np.float64),
    "F32": DType("float32", 32, np.float32),
    "F16": DType("float16", 16, np.float16),
    "BF16": DType("bfloat16", 16, np.uint16),
    "BOOL": DType("bool", 8, np.bool_),
    **{f"I{bits}": DType(f"int{bits}", bits, np.dtype(f"int{bits}").type) for bits in (8, 16, 32, 64)},
    **{f"U{bits}": DType(f"uint{bits}", bits, np.dtype(f"uint{bits}").type) for bits in (8, 16, 32, 64)},
    "C64": DType("complex64", 64, np.complex64),
    **{name: DType(name.lower(), 8, None) for name in ("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{name: DType(name.lower(), 6, None) for name in ("F6_E2M3", "F6_E3M2")},
    "F4": DType("f4", 4, None),
}
"""Every type that the format knows, by its name there."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Those that take part in arithmetic."""
BY_NAME = {STORED[code].name: code for code in FLOATS}
"""The same by their names in NumPy."""
_BY_ARRAY = {np.dtype(kind.array): code for code, kind in STORED.items() if kind.array} | {np.dtype(np.uint16): "BF16"}


def itemsize(code: str) -> int:
    """Bytes of one element."""
    return STORED[code].bits // 8


def stored_as(dtype: np.dtype) -> str:
    """How a file calls an array's type; uint16 is the bits of bfloat16."""
    return _BY_ARRAY[dtype]
