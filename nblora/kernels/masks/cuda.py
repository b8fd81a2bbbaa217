"""Masks of dropout, drawn where they are used: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1,
2, 3" (2011), whose numbers are a function of a key and of an element's place, so any grid draws the same.

Words of 32 bits are kept in int64: their products wrap, and what is looked at of them is masked.
"""

import functools

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import store
from nblora.kernels.common.cuda.target import cuda, device_function, int64, kernel

WORD = 0xFFFFFFFF
FACTOR_0, FACTOR_1 = 0xD2511F53, 0xCD9E8D57
STEP_0, STEP_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


@device_function
def draw(counter, key_0, key_1):
    """The four numbers of 32 bits at a place of the sequence that a key of two names."""
    a, b, c, d = counter & WORD, counter >> 32 & WORD, int64(0), int64(0)
    for _ in range(ROUNDS):
        first, second = a * FACTOR_0, c * FACTOR_1
        a, b, c, d = (
            (second >> 32 & WORD) ^ b ^ key_0,
            second & WORD,
            (first >> 32 & WORD) ^ d ^ key_1,
            first & WORD,
        )
        key_0, key_1 = key_0 + STEP_0 & WORD, key_1 + STEP_1 & WORD
    return a, b, c, d


@functools.cache
def dropout_mask(dtype: str, threads: int):
    """Kernel: mask[i] = kept where the i-th number of Philox is at least `least`, else 0.

    mask (any shape); keys below 2³², `least` the share dropped, times 2³². A thread draws four numbers. Grid (any,).
    """
    LANES, TYPE = 16 // np.dtype(dtype).itemsize, getattr(types, dtype)
    ZERO = TYPE(0)

    @kernel(threads)
    def dropout_mask(key_0, key_1, least, kept, aligned, mask):
        counter = int64(cuda.grid(1))
        while 4 * counter < mask.size:
            a, b, c, d = draw(counter, int64(key_0), int64(key_1))
            first = kept if a >= least else ZERO, kept if b >= least else ZERO
            second = kept if c >= least else ZERO, kept if d >= least else ZERO
            offset = 4 * counter
            if LANES == 4:
                store(mask, offset, mask.size - offset, aligned, first + second)
            else:
                store(mask, offset, mask.size - offset, aligned, first)
                store(mask, offset + 2, mask.size - offset - 2, aligned, second)
            counter += cuda.gridsize(1)

    return dropout_mask
