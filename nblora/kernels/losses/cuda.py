"""Losses and their gradients by the model's output, in one pass.

Each element is computed in the dtype, of which most GPUs have many more units than of float64's, and summed in float64.
Each block leaves its share of the loss, already multiplied by `scale`, one over the count, in `partial`; the host adds
the shares up.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import load, store, zeros
from nblora.kernels.common.cuda.sums import block_max, block_sum
from nblora.kernels.common.cuda.target import cuda, device_function, float64, int32, int64, kernel


def _softmax_lanes(dtype):
    """Device functions on the tuples of a vector: the largest of those before `valid`; the sum
    of their exp(z - top), 0 where nothing but -inf was found; and the gradient, the label's place counted from the
    vector's first."""
    LANES, cast = 16 // np.dtype(dtype).itemsize, getattr(types, dtype)
    ZERO, LOWEST = cast(0), cast(-math.inf)

    @device_function
    def power(z, top):
        return cast(math.exp(z - top))

    @device_function
    def most_2(z, valid):
        return z[1] if valid > 1 and z[1] > z[0] else z[0]

    @device_function
    def most_4(z, valid):
        high = most_2(z, valid)
        high = z[2] if valid > 2 and z[2] > high else high
        return z[3] if valid > 3 and z[3] > high else high

    @device_function
    def exponentials_2(z, valid, found):
        top = found if found != LOWEST else ZERO
        return power(z[0], top) + (power(z[1], top) if valid > 1 else ZERO)

    @device_function
    def exponentials_4(z, valid, found):
        top = found if found != LOWEST else ZERO
        rest = (power(z[2], top) if valid > 2 else ZERO) + (power(z[3], top) if valid > 3 else ZERO)
        return exponentials_2(z, valid, found) + rest

    @device_function
    def slope(z, top, each, one, here):
        share = each * power(z, top)
        return share - one if here else share

    @device_function
    def slopes_2(z, valid, top, each, one, place):
        second = slope(z[1], top, each, one, place == 1) if valid > 1 else ZERO
        return slope(z[0], top, each, one, place == 0), second

    @device_function
    def slopes_4(z, valid, top, each, one, place):
        third = slope(z[2], top, each, one, place == 2) if valid > 2 else ZERO
        fourth = slope(z[3], top, each, one, place == 3) if valid > 3 else ZERO
        return (*slopes_2(z, valid, top, each, one, place), third, fourth)

    found = {2: (most_2, exponentials_2, slopes_2), 4: (most_4, exponentials_4, slopes_4)}
    return found[LANES]


@functools.cache
def losses(dtype: str, threads: int):
    """The loss kernels of one dtype for blocks of `threads`, a power of two."""
    SIZE, cast, LANES = threads, getattr(types, dtype), 16 // np.dtype(dtype).itemsize
    ZERO, ONE, LOWEST = cast(0), cast(1), cast(-math.inf)
    total, highest = block_sum(threads), block_max(threads)
    most, exponentials, slopes = _softmax_lanes(dtype)

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
    def softmax_cross_entropy(logits, labels, scale, aligned, gradient, partial):
        """scale (log Σ exp z - z[label]); gradient = scale (softmax(z) - onehot(label)); zeros where the label is
        negative. One block a row, which reads it twice, the maximum and the sum together: grid (N,).

        `aligned` says that logits and gradient begin at multiples of 16 bytes. A row may begin anywhere: its first
        vector is what lies before the next multiple.
        """
        shared = cuda.shared.array(SIZE, float64)
        maxima = cuda.shared.array(SIZE, float64)
        n, t, outputs = int64(cuda.blockIdx.x), int32(cuda.threadIdx.x), int32(logits.shape[1])
        row, label = n * outputs, labels[n]
        first = t * LANES - int32(row & (LANES - 1))
        column = first
        if label < 0:
            while column < outputs:
                begin = max(column, int32(0))
                valid = min(column + LANES, outputs) - begin
                store(gradient, row + begin, valid, aligned, zeros(LANES, ZERO))
                column += SIZE * LANES
            if t == 0:
                partial[n] = float64(0)
            return
        found, sum_of_found = LOWEST, float64(0)
        while column < outputs:
            begin = max(column, int32(0))
            valid = min(column + LANES, outputs) - begin
            z = load(logits, row + begin, valid, aligned, LANES)
            high = most(z, valid)
            if high > found:
                sum_of_found *= float64(math.exp(found - high))
                found = high
            sum_of_found += float64(exponentials(z, valid, found))
            column += SIZE * LANES
        largest = highest(maxima, t, float64(found))
        top = cast(largest)
        normaliser = total(shared, t, sum_of_found * float64(math.exp(found - top)))
        each, one = cast(scale / normaliser), cast(scale)
        column = first
        while column < outputs:
            begin = max(column, int32(0))
            valid = min(column + LANES, outputs) - begin
            z = load(logits, row + begin, valid, aligned, LANES)
            store(gradient, row + begin, valid, aligned, slopes(z, valid, top, each, one, label - begin))
            column += SIZE * LANES
        if t == 0:
            chosen = float64(load(logits, row + label, 1, 0, 1)[0])
            partial[n] = (math.log(normaliser) + largest - chosen) * scale

    return SimpleNamespace(
        mean_squared_error=mean_squared_error,
        binary_cross_entropy=binary_cross_entropy,
        softmax_cross_entropy=softmax_cross_entropy,
    )
