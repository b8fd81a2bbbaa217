"""Losses against naive formulas, finite differences, extremes, and wrong targets."""

import numpy as np
import pytest

import nblora
from nblora.backends import resolve
from nblora.backends.reference import ReferenceBackend
from nblora.training import BinaryCrossEntropy, CrossEntropy, MeanSquaredError
from nblora.training.losses import as_loss

from . import support

pytestmark = pytest.mark.small

CASES = {
    "mse": (MeanSquaredError, support.mean_squared_error),
    "cross_entropy": (CrossEntropy, support.softmax_cross_entropy),
    "binary_cross_entropy": (BinaryCrossEntropy, support.binary_cross_entropy),
}


def targets(name, rng, shape):
    if name == "cross_entropy":
        return rng.integers(0, shape[-1], shape[:-1])
    return rng.normal(size=shape) if name == "mse" else rng.integers(0, 2, shape).astype(float)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 2), (9, 3), (5, 17)])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_match_the_naive_formula(name, shape, dtype):
    loss, naive = CASES[name]
    rng = np.random.default_rng(3)
    output = (2 * rng.normal(size=shape)).astype(dtype)
    target = targets(name, rng, shape)
    value, gradient = loss().value_and_gradient(output, target)
    exact = output.astype(np.float64)
    assert abs(value - naive(exact, target.astype(dtype) if name != "cross_entropy" else target)) <= 1e-6 * abs(value)
    assert gradient.dtype == output.dtype
    differences = np.empty(shape)
    for place in np.ndindex(*shape):
        step = np.zeros(shape)
        step[place] = 1e-6
        differences[place] = (naive(exact + step, target) - naive(exact - step, target)) / 2e-6
    assert support.relative_error(gradient, differences) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_leading_axes_are_samples(name):
    rng = np.random.default_rng(4)
    output = rng.normal(size=(4, 6, 3))
    target = targets(name, rng, output.shape)
    loss = as_loss(name)
    value, gradient = loss.value_and_gradient(output, target)
    flat = target.reshape(24) if name == "cross_entropy" else target.reshape(24, 3)
    flat_value, flat_gradient = loss.value_and_gradient(output.reshape(24, 3), flat)
    assert value == flat_value
    np.testing.assert_array_equal(gradient, flat_gradient.reshape(output.shape))


def test_cross_entropy_of_large_logits():
    z = np.array([[1e4, 0.0, -1e4], [-1e30, 1e30, 0.0]])
    value, gradient = CrossEntropy().value_and_gradient(z, np.array([1, 1]))
    assert value == 5e3
    np.testing.assert_allclose(gradient, [[0.5, -0.5, 0], [0, 0, 0]])


def test_binary_cross_entropy_of_large_logits():
    z = np.array([[1e4], [-1e4], [1e4], [-1e4]])
    value, gradient = BinaryCrossEntropy().value_and_gradient(z, np.array([[1.0], [0.0], [0.0], [1.0]]))
    assert value == 5e3
    np.testing.assert_allclose(gradient.ravel(), [0, 0, 0.25, -0.25])


@pytest.mark.parametrize("name", CASES)
def test_nan_gives_nan(name):
    output = np.ones((2, 2))
    output[1, 1] = np.nan
    target = np.zeros(2, np.int64) if name == "cross_entropy" else np.zeros((2, 2))
    assert np.isnan(as_loss(name).value_and_gradient(output, target)[0])


def test_a_call_gives_the_value():
    assert MeanSquaredError()([[1, 2]], [[0, 0]]) == 2.5
    assert CrossEntropy()(np.zeros((3, 4)), [0, 1, 2]) == pytest.approx(np.log(4))
    assert BinaryCrossEntropy()(np.zeros((3, 1), "float32"), [0, 1, 1]) == pytest.approx(np.log(2))
    assert repr(CrossEntropy()) == "CrossEntropy()"


def test_accuracies():
    assert CrossEntropy().measure(np.array([[1.0, 2], [2, 1]]), np.array([1, 1])) == {"accuracy": 0.5}
    assert BinaryCrossEntropy().measure(np.array([[1.0], [-2], [3]]), np.array([[1], [0], [0]]))["accuracy"] == 2 / 3
    assert MeanSquaredError().measure(np.ones((2, 2)), np.ones((2, 2))) == {}


