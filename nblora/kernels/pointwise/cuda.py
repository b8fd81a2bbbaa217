"""Activations and gates over whole arrays of one size, taken as memory. Grids stride; `code` is an activation's.

`aligned` says that every array begins at a multiple of 16 bytes.
"""

import functools
from types import SimpleNamespace

import numpy as np

from nblora.kernels.common.cuda.intrinsics import load, multiply, store
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.target import cuda, device_function, int64, kernel


@functools.cache
def pointwise(dtype: str, threads: int):
    """The kernels of one dtype."""
    LANES = 16 // np.dtype(dtype).itemsize
    activate, through = rules(dtype).activate_lanes[LANES], rules(dtype).through_lanes[LANES]

    @device_function
    def count(array):
        return (array.size + LANES - 1) // LANES

    @kernel(threads)
    def activated(x, code, aligned, y):
        """y = act(x)."""
        vector = int64(cuda.grid(1))
        while vector < count(y):
            offset = vector * LANES
            valid = y.size - offset
            store(y, offset, valid, aligned, activate(load(x, offset, valid, aligned, LANES), code))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def activation_gradients(grad, x, code, aligned, gx):
        """gx = grad∘act'(x)."""
        vector = int64(cuda.grid(1))
        while vector < count(gx):
            offset = vector * LANES
            valid = gx.size - offset
            g = load(grad, offset, valid, aligned, LANES)
            store(gx, offset, valid, aligned, through(g, load(x, offset, valid, aligned, LANES), code))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def gated(x, u, code, aligned, y):
        """y = act(x)∘u."""
        vector = int64(cuda.grid(1))
        while vector < count(y):
            offset = vector * LANES
            valid = y.size - offset
            values = activate(load(x, offset, valid, aligned, LANES), code)
            store(y, offset, valid, aligned, multiply(values, load(u, offset, valid, aligned, LANES)))
            vector += cuda.gridsize(1)

    @kernel(threads)
    def gated_gradients(grad, x, u, code, aligned, gx, gu):
        """gx = grad∘u∘act'(x); gu = grad∘act(x)."""
        vector = int64(cuda.grid(1))
        while vector < count(gx):
            offset = vector * LANES
            valid = gx.size - offset
            g, z = load(grad, offset, valid, aligned, LANES), load(x, offset, valid, aligned, LANES)
            held = multiply(g, load(u, offset, valid, aligned, LANES))
            store(gx, offset, valid, aligned, through(held, z, code))
            store(gu, offset, valid, aligned, multiply(g, activate(z, code)))
            vector += cuda.gridsize(1)

    return SimpleNamespace(
        activated=activated, activation_gradients=activation_gradients, gated=gated, gated_gradients=gated_gradients
    )
