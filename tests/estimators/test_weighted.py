"""The weighted loss against loops, and against the plain losses."""

import numpy as np
import pytest

from nblora.training.losses import as_loss
from nblora.training.weighted import Weighted

ROUNDING = {"rtol": 1e-12, "atol": 1e-14}
STEP = 1e-6


def example(loss, rng):
    z = rng.normal(size=(7, 4))
    target = rng.integers(4, size=7) if loss == "cross_entropy" else rng.normal(size=(7, 4))
    return z, target


def naive(loss, z, target, weights):
    total = 0.0
    for row, t, w in zip(z, target, weights / np.mean(weights), strict=True):
        if loss == "cross_entropy":
            total += w * (np.log(sum(np.exp(value) for value in row)) - row[t])
        else:
            total += w * sum((value - aim) ** 2 for value, aim in zip(row, t, strict=True)) / len(row)
    return total / len(z)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_value_and_gradient(loss, rng):
    z, target = example(loss, rng)
    weights = rng.uniform(0, 3, 7)
    weighted = Weighted(loss)
    packed = weighted.pack(target, weights)
    value, gradient = weighted.value_and_gradient(z, packed)
    np.testing.assert_allclose(value, naive(loss, z, target, weights), **ROUNDING)
    for place in np.ndindex(z.shape):
        shift = np.zeros_like(z)
        shift[place] = STEP
        slope = (naive(loss, z + shift, target, weights) - naive(loss, z - shift, target, weights)) / (2 * STEP)
        np.testing.assert_allclose(gradient[place], slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_equal_weights_are_none(loss, rng):
    z, target = example(loss, rng)
    plain, weighted = as_loss(loss), Weighted(loss)
    value, gradient = plain.value_and_gradient(z, target)
    found = weighted.value_and_gradient(z, weighted.pack(target, np.full(7, 0.3)))
    np.testing.assert_allclose(found[0], value, **ROUNDING)
    np.testing.assert_allclose(found[1], gradient, **ROUNDING)
    assert weighted.metrics == plain.metrics
    measured = weighted.measure(z, weighted.pack(target, np.ones(7)))
    assert measured == pytest.approx(plain.measure(z, target))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(6), r"shape \(7,\)"),
        (np.zeros(7), "not all zero"),
        (-np.ones(7), "not negative"),
        (np.r_[np.nan, np.ones(6)], "finite"),
    ],
)
def test_bad_weights(weights, message, rng):
    with pytest.raises(ValueError, match=message):
        Weighted("mse").pack(rng.normal(size=(7, 2)), weights)


def test_bad_losses_and_targets(rng):
    with pytest.raises(ValueError, match="'mse' or 'cross_entropy'"):
        Weighted("binary_cross_entropy")
    with pytest.raises(ValueError, match=r"Weighted\.pack"):
        Weighted("mse").check_target("y", rng.normal(size=7), (7, 1))
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        Weighted("cross_entropy").check_target("y", Weighted("cross_entropy").pack([0, 3], [1, 1]), (2, 3))