@pytest.mark.parametrize(
    ("name", "target", "error", "message"),
    [
        ("cross_entropy", [0.0, 1.0], TypeError, "integer class labels"),
        ("cross_entropy", ["cat", "dog"], TypeError, "return_inverse"),
        ("cross_entropy", [0, 3], ValueError, "labels from 0 to 2.*got 3 at sample 1"),
        ("cross_entropy", [-1, 0], ValueError, "got -1 at sample 0"),
        ("cross_entropy", [0, 1, 2], ValueError, "each of the 2 samples, got 3"),
        ("cross_entropy", 1, ValueError, "a single number"),
        ("cross_entropy", [[0], [1]], ValueError, r"shape \(2,\)"),
        ("cross_entropy", [[0, 0, 1], [1, 0, 0]], ValueError, "argmax"),
        ("mse", [[1.0, 2.0], [1.0, 2.0]], ValueError, r"\(2, 3\), got \(2, 2\)"),
        ("mse", None, TypeError, "y must be an array"),
        ("mse", [[1j] * 3] * 2, TypeError, "complex"),
        ("binary_cross_entropy", [[0, 1, 2], [0, 0, 0]], ValueError, "got 2 at sample 0"),
        ("binary_cross_entropy", [[0, 0, 0], [0, 0, np.nan]], ValueError, "got nan at sample 1"),
    ],
)
def test_wrong_targets(name, target, error, message):
    with pytest.raises(error, match=message):
        as_loss(name).check_target("y", target, (2, 3))


def test_cross_entropy_needs_two_outputs():
    with pytest.raises(ValueError, match="use binary_cross_entropy"):
        CrossEntropy().check_target("y", [0, 0], (2, 1))


def test_one_output_may_leave_out_its_axis():
    assert BinaryCrossEntropy().check_target("y", [True, False], (2, 1)).shape == (2, 1)
    assert MeanSquaredError().check_target("y", [1.0, 2.0], (2, 1)).shape == (2, 1)


def test_names_and_objects():
    loss = CrossEntropy()
    assert as_loss(loss) is loss
    with pytest.raises(ValueError, match="'mse', 'cross_entropy', 'binary_cross_entropy'"):
        as_loss("hinge")
    with pytest.raises(TypeError, match="Loss object"):
        as_loss(len)
    assert nblora.training.CrossEntropy is CrossEntropy


@pytest.mark.parametrize("backend", [resolve("cpu"), ReferenceBackend()], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 3), (70, 33), (2, 1030)])
def test_an_ignored_label_takes_no_part(shape, dtype, backend):
    rng = np.random.default_rng(5)
    z, labels = rng.normal(size=shape).astype(dtype), rng.integers(0, shape[1], shape[0])
    labels[::2] = -100
    learnt = labels >= 0
    value, gradient = CrossEntropy().value_and_gradient(z, labels, backend)
    exact = z[learnt].astype(np.float64)
    assert abs(value - support.softmax_cross_entropy(exact, labels[learnt])) <= 1e-6 * value
    shifted = np.exp(exact - exact.max(axis=1, keepdims=True))
    expected = shifted / shifted.sum(axis=1, keepdims=True)
    expected[np.arange(learnt.sum()), labels[learnt]] -= 1
    assert support.relative_error(gradient[learnt], expected / learnt.sum()) < (1e-12 if dtype == "float64" else 2e-5)
    assert not gradient[~learnt].any()


def test_where_nothing_is_learnt():
    loss = CrossEntropy()
    value, gradient = loss.value_and_gradient(np.ones((2, 3)), np.array([-100, -100]))
    assert value == 0
    assert not gradient.any()
    assert loss.measure(np.ones((2, 3)), np.array([-100, -100])) == {"accuracy": 0.0}
    assert loss.measure(np.eye(3), np.array([0, -100, 1])) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="or -100 where nothing is to be learnt, got -1 at sample 1"):
        loss.check_target("y", [0, -1], (2, 3))
