"""Numbers rounded to the types that files hold."""

import numpy as np

from nblora.kernels.weights.blocks import encode_all
from nblora.kernels.weights.codes import CODES
from nblora.storage.dtypes import STORED


def narrow(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 numbers to a stored dtype, once.

    Parameters
    ----------
    numbers : ndarray of float64
    dtype : {"F64", "F32", "F16", "BF16"}

    Returns
    -------
    ndarray
        Of the same shape; bfloat16 as the uint16 of its bits.
    """
    flat = np.ascontiguousarray(numbers, np.float64).reshape(-1)
    result = np.empty(flat.shape, STORED[dtype].array)
    scratch = np.empty(flat.shape, np.float32), np.empty(flat.shape, np.float32)
    encode_all(flat, CODES[dtype], *scratch, result.view(np.uint8))
    return result.reshape(numbers.shape)
