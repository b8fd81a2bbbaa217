"""The per-element rules of `elementwise`, compiled for one dtype, and the same lane by lane on tuples."""

import functools
from types import CodeType, FunctionType, SimpleNamespace

import numpy as np

from nblora.kernels.common import elementwise

from .target import device_function


def typed(rule, dtype):
    """A copy of a plain rule whose constants are of `dtype`.

    A bare 0.5 is a double to Numba and would take a float32 kernel to double arithmetic, 32 to 64 times slower on
    most GPUs. Whole numbers in comparisons with a code do not suffer from it.
    """
    cast = np.dtype(dtype).type

    def number(value):
        return cast(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    code: CodeType = rule.__code__
    code = code.replace(co_consts=tuple(number(value) for value in code.co_consts))
    names = {name: cast(v) if isinstance(v, float) else v for name, v in rule.__globals__.items()}
    copy = FunctionType(code, names, rule.__name__, rule.__defaults__)
    copy.__module__ = rule.__module__
    return copy


@functools.cache
def rules(dtype):
    """Device functions for one dtype ("float32" or "float64"): scalar rules, and `..._lanes` on tuples.

    Tuples have the lanes of a 128-bit vector.
    """
    activate = device_function(typed(elementwise.activate, dtype))
    slope = device_function(typed(elementwise.activation_slope, dtype))
    momentum_step = device_function(typed(elementwise.momentum_step, dtype))
    descend = device_function(typed(elementwise.descend, dtype))

    @device_function
    def activate_2(z, code):
        return activate(z[0], code), activate(z[1], code)

    @device_function
    def activate_4(z, code):
        return activate(z[0], code), activate(z[1], code), activate(z[2], code), activate(z[3], code)

    @device_function
    def through_2(g, z, code):
        return g[0] * slope(z[0], code), g[1] * slope(z[1], code)

    @device_function
    def through_4(g, z, code):
        return g[0] * slope(z[0], code), g[1] * slope(z[1], code), g[2] * slope(z[2], code), g[3] * slope(z[3], code)

    @device_function
    def momentum_2(v, g, momentum, gain):
        return momentum_step(v[0], g[0], momentum, gain), momentum_step(v[1], g[1], momentum, gain)

    @device_function
    def momentum_4(v, g, momentum, gain):
        return (
            momentum_step(v[0], g[0], momentum, gain),
            momentum_step(v[1], g[1], momentum, gain),
            momentum_step(v[2], g[2], momentum, gain),
            momentum_step(v[3], g[3], momentum, gain),
        )

    @device_function
    def descend_2(p, g, lr):
        return descend(p[0], g[0], lr), descend(p[1], g[1], lr)

    @device_function
    def descend_4(p, g, lr):
        return descend(p[0], g[0], lr), descend(p[1], g[1], lr), descend(p[2], g[2], lr), descend(p[3], g[3], lr)

    return SimpleNamespace(
        activate=activate,
        slope=slope,
        momentum_step=momentum_step,
        descend=descend,
        activate_lanes={2: activate_2, 4: activate_4},
        through_lanes={2: through_2, 4: through_4},
        momentum_lanes={2: momentum_2, 4: momentum_4},
        descend_lanes={2: descend_2, 4: descend_4},
    )
