"""Element-wise kernels: updates of parameters, small arithmetic, act'(z), and the sum of squares.

Grids stride: any number of blocks covers any array, so a launch may be as small as the device is. Strides are counted
by hand: how often a `range` runs is a division of 64 bits, a hundred instructions of each thread. Arrays of any shape
are taken as memory.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import add_scaled, load, memory, multiply, scale, store, zeros
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.sums import block_sum
from nblora.kernels.common.cuda.target import cuda, device_function, float64, int64, kernel

DELTA, WEIGHT = 1, 2  # what `descend_sums` changes


@functools.cache
def elementwise(dtype: str, threads: int):
    """The element-wise kernels of one dtype. All arrays have the same size; `aligned` says that vectors may be used."""
    LANES, TYPE = 16 // np.dtype(dtype).itemsize, getattr(types, dtype)
    ONE = TYPE(1)
    momentum_step, descend = rules(dtype).momentum_lanes[LANES], rules(dtype).descend_lanes[LANES]
    slope = rules(dtype).slope

    @device_function
    def count(array):
        return (array.size + LANES - 1) // LANES

    @kernel(threads)
    def fill(array, value, aligned):
        """Every element = value."""
        vector = int64(cuda.grid(1))
        while vector < count(array):
            offset = vector * LANES
            store(array, offset, array.size - offset, aligned, zeros(LANES, value))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def add(target, source, aligned):
        """Target += source."""
        vector = int64(cuda.grid(1))
        while vector < count(target):
            offset = vector * LANES
            valid = target.size - offset
            held = load(target, offset, valid, aligned, LANES)
            store(target, offset, valid, aligned, add_scaled(held, load(source, offset, valid, aligned, LANES), ONE))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def times(target, factor, aligned):
        """Target *= factor."""
        vector = int64(cuda.grid(1))
        while vector < count(target):
            offset = vector * LANES
            valid = target.size - offset
            store(target, offset, valid, aligned, scale(load(target, offset, valid, aligned, LANES), factor))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def masked(x, mask, out, aligned):
        """Out = x ∘ mask."""
        vector = int64(cuda.grid(1))
        while vector < count(out):
            offset = vector * LANES
            valid = out.size - offset
            kept = load(mask, offset, valid, aligned, LANES)
            store(out, offset, valid, aligned, multiply(load(x, offset, valid, aligned, LANES), kept))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def momentum(delta, velocity, gradient, momentum, gain, lr, aligned):
        """V = m V + gain gradient; D -= lr V."""
        vector = int64(cuda.grid(1))
        while vector < count(delta):
            offset = vector * LANES
            valid = delta.size - offset
            gradients = load(gradient, offset, valid, aligned, LANES)
            v = momentum_step(load(velocity, offset, valid, aligned, LANES), gradients, momentum, gain)
            store(velocity, offset, valid, aligned, v)
            store(delta, offset, valid, aligned, descend(load(delta, offset, valid, aligned, LANES), v, lr))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def descend_sums(sums, momentum, gain, delta_lr, lr, parts, aligned, delta, velocity, weight):
        """G = Σ_split sums, in order; V = m V + gain G, D -= delta_lr V; W -= lr G: those that `parts` names.

        sums (splits·rows, columns) of a small weight whose many samples were split.
        """
        vector = int64(cuda.grid(1))
        while vector < count(weight):
            offset = vector * LANES
            valid = weight.size - offset
            gradient = load(sums, offset, valid, aligned, LANES)
            split = offset + weight.size
            while split < sums.size:
                gradient = add_scaled(gradient, load(sums, split, valid, aligned, LANES), ONE)
                split += weight.size
            if parts & DELTA:
                v = momentum_step(load(velocity, offset, valid, aligned, LANES), gradient, momentum, gain)
                store(velocity, offset, valid, aligned, v)
                held = load(delta, offset, valid, aligned, LANES)
                store(delta, offset, valid, aligned, descend(held, v, delta_lr))
            if parts & WEIGHT:
                held = load(weight, offset, valid, aligned, LANES)
                store(weight, offset, valid, aligned, descend(held, gradient, lr))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def activation_gradient(grad_output, z, code, gz):
        """gz = grad_output · act'(z)."""
        i = int64(cuda.grid(1))
        while i < gz.size:
            store(gz, i, 1, 0, (load(grad_output, i, 1, 0, 1)[0] * slope(load(z, i, 1, 0, 1)[0], code),))
            i += cuda.gridsize(1)

    return SimpleNamespace(
        fill=fill,
        add=add,
        times=times,
        masked=masked,
        momentum=momentum,
        descend_sums=descend_sums,
        activation_gradient=activation_gradient,
    )


