"""Philox4x32-10 in NumPy, sharing nothing with the kernel."""

import numpy as np


def philox(counter, key):
    """Four words of 32 bits for each row of `counter` (n, 4), by a key of two."""
    x = np.array(counter, np.uint64)
    k = [np.uint64(word) for word in key]
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    for _ in range(10):
        p, q = x[:, 0] * np.uint64(0xD2511F53), x[:, 2] * np.uint64(0xCD9E8D57)
        x = np.stack([(q >> half) ^ x[:, 1] ^ k[0], q & low, (p >> half) ^ x[:, 3] ^ k[1], p & low], axis=1)
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return x.astype(np.uint32)


def dropout_mask(backend, rng, shape, share, dtype):
    """What a GPU draws, in place of `Backend.dropout_mask`."""
    size, key = int(np.prod(shape)), int(rng.integers(2**64, dtype=np.uint64))
    places = np.arange(-(-size // 4), dtype=np.uint64)
    counter = np.zeros((len(places), 4), np.uint64)
    counter[:, 0], counter[:, 1] = places & np.uint64(2**32 - 1), places >> np.uint64(32)
    words = philox(counter, (key % 2**32, key // 2**32)).reshape(-1)[:size]
    kept = words.reshape(shape) >= int(share * 2**32)
    return backend.from_host(kept * np.dtype(dtype).type(1 / (1 - share)))
