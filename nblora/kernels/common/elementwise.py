"""Per-element rules, undecorated: each target compiles them into its own kernels.

A rule calls no other: helpers would have to be compiled for every target first.
Codes of activations: identity 0, relu 1, gelu (exact, by the error function) 2, tanh 3, sigmoid 4.
NaN and infinity pass through every rule. Numbers are written as floats: a GPU's kernels take them to their own dtype,
and would compute in double precision with whole ones.
"""

import math

IDENTITY, RELU, GELU, TANH, SIGMOID = range(5)

_SQRT_HALF = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327


def activate(z, code):
    """act(z)."""
    if code == RELU:
        return z if z > 0.0 or z != z else 0.0
    if code == GELU:
        return z * (0.5 * (1.0 + math.erf(z * _SQRT_HALF)))
    if code == TANH:
        return math.tanh(z)
    if code == SIGMOID:
        e = math.exp(-abs(z))
        return (1.0 if z >= 0.0 else e) / (1.0 + e)
    return z


def activation_slope(z, code):
    """act'(z); relu'(0) = 0."""
    if code == RELU:
        return z if z != z else (1.0 if z > 0.0 else 0.0)
    if code == GELU:
        return 0.5 * (1.0 + math.erf(z * _SQRT_HALF)) + z * (_INV_SQRT_2PI * math.exp(-0.5 * z * z))
    if code == TANH:
        t = math.tanh(z)
        return 1.0 - t * t
    if code == SIGMOID:
        e = math.exp(-abs(z))
        return e / ((1.0 + e) * (1.0 + e))
    return 1.0


def momentum_step(velocity, gradient, momentum, gain):
    """V' = m V + (1 - m) c g; `gain` is (1 - m) c."""
    return momentum * velocity + gain * gradient


def descend(parameter, gradient, lr):
    """p' = p - lr g."""
    return parameter - lr * gradient
