"""Activations and their slopes over rows, in arithmetic that the compiler vectorises.

`math.exp` and `math.erf` are calls, one element at a time: with them GELU took 18 times as long as the two products of
a step at 256 x 768 x 3072. Here everything is polynomials, in float64 with errors of a few 1e-16, or, where that is
enough (`exponential32`, `_bell32`), in float32 with a few 1e-8: GELU by way of float64 took 6 ns an element, an eighth
of a step of a small transformer. The rules are those of `elementwise`. NaN and infinity pass through.
"""

import numpy as np
from numba.extending import overload

from . import elementwise
from .jit import PART_OPTIONS, part
from .microkernel import once
from .rows import copy_row

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5·2⁵²: adding it leaves the rounded value in the low bits

_SQRT_HALF = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327


@part(forceinline=True)
def _exponential(x):
    """(2ⁿ, exp(r) - 1) with x = n ln 2 + r, |r| <= ln 2 / 2, for |x| <= 700; beyond, those of ±700."""
    x = 700.0 if x > 700.0 else x
    x = -700.0 if x < -700.0 else x
    shifted = x * _LOG2E + (_ROUND + 1023.0)
    n = shifted - (_ROUND + 1023.0)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    scale = np.int64(np.float64(shifted).view(np.int64) << 52).view(np.float64)
    p = 1 / 6227020800.0
    p = p * r + 1 / 479001600.0
    p = p * r + 1 / 39916800.0
    p = p * r + 1 / 3628800.0
    p = p * r + 1 / 362880.0
    p = p * r + 1 / 40320.0
    p = p * r + 1 / 5040.0
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    return scale, p * r * r + r


@part(forceinline=True)
def _exp(x):
    scale, rest = _exponential(x)
    return 0.0 if x < -700.0 else scale + scale * rest


