"""Losses and their gradients by the model's output, in one pass; arithmetic in float64, as on the CPU.

Each block leaves its share of the loss, already divided by the count, in `partial`; the host adds the shares up.
"""

import functools
import math
from types import SimpleNamespace

from nblora.kernels.common.cuda.sums import block_sum
from nblora.kernels.common.cuda.target import cuda, float64, kernel


@functools.cache
def losses(threads: int):
    """The loss kernels for blocks of `threads`, a power of two."""
    SIZE = threads
    total = block_sum(threads)

    @kernel(threads)
    def mean_squared_error(output, target, gradient, partial):
        """Σ (y - t)² / (N·out); gradient = 2 (y - t) / (N·out). All (N, out); grid (any,)."""
        shared = cuda.shared.array(SIZE, float64)
        outputs, scale = output.shape[1], 1.0 / output.size
        value = float64(0)
        for place in range(cuda.grid(1), output.size, cuda.gridsize(1)):
            n, o = place // outputs, place % outputs
            error = float64(output[n, o]) - float64(target[n, o])
            value += error * error
            gradient[n, o] = 2.0 * scale * error
        value = total(shared, cuda.threadIdx.x, value)
        if cuda.threadIdx.x == 0:
            partial[cuda.blockIdx.x] = value * scale

    @kernel(threads)
    def binary_cross_entropy(logits, target, gradient, partial):
        """Σ (max(z, 0) - z t + log(1 + exp(-|z|))) / (N·out); gradient = (sigmoid(z) - t) / (N·out). Grid (any,)."""
        shared = cuda.shared.array(SIZE, float64)
        outputs, scale = logits.shape[1], 1.0 / logits.size
        value = float64(0)
        for place in range(cuda.grid(1), logits.size, cuda.gridsize(1)):
            n, o = place // outputs, place % outputs
            z, t = float64(logits[n, o]), float64(target[n, o])
            e = math.exp(-abs(z))
            value += (z if z > 0 else 0.0) - z * t + math.log1p(e)
            gradient[n, o] = scale * ((1.0 if z >= 0 else e) / (1.0 + e) - t)
        value = total(shared, cuda.threadIdx.x, value)
        if cuda.threadIdx.x == 0:
            partial[cuda.blockIdx.x] = value * scale

    @kernel(threads)
    def softmax_cross_entropy(logits, labels, gradient, partial):
        """(log Σ exp z - z[label]) / N; gradient = (softmax(z) - onehot(label)) / N. One block a row: grid (N,)."""
        shared = cuda.shared.array(SIZE, float64)
        n, t, outputs, scale = cuda.blockIdx.x, cuda.threadIdx.x, logits.shape[1], 1.0 / logits.shape[0]
        largest = float64(logits[n, 0])
        for o in range(outputs):  # every thread for itself: the maximum is cheap beside exp, and NaN stays where it is
            largest = max(largest, float64(logits[n, o]))
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
