"""Activations and gates over whole arrays of one size, taken as memory. Grids stride; `code` is an activation's.

`aligned` says that every array begins at a multiple of 16 bytes.
"""

import functools
from types import SimpleNamespace

import numpy as np
from numba.core import types

from nblora.kernels.common.cuda.intrinsics import load, multiply, store
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.target import cuda, device_function, int64, kernel
from nblora.kernels.masks.cuda import draw


@functools.cache
def pointwise(dtype: str, threads: int):
    """The kernels of one dtype."""
    LANES, ZERO = 16 // np.dtype(dtype).itemsize, getattr(types, dtype)(0)
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

    @kernel(threads)
    def dropped(x, key_0, key_1, least, kept, aligned, y):
        """y = kept x where the element's number is at least `least`, else 0; a thread draws four."""
        counter = int64(cuda.grid(1))
        while 4 * counter < y.size:
            a, b, c, d = draw(counter, key_0, key_1)
            offset, factors = 4 * counter, (kept if a >= least else ZERO, kept if b >= least else ZERO)
            others = kept if c >= least else ZERO, kept if d >= least else ZERO
            valid = y.size - offset
            if LANES == 4:
                values = multiply(load(x, offset, valid, aligned, LANES), factors + others)
                store(y, offset, valid, aligned, values)
            else:
                store(y, offset, valid, aligned, multiply(load(x, offset, valid, aligned, LANES), factors))
                offset, valid = offset + LANES, valid - LANES
                store(y, offset, valid, aligned, multiply(load(x, offset, valid, aligned, LANES), others))
            counter += cuda.gridsize(1)

    return SimpleNamespace(
        activated=activated,
        activation_gradients=activation_gradients,
        gated=gated,
        gated_gradients=gated_gradients,
        dropped=dropped,
    )