@part(forceinline=True)
def exponential32(x):
    """exp(x) in float32, 0 below -87; at most exp(88)."""
    one = np.float32(1)
    held = x if x > np.float32(-87) or x != x else np.float32(-87)
    held = held if held < np.float32(88) or x != x else np.float32(88)
    shifted = held * np.float32(_LOG2E) + np.float32(12582912 + 127)  # 1.5·2²³
    n = shifted - np.float32(12582912 + 127)
    r = (held - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    scale = np.int32(np.float32(shifted).view(np.int32) << np.int32(23)).view(np.float32)
    p = np.float32(1.9875691500e-4)  # Cephes' expf
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = scale * (p * r * r + r + one)
    return np.float32(0) if x < np.float32(-87) else value


def exponential(x, like):
    """exp(x) in the dtype of the array `like`, whose type chooses the function, so that none is widened."""
    return exponential32(x) if like.itemsize == 4 else _exp(x)


@overload(exponential, jit_options=PART_OPTIONS)
def _exponential_of_type(x, like):
    function = exponential32 if like.dtype.bitwidth == 32 else _exp
    return lambda x, like: function(x)


@part(forceinline=True)
def _normal_tail(z):
    """P(Z > |z|) of a standard normal variable: erfc(x) / 2 with x = |z| / √2.

    erfc(x) = t exp(-x² + P(2t - 1)), t = 2 / (2 + x), with the Chebyshev series of Press et al., Numerical Recipes, 3rd
    edition, section 6.2.2, here in powers.
    """
    x = abs(z) * _SQRT_HALF
    x = 40.0 if x > 40.0 else x
    t = 2 / (2 + x)
    y = 2 * t - 1
    p = -1.879048192e-09
    p = p * y + 4.060086272e-09
    p = p * y + 1.1106516992e-08
    p = p * y - 3.9166410752e-08
    p = p * y + 1.610612736e-09
    p = p * y + 1.53326977024e-07
    p = p * y - 2.4981274624e-07
    p = p * y - 1.68468414464e-07
    p = p * y + 1.2502106112e-06
    p = p * y - 1.272346443776e-06
    p = p * y - 2.948059037696e-06
    p = p * y + 8.562650611712e-06
    p = p * y + 1.3772128256e-07
    p = p * y - 3.018789900288e-05
    p = p * y + 3.174520193024e-05
    p = p * y + 7.1401019131904e-05
    p = p * y - 0.000174302959455232
    p = p * y - 9.3735032187904e-05
    p = p * y + 0.00067367879913856
    p = p * y - 0.00014624686329856
    p = p * y - 0.002345812501075328
    p = p * y + 0.001758933557808736
    p = p * y + 0.008824938557113696
    p = p * y - 0.00987268936639228
    p = p * y - 0.04689561023117734
    p = p * y + 0.047343306841904534
    p = p * y + 0.6726432239776567
    p = p * y - 0.6717940840566923
    return 0.5 * t * _exp(p - x * x)


@part(forceinline=True)
def _normal(z):
    """P(Z <= z)."""
    tail = _normal_tail(z)
    return 1 - tail if z > 0 else tail


@part(forceinline=True)
def _bell(z):
    """P(Z <= z), and exp(-z²/2)."""
    return _normal(z), _exp(-0.5 * z * z)


@part(forceinline=True)
def _bell32(z):
    """The same in float32, with one exponential: erfc(x) = t P(t) exp(-x²), x = |z| / √2, t = 2 / (2 + x).

    P is the polynomial of degree 8 nearest to exp(x²) erfc(x) / t for x <= 9.6, by relative error, 4e-8; beyond,
    exp(-x²) is 0. Fitted by weighted least squares.
    """
    half, one, two = np.float32(0.5), np.float32(1), np.float32(2)
    bell = exponential32(-half * z * z)
    t = two / (two + abs(z) * np.float32(_SQRT_HALF))
    p = np.float32(-0.0589313879609108)
    p = p * t + np.float32(0.2839011549949646)
    p = p * t + np.float32(-0.48579856753349304)
    p = p * t + np.float32(0.2764560282230377)
    p = p * t + np.float32(-0.025509491562843323)
    p = p * t + np.float32(0.20221152901649475)
    p = p * t + np.float32(0.24322479963302612)
    p = p * t + np.float32(0.2823585271835327)
    p = p * t + np.float32(0.28208738565444946)
    tail = half * t * p * bell
    return (one - tail if z > np.float32(0) else tail), bell


def bell(z, like):
    """P(Z <= z) of a standard normal variable and exp(-z²/2), in the dtype of the array `like`."""
    return _bell32(z) if like.itemsize == 4 else _bell(z)


@overload(bell, jit_options=PART_OPTIONS)
def _bell_of_type(z, like):
    function = _bell32 if like.dtype.bitwidth == 32 else _bell
    return lambda z, like: function(z)


@part(forceinline=True)
def _tanh(z):
    size = abs(z)
    size = 20.0 if size > 20.0 else size
    scale, rest = _exponential(2 * size)
    less_one = scale * rest + (scale - 1)
    result = less_one / (less_one + 2)
    return -result if z < 0 else result


@part
def _tiny(array):
    """The smallest normal number of the array's dtype."""
    return 1.1754943508222875e-38 if array.itemsize == 4 else 2.2250738585072014e-308


@part(forceinline=True)
def _flush(value, tiny):
    """The value, or 0 where it is subnormal."""
    return 0.0 if abs(value) < tiny else value


@part
def _gelu_row(y):
    """y = y P(Z <= y)."""
    kind = y.dtype.type
    tiny = kind(_tiny(y))
    for i in range(y.shape[0]):
        below, _ = bell(y[i], y)
        value = y[i] * below
        y[i] = kind(0) if abs(value) < tiny else value


@part
def _gelu_slope_row(gz, gy, z):
    """gz = gy (P(Z <= z) + z φ(z))."""
    kind = gz.dtype.type
    tiny, scale = kind(_tiny(gz)), kind(_INV_SQRT_2PI)
    for i in range(gz.shape[0]):
        below, density = bell(z[i], gz)
        value = gy[i] * (below + z[i] * (scale * density))
        gz[i] = kind(0) if abs(value) < tiny else value


@part
def _gate_shape(code):
    """a, b and the bound of z in w = a z + b z³."""
    if code == elementwise.GELU_TANH:
        return elementwise.GATE_SLOPE, elementwise.GATE_CUBE, elementwise.GATE_BOUND
    return (elementwise.QUICK_SLOPE if code == elementwise.QUICK_GELU else 1.0), 0.0, 3e38


@part
def _gate_row(y, code):
    """y = y σ(a y + b y³)."""
    kind = y.dtype.type
    slope, cube, most = _gate_shape(code)
    a, b, bound, one, tiny = kind(slope), kind(cube), kind(most), kind(1), kind(_tiny(y))
    for i in range(y.shape[0]):
        w = y[i] if y[i] < bound or y[i] != y[i] else bound
        w = w if w > -bound or w != w else -bound
        w = w * (a + b * w * w)
        e = exponential(-abs(w), y)
        value = y[i] * ((one if w >= 0 else e) / (one + e))
        y[i] = kind(0) if abs(value) < tiny else value


@part
def _gate_slope_row(gz, gy, z, code):
    """gz = gy σ (1 + z (a + 3 b z²)(1 - σ))."""
    kind = gz.dtype.type
    slope, cube, most = _gate_shape(code)
    a, b, bound, one, tiny = kind(slope), kind(cube), kind(most), kind(1), kind(_tiny(gz))
    for i in range(gz.shape[0]):
        held = z[i] if z[i] < bound or z[i] != z[i] else bound
        held = held if held > -bound or held != held else -bound
        square = b * held * held
        w = held * (a + square)
        e = exponential(-abs(w), gz)
        whole = one / (one + e)
        s, rest = (whole if w >= 0 else e * whole), (e * whole if w >= 0 else whole)
        value = gy[i] * (s * (one + z[i] * (a + kind(3) * square) * rest))
        gz[i] = kind(0) if abs(value) < tiny else value


@part
def activate_row(y, z, code):
    """y = act(z), element by element; y may be z.

    Each loop is over y alone, which holds z first: of two arrays that may be one the compiler makes no vectors.
    Subnormal results become 0, here and in the slopes: as operands of a product they cost 150 cycles each. With
    pre-activations of variance 64 the tails of GELU made a step at 256 x 768 x 3072 16 times slower.
    """
    once()
    copy_row(y, z)
    tiny = _tiny(y)
    if code == elementwise.RELU:
        for i in range(y.shape[0]):
            y[i] = y[i] if y[i] > 0 or y[i] != y[i] else 0
    elif code == elementwise.GELU:
        _gelu_row(y)
    elif code == elementwise.TANH:
        for i in range(y.shape[0]):
            y[i] = _tanh(np.float64(y[i]))
    elif code == elementwise.SIGMOID:
        for i in range(y.shape[0]):
            value = np.float64(y[i])
            e = _exp(-abs(value))
            y[i] = _flush((1.0 if value >= 0 else e) / (1 + e), tiny)
    elif code >= elementwise.SILU:
        _gate_row(y, code)


@part
def slope_row(gz, gy, z, code):
    """gz = gy·act'(z), element by element."""
    once()
    tiny = _tiny(gz)
    if code == elementwise.RELU:
        for i in range(gz.shape[0]):
            gz[i] = gy[i] * (1 if z[i] > 0 else (z[i] if z[i] != z[i] else 0))
    elif code == elementwise.GELU:
        _gelu_slope_row(gz, gy, z)
    elif code == elementwise.TANH:
        for i in range(gz.shape[0]):
            t = _tanh(np.float64(z[i]))
            gz[i] = _flush(gy[i] * (1 - t * t), tiny)
    elif code == elementwise.SIGMOID:
        for i in range(gz.shape[0]):
            e = _exp(-abs(np.float64(z[i])))
            gz[i] = _flush(gy[i] * (e / ((1 + e) * (1 + e))), tiny)
    elif code >= elementwise.SILU:
        _gate_slope_row(gz, gy, z, code)
