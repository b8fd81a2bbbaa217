"""Per-element rules, undecorated: each target compiles them into its own kernels.

A rule calls no other: helpers would have to be compiled for every target first.
Codes of activations: identity 0, relu 1, gelu (exact, by the error function) 2, tanh 3, sigmoid 4.
NaN and infinity pass through every rule. Numbers are written as floats: a GPU's kernels take them to their own dtype,
and would compute in double precision with whole ones.
quick_gelu 7. The last three are z σ(w) with w = a z + b z³: 0.5 (1 + tanh(u)) is σ(2u).
NaN and infinity pass through every rule.
"""

import math

IDENTITY, RELU, GELU, TANH, SIGMOID, SILU, GELU_TANH, QUICK_GELU = range(8)

_SQRT_HALF = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327
GATE_SLOPE = 1.5957691216057308  # a of gelu_tanh: 2 √(2/π)
GATE_CUBE = 0.07135481627260025  # b of gelu_tanh: 0.044715 a
QUICK_SLOPE = 1.702  # a of quick_gelu
GATE_BOUND = 30.0  # beyond it σ(w) of gelu_tanh is 0 or 1, and z³ might overflow


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
    if code >= SILU:
        w = z
        if code == QUICK_GELU:
            w = QUICK_SLOPE * z
        elif code == GELU_TANH:
            w = GATE_BOUND if z > GATE_BOUND else (-GATE_BOUND if z < -GATE_BOUND else z)
            w = w * (GATE_SLOPE + GATE_CUBE * w * w)
        e = math.exp(-abs(w))
        return z * ((1.0 if w >= 0.0 else e) / (1.0 + e))
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
    if code >= SILU:
        w, dw = z, 1.0
        if code == QUICK_GELU:
            w, dw = QUICK_SLOPE * z, QUICK_SLOPE
        elif code == GELU_TANH:
            w = GATE_BOUND if z > GATE_BOUND else (-GATE_BOUND if z < -GATE_BOUND else z)
            dw = GATE_SLOPE + 3.0 * GATE_CUBE * w * w
            w = w * (GATE_SLOPE + GATE_CUBE * w * w)
        e = math.exp(-abs(w))
        s = (1.0 if w >= 0.0 else e) / (1.0 + e)
        return s * (1.0 + z * dw * ((e if w >= 0.0 else 1.0) / (1.0 + e)))
    return 1.0


def momentum_step(velocity, gradient, momentum, gain):
    """V' = m V + (1 - m) c g; `gain` is (1 - m) c."""
    return momentum * velocity + gain * gradient


def descend(parameter, gradient, lr):
    """p' = p - lr g."""
    return parameter - lr * gradient