@functools.cache
def grouped(dtype: str, threads: int):
    """Kernels over many arrays in one launch, grid (any, arrays).

    A row of `table` tells an array's elements and addresses, one of `numbers` the scalars of its update.
    """
    SIZE, TYPE = threads, getattr(types, dtype)
    ZERO = TYPE(0)
    total = block_sum(threads)

    @kernel(threads)
    def sums_of_squares(table, partial):
        """partial[array, block] = Σ a² over the block's share, in float64. A row: elements, a."""
        shared = cuda.shared.array(SIZE, float64)
        job = cuda.blockIdx.y
        size = table[job, 0]
        array = memory(table[job, 1], size, ZERO)
        value = float64(0)
        i = int64(cuda.grid(1))
        while i < size:
            element = float64(load(array, i, 1, 0, 1)[0])
            value += element * element
            i += cuda.gridsize(1)
        value = total(shared, cuda.threadIdx.x, value)
        if cuda.threadIdx.x == 0:
            partial[job * cuda.gridDim.x + cuda.blockIdx.x] = value

    @kernel(threads)
    def sgd(table, numbers):
        """Parameter -= lr gradient. A row: elements, parameter, gradient; lr."""
        job = cuda.blockIdx.y
        size, lr = table[job, 0], TYPE(numbers[job, 0])
        parameter, gradient = memory(table[job, 1], size, ZERO), memory(table[job, 2], size, ZERO)
        i = int64(cuda.grid(1))
        while i < size:
            moved = load(parameter, i, 1, 0, 1)[0] - lr * load(gradient, i, 1, 0, 1)[0]
            store(parameter, i, 1, 0, (moved,))
            i += cuda.gridsize(1)

    @kernel(threads)
    def adamw(table, numbers):
        """v1 = b1 v1 + a1 g; v2 = b2 v2 + a2 g²; p = keep p - rate v1 / (√(v2 / bias2) + eps).

        A row: elements, parameter, gradient, v1, v2. keep = 1 - lr·decay, rate = lr / (1 - b1^step), b1, a1 = 1 - b1,
        b2, a2 = 1 - b2, bias2 = 1 - b2^step, eps.
        """
        job = cuda.blockIdx.y
        size = table[job, 0]
        parameter, gradient = memory(table[job, 1], size, ZERO), memory(table[job, 2], size, ZERO)
        first, second = memory(table[job, 3], size, ZERO), memory(table[job, 4], size, ZERO)
        keep, rate, b1, a1 = TYPE(numbers[job, 0]), TYPE(numbers[job, 1]), TYPE(numbers[job, 2]), TYPE(numbers[job, 3])
        b2, a2, bias2, eps = TYPE(numbers[job, 4]), TYPE(numbers[job, 5]), TYPE(numbers[job, 6]), TYPE(numbers[job, 7])
        i = int64(cuda.grid(1))
        while i < size:
            g = load(gradient, i, 1, 0, 1)[0]
            v1 = b1 * load(first, i, 1, 0, 1)[0] + a1 * g
            v2 = b2 * load(second, i, 1, 0, 1)[0] + a2 * g * g
            p = keep * load(parameter, i, 1, 0, 1)[0] - rate * v1 / (math.sqrt(v2 / bias2) + eps)
            store(first, i, 1, 0, (v1,))
            store(second, i, 1, 0, (v2,))
            store(parameter, i, 1, 0, (p,))
            i += cuda.gridsize(1)

    return SimpleNamespace(sums_of_squares=sums_of_squares, sgd=sgd, adamw=adamw)
