"""Losses and their gradients by the model's output, in one pass.

Each element is computed in the dtype, of which most GPUs have many more units than of float64's, and summed in float64.
Each block leaves its share of the loss, already multiplied by `scale`, one over the count, in `partial`; the host adds
the shares up.
"""

import functools
import math
from types import SimpleNamespace

from numba.core import types

from nblora.kernels.common.cuda.intrinsics import load, store
from nblora.kernels.common.cuda.sums import block_max, block_sum
from nblora.kernels.common.cuda.target import cuda, float64, int32, int64, kernel


@functools.cache
def losses(dtype: str, threads: int):
    """The loss kernels of one dtype for blocks of `threads`, a power of two."""
    SIZE, cast = threads, getattr(types, dtype)
    ZERO, ONE = cast(0), cast(1)
    total, highest = block_sum(threads), block_max(threads)

    @kernel(threads)
    def mean_squared_error(output, target, scale, gradient, partial):
        """Σ (y - t)² / (N·out); gradient = 2 (y - t) / (N·out). All (N, out); grid (any,)."""
        shared = cuda.shared.array(SIZE, float64)
        slope = cast(2.0 * scale)
        value = float64(0)
        i = int64(cuda.grid(1))
        while i < output.size:
            error = load(output, i, 1, 0, 1)[0] - load(target, i, 1, 0, 1)[0]
            value += float64(error * error)
            store(gradient, i, 1, 0, (slope * error,))
            i += cuda.gridsize(1)
        value = total(shared, cuda.threadIdx.x, value)
        if cuda.threadIdx.x == 0:
            partial[cuda.blockIdx.x] = value * scale

    @kernel(threads)
    def binary_cross_entropy(logits, target, scale, gradient, partial):
        """Σ (max(z, 0) - z t + log(1 + exp(-|z|))) / (N·out); gradient = (sigmoid(z) - t) / (N·out). Grid (any,)."""
        shared = cuda.shared.array(SIZE, float64)
        slope = cast(scale)
        value = float64(0)
        i = int64(cuda.grid(1))
        while i < logits.size:
            z, t = load(logits, i, 1, 0, 1)[0], load(target, i, 1, 0, 1)[0]
            e = math.exp(-abs(z))
            value += float64((z if z > ZERO else ZERO) - z * t + math.log1p(e))
            store(gradient, i, 1, 0, (slope * ((ONE if z >= ZERO else e) / (ONE + e) - t),))
            i += cuda.gridsize(1)
        value = total(shared, cuda.threadIdx.x, value)
        if cuda.threadIdx.x == 0:
            partial[cuda.blockIdx.x] = value * scale

    @kernel(threads)
    def softmax_cross_entropy(logits, labels, scale, gradient, partial):
        """scale (log Σ exp z - z[label]); gradient = scale (softmax(z) - onehot(label)); zeros where the label is
        negative. One block a row: grid (N,)."""
        shared = cuda.shared.array(SIZE, float64)
        maxima = cuda.shared.array(SIZE, float64)
        n, t, outputs = int64(cuda.blockIdx.x), int32(cuda.threadIdx.x), int64(logits.shape[1])
        row, label = n * outputs, labels[n]
        found = load(logits, row, 1, 0, 1)[0]
        for o in range(t, outputs, SIZE):
            other = load(logits, row + o, 1, 0, 1)[0]
            if other > found or other != other:
                found = other
        largest = highest(maxima, t, float64(found))
        top = cast(largest)
        value = float64(0)
        for o in range(t, outputs, SIZE):
            value += float64(math.exp(load(logits, row + o, 1, 0, 1)[0] - top))
        normaliser = total(shared, t, value)
        learnt = label >= 0
        each = cast(scale / normaliser)
        for o in range(t, outputs, SIZE):
            share = each * math.exp(load(logits, row + o, 1, 0, 1)[0] - top) if learnt else ZERO
            store(gradient, row + o, 1, 0, (share - cast(scale) if o == label else share,))
        if t == 0:
            chosen = float64(load(logits, row + label, 1, 0, 1)[0]) if learnt else float64(0)
            partial[n] = (math.log(normaliser) + largest - chosen) * scale if learnt else float64(0)

    return SimpleNamespace(
        mean_squared_error=mean_squared_error,
        binary_cross_entropy=binary_cross_entropy,
        softmax_cross_entropy=softmax_cross_entropy,
    )
