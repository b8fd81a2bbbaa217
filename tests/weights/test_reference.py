"""The kernels on weights against their specification in NumPy."""

import numpy as np
import pytest

from nblora.kernels.common import jit
from nblora.kernels.weights import blocks, reference
from nblora.kernels.weights.codes import BFLOAT16, BY_COLUMN, BY_ROW, CODES, FLOAT16, FLOAT32, FLOAT64, Factors, Stored

pytestmark = pytest.mark.skipif(jit.JIT_DISABLED, reason="the reference is what runs")

ROWS, COLUMNS, RANK = 11, 1030, 3  # groups and segments, and what is left of them


def stored(numbers, code):
    flat = np.ascontiguousarray(numbers, np.float64).reshape(-1)
    target = np.empty(flat.size * {FLOAT64: 8, FLOAT32: 4}.get(code, 2), np.uint8)
    reference.encode_all(flat, code, flat, flat, target)
    return Stored(target, code)


def factors(rng, rank=RANK, scaled=False):
    scales = (rng.random(ROWS) + 0.5, rng.random(COLUMNS) + 0.5) if scaled else (np.empty(0), np.empty(0))
    return Factors(rng.standard_normal((ROWS, rank)), rng.standard_normal((rank, COLUMNS)) * 1e-2, *scales)


def both(name, make):
    """What a kernel and its reference leave in the arrays that `make` hands out."""
    results = []
    for module in (blocks, reference):
        arguments, written = make()
        returned = getattr(module, name)(*arguments)
        results.append([*written, *(returned or ())])
    return zip(*results, strict=True)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(("rank", "scaled"), [(RANK, False), (RANK, True), (0, False)])
@pytest.mark.parametrize("code", CODES.values())
def test_merging(code, rank, scaled, replaced, rng):
    numbers = rng.standard_normal((ROWS, COLUMNS))
    numbers[2, 5], numbers[3, 1029], numbers[4, 0] = np.inf, np.nan, -0.0
    base, change = stored(numbers, code), factors(rng, rank, scaled)
    source = stored(rng.standard_normal((ROWS, COLUMNS)), FLOAT32) if replaced else base
    working = np.empty(0, np.float32 if code in (FLOAT16, BFLOAT16) else np.float64)

    def make():
        target, sums, counts = Stored(np.zeros_like(base.numbers), code), np.zeros((ROWS, 2)), np.zeros(2, np.int64)
        return (source, base, change, working, target, sums, counts), (target.numbers, sums, counts)

    (kernel, expected), sums, counts = both("merge_block", make)
    if code in (FLOAT64, FLOAT32):  # the sum of a product in another order: the last digit of float64
        kernel, expected = (reference._decode(each, code) for each in (kernel, expected))
        np.testing.assert_allclose(kernel, expected, rtol=1e-7 if code == FLOAT32 else 1e-12, atol=1e-15)
    else:
        whole = ~np.isnan(reference._decode(expected, code))
        width = kernel.view(np.uint16)
        np.testing.assert_array_equal(width[whole], expected.view(np.uint16)[whole])
        assert np.isnan(reference._decode(kernel, code)[~whole]).all()
    np.testing.assert_allclose(*sums, rtol=1e-5)
    np.testing.assert_array_equal(*counts)


@pytest.mark.parametrize("axis", [BY_ROW, BY_COLUMN])
@pytest.mark.parametrize("code", CODES.values())
def test_norms(code, axis, rng):
    source, change = stored(rng.standard_normal((ROWS, COLUMNS)), code), factors(rng)

    def make():
        squares = np.ones(ROWS if axis == BY_ROW else COLUMNS)
        return (source, change.P, change.Q, axis, squares), (squares,)

    ((kernel, expected),) = both("norm_block", make)
    np.testing.assert_allclose(kernel, expected, rtol=1e-12)


@pytest.mark.parametrize("code", CODES.values())
def test_rounding(code, rng):
    numbers = np.concatenate([rng.standard_normal(3000) * 2.0 ** rng.integers(-60, 40, 3000), [0, -0.0, 7e-320, 1e300]])

    def make():
        target, scratch = np.empty_like(stored(numbers, code).numbers), np.empty((2, numbers.size), np.float32)
        return (numbers, code, *scratch, target), (target,)

    ((kernel, expected),) = both("encode_all", make)
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize("code", CODES.values())
def test_spacings(code, rng):
    numbers = np.concatenate([rng.standard_normal(2000) * 2.0 ** rng.integers(-30, 9, 2000), [0, 1, -2, np.inf]])
    source = stored(numbers, code).numbers
    (squares, largest) = both("spacing_block", lambda: ((source, code), ()))
    np.testing.assert_allclose(*squares, rtol=1e-12)
    assert largest[0] == largest[1]


@pytest.mark.parametrize("code", CODES.values())
def test_comparing(code, rng):
    base, expected, actual = (rng.standard_normal(2500) for _ in range(3))
    actual[::3], actual[1::3] = expected[::3], base[1::3]
    expected[7], actual[10], actual[20], expected[20] = np.inf, np.nan, np.nan, np.nan
    w, e, a = stored(base, FLOAT32).numbers, stored(expected, code).numbers, stored(actual, code).numbers

    def make():
        measured = np.zeros(6)
        return (w, FLOAT32, e, a, code, measured), (measured,)

    ((kernel, reference_),) = both("compare_block", make)
    np.testing.assert_allclose(kernel, reference_, rtol=1e-11)


def test_folding(rng):
    sums = rng.standard_normal((9, 2))

    def make():
        totals = np.ones(2)
        return (sums, totals), (totals,)

    np.testing.assert_array_equal(*next(both("fold_rows", make)))
