"""What tests of operations beside the linear step share."""

import numpy as np

from nblora.backends import resolve
from nblora.backends.blocks import Heads
from nblora.backends.reference import ReferenceBackend

BACKENDS = {"cpu": resolve("cpu"), "reference": ReferenceBackend()}


def begins(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def heads_of(lengths, key_lengths, heads, key_heads, causal, scale):
    return Heads(begins(lengths), begins(key_lengths), heads, key_heads, causal, scale)


def apart(shape, k, v, room):
    """The same keys and values, `room` rows that nobody may read after those of each sequence."""
    lengths = np.diff(shape.key_begins)
    starts = begins(lengths + room)
    rows = np.concatenate([np.arange(length) + start for length, start in zip(lengths, starts, strict=False)])
    spread = []
    for array in (k, v):
        spread.append(np.full((starts[-1], array.shape[1]), np.nan, array.dtype))
        spread[-1][rows] = array
    return shape._replace(key_begins=starts, key_ends=starts[:-1] + lengths), rows, *spread


def each_head(shape, size):
    """Slices of rows and columns of queries, and those of the keys, of each sequence and head."""
    for s in range(len(shape.begins) - 1):
        rows, keys = slice(*shape.begins[s : s + 2]), slice(*shape.key_begins[s : s + 2])
        for head in range(shape.heads):
            start = head // (shape.heads // shape.key_heads) * size
            yield (rows, slice(head * size, head * size + size)), (keys, slice(start, start + size))
