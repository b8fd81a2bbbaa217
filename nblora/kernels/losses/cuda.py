"""Losses and their gradients by the model's output, in one pass; arithmetic in float64, as on the CPU.

Each block leaves its share of the loss, already divided by the count, in `partial`; the host adds the shares up.
"""

import functools
import math
from types import SimpleNamespace

from numba.core import types

from nblora.kernels.common.cuda.intrinsics import load, store
from nblora.kernels.common.cuda.sums import block_max, block_sum
from nblora.kernels.common.cuda.target import cuda, float64, int64, kernel


@functools.cache
def losses(dtype: str, threads: int):
    """The loss kernels of one dtype for blocks of `threads`, a power of two."""
    SIZE, cast = threads, getattr(types, dtype)
    total, highest = block_sum(threads), block_max(threads)

    @kernel(threads)
    def mean_squared_error(output, target, gradient, partial):
        """Σ (y - t)² / (N·out); gradient = 2 (y - t) / (N·out). All (N, out); grid (any,)."""
        shared = cuda.shared.array(SIZE, float64)
        scale = 1.0 / output.size
        value = float64(0)
        for place in range(cuda.grid(1), output.size, cuda.gridsize(1)):
            i = int64(place)
            error = float64(load(output, i, 1, 0, 1)[0]) - float64(load(target, i, 1, 0, 1)[0])
            value += error * error
            store(gradient, i, 1, 0, (cast(2.0 * scale * error),))
        value = total(shared, cuda.threadIdx.x, value)
        if cuda.threadIdx.x == 0:
            partial[cuda.blockIdx.x] = value * scale

    @kernel(threads)
    def binary_cross_entropy(logits, target, gradient, partial):
        """Σ (max(z, 0) - z t + log(1 + exp(-|z|))) / (N·out); gradient = (sigmoid(z) - t) / (N·out). Grid (any,)."""
        shared = cuda.shared.array(SIZE, float64)
        scale = 1.0 / logits.size
        value = float64(0)
        for place in range(cuda.grid(1), logits.size, cuda.gridsize(1)):
            i = int64(place)
            z, t = float64(load(logits, i, 1, 0, 1)[0]), float64(load(target, i, 1, 0, 1)[0])
            e = math.exp(-abs(z))
            value += (z if z > 0 else 0.0) - z * t + math.log1p(e)
            store(gradient, i, 1, 0, (cast(scale * ((1.0 if z >= 0 else e) / (1.0 + e) - t)),))
        value = total(shared, cuda.threadIdx.x, value)
        if cuda.threadIdx.x == 0:
            partial[cuda.blockIdx.x] = value * scale

    @kernel(threads)
    def softmax_cross_entropy(logits, labels, gradient, partial):
        """(log Σ exp z - z[label]) / N; gradient = (softmax(z) - onehot(label)) / N. One block a row: grid (N,)."""
        shared = cuda.shared.array(SIZE, float64)
        maxima = cuda.shared.array(SIZE, float64)
        n, t, outputs, scale = cuda.blockIdx.x, cuda.threadIdx.x, logits.shape[1], 1.0 / logits.shape[0]
        found = logits[n, 0]
        for o in range(t, outputs, SIZE):
            other = logits[n, o]
            if other > found or other != other:
                found = other
        largest = highest(maxima, t, float64(found))
        value = float64(0)
        for o in range(t, outputs, SIZE):
            value += math.exp(float64(logits[n, o]) - largest)
        normaliser = total(shared, t, value)
        label = labels[n]
        for o in range(t, outputs, SIZE):
            share = scale * math.exp(float64(logits[n, o]) - largest) / normaliser
            gradient[n, o] = share - scale if o == label else share
        if t == 0:
            partial[n] = (math.log(normaliser) + largest - float64(logits[n, label])) * scale

    return SimpleNamespace(
        mean_squared_error=mean_squared_error,
        binary_cross_entropy=binary_cross_entropy,
        softmax_cross_entropy=softmax_cross_entropy,
    )
