"""The CPU kernels against the reference backend in float64, and that one against the formulas, written here in NumPy
and sharing nothing with the library."""

import math
from typing import NamedTuple

import numpy as np
import pytest

from nblora.backends import resolve
from nblora.backends.protocol import Base, Delta, LowRank, Operands
from nblora.backends.reference import ReferenceBackend
from nblora.kernels.common import jit

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
BACKEND, REFERENCE = resolve("cpu"), ReferenceBackend()
IDENTITY, RELU, GELU, TANH, SIGMOID = range(5)

# (N, in, out, rank): nothing, single elements, odd edges of every tile, several blocks of samples and of features
SMALL = [(0, 5, 7, 1), (1, 1, 1, 1), (1, 33, 17, 2), (7, 31, 33, 3), (13, 8, 29, 8), (66, 9, 17, 2), (270, 5, 7, 2)]
LARGE = [
    (16, 100, 97, 5),
    (33, 300, 270, 9),
    (40, 130, 1030, 9),
    (64, 1030, 130, 33),
    (3, 1100, 1090, 70),
    (64, 270, 513, 4),
    (300, 130, 129, 17),
    (600, 65, 300, 30),
    (5, 600, 530, 300),
    (1100, 40, 1030, 3),
    (2048, 40, 70, 3),
]


class Case(NamedTuple):
    """Which parts a layer has."""

    delta: bool = True
    train: bool = False
    activation: int = IDENTITY
    masked: bool = False
    low_rank: bool = True
    base: bool = True
    bias: bool = True


CASES = [
    Case(),
    Case(train=True, activation=RELU, masked=True),
    Case(delta=False, activation=GELU, bias=False),
    Case(delta=False, train=True, activation=TANH, low_rank=False),
    Case(activation=SIGMOID, masked=True),
    Case(delta=False, base=False, bias=False),
    Case(delta=False, base=False, bias=False, masked=True),
    Case(delta=False, low_rank=False, activation=RELU),
]


def activation(z, code):
    """act(z) and act'(z)."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    if code == RELU:
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if code == GELU:
        cdf = 0.5 * (1 + erf(z / math.sqrt(2))) if z.size else z
        return z * cdf, cdf + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if code == TANH:
        return np.tanh(z), 1 - np.tanh(z) ** 2
    if code == SIGMOID:
        s = 1 / (1 + np.exp(-z))
        return s, s * (1 - s)
    return z, np.ones_like(z)


class Problem:
    """Random arrays of one case in logical shapes, and what the formulas make of them in float64."""

    s, c, m, lr, delta_lr = 1.7, 0.3, 0.9, 0.1, 0.2

    def __init__(self, shape, dtype, transposed, case, seed=0):
        N, inputs, outputs, rank = shape
        self.case, self.transposed, self.dtype = case, transposed, np.dtype(dtype)
        generator = np.random.default_rng(seed)
        scales = {
            "W": (inputs, outputs, inputs**-0.5),
            "D": (inputs, outputs, inputs**-0.5),
            "V": (inputs, outputs, 1),
            "A": (inputs, rank, inputs**-0.5),
            "B": (rank, outputs, rank**-0.5),
            "x": (N, inputs, 1),
            "gy": (N, outputs, 1),
        }
        self.arrays = {k: (generator.standard_normal(s[:2]) * s[2]).astype(dtype) for k, s in scales.items()}
        self.arrays["b"] = generator.standard_normal(outputs).astype(dtype)
        self.arrays["mask"] = ((generator.random((N, inputs)) > 0.3) / 0.7).astype(dtype)

    def operands(self, dtype=None):
        """Fresh copies for the backend, stored."""
        a, case = {k: v.astype(dtype or v.dtype) for k, v in self.arrays.items()}, self.case
        stored = {k: np.array(a[k].T if self.transposed else a[k], order="C") for k in "WDV"}
        return Operands(
            Base(stored["W"], a["b"].copy() if case.bias else None, self.transposed) if case.base else None,
            LowRank(a["A"].copy(), a["B"].copy(), self.s) if case.low_rank else None,
            Delta(stored["D"], stored["V"], self.c, self.m) if case.delta else None,
            case.activation,
            case.train,
        )

    @property
    def mask(self):
        return self.arrays["mask"] if self.case.masked else None

    def expected(self):
        """Every result of the reference, in logical shapes."""
        x, gy = (self.arrays[name].astype(np.float64) for name in ("x", "gy"))
        mask = None if self.mask is None else self.mask.astype(np.float64)
        operands, case = self.operands(np.float64), self.case
        y, saved = REFERENCE.forward(x, operands, mask, True)
        found = {"y": y, **REFERENCE.backward(gy, saved, operands)._asdict()}
        if case.base:
            found["merged"] = REFERENCE.merge(operands)
        REFERENCE.backward_update(gy, saved, operands, self.lr, self.delta_lr)
        if case.delta:
            found |= {"velocity after": operands.delta.velocity, "delta after": operands.delta.delta}
        if case.base:
            found["weight after"] = operands.base.weight
        return {name: self.logical(name, array) for name, array in found.items()}

    def logical(self, name, array):
        """A stored result turned to (in, out)."""
        stored = name.split()[0] in ("delta", "weight", "velocity", "merged")
        return array.T if stored and self.transposed and array is not None else array

    def formulas(self):
        """Every result by its formula."""
        a = {k: v.astype(np.float64) for k, v in self.arrays.items()}
        case, s, c = self.case, self.s, self.c
        M = a["W"] * case.base + c * a["D"] * case.delta
        x_low = a["x"] * a["mask"] if case.masked else a["x"]
        u = s * x_low @ a["A"] * case.low_rank
        z = a["x"] @ M + u @ a["B"] + a["b"] * case.bias
        y, slope = activation(z, case.activation)
        gz = a["gy"] * slope
        t = s * gz @ a["B"].T * case.low_rank
        G = a["x"].T @ gz
        V = self.m * a["V"] + (1 - self.m) * c * G
        low = t @ a["A"].T
        return {
            "y": y,
            "x": gz @ M.T + (low * a["mask"] if case.masked else low),
            "A": x_low.T @ t if case.low_rank else None,
            "B": u.T @ gz if case.low_rank else None,
            "delta": c * G if case.delta else None,
            "weight": G if case.train else None,
            "bias": gz.sum(0) if case.train and case.bias else None,
            "velocity after": V,
            "delta after": a["D"] - self.delta_lr * V,
            "weight after": a["W"] - self.lr * G * case.train,
            "merged": M + s * a["A"] @ a["B"] * case.low_rank,
        }

    def check(self, name, computed, expected, tolerance=None):
        """Compare one result; stored ones are turned to the logical shape."""
        if expected is None:
            assert computed is None, name
            return
        assert computed.dtype == self.dtype, name
        computed = self.logical(name, computed)
        assert computed.shape == expected.shape, name
        if expected.size:
            worst = np.abs(computed - expected).max() / max(np.abs(expected).max(), 1e-30)
            assert worst <= (tolerance or TOLERANCE[self.dtype.name]), (name, worst)


def run(shape, dtype, transposed, case, backend=BACKEND, tolerance=None):
    """Every operation on one problem; the same for every backend, and for the reference by the formulas."""
    problem = Problem(shape, dtype, transposed, case)
    expected = problem.formulas() if backend is REFERENCE else problem.expected()
    bring = backend.from_host
    x, gy = bring(problem.arrays["x"]), bring(problem.arrays["gy"])
    mask = bring(problem.mask) if case.masked else None
    operands = brought(problem.operands(), bring)

    def check(name, computed):
        host = None if computed is None else backend.to_host(computed)
        problem.check(name, host, expected[name], tolerance)

    y, saved = backend.forward(x, operands, mask, True)
    check("y", y)
    assert (saved.x is None) == (not (case.delta or case.low_rank or case.train))
    assert (saved.z is None) == (case.activation == IDENTITY)
    y_alone, nothing = backend.forward(x, operands, mask, False)
    assert nothing is None
    np.testing.assert_array_equal(backend.to_host(y_alone), backend.to_host(y))

    gradients = backend.backward(gy, saved, operands)
    for name in gradients._fields:
        check(name, getattr(gradients, name))
    without = backend.backward(gy, saved, operands, input_gradient=False)
    assert without.x is None
    for name in gradients._fields[1:]:
        check(name, getattr(without, name))

    swept = backend.backward_update(gy, saved, operands, problem.lr, problem.delta_lr)
    for name in ("x", "A", "B", "bias"):
        check(name, getattr(swept, name))
    assert swept.delta is None
    assert swept.weight is None
    if case.delta:
        check("velocity after", operands.delta.velocity)
        check("delta after", operands.delta.delta)
    if case.base:
        check("weight after", operands.base.weight)
        check("merged", backend.merge(brought(problem.operands(), bring)))

    operands = brought(problem.operands(), bring)
    swept = backend.backward_update(gy, saved, operands, problem.lr, problem.delta_lr, input_gradient=False)
    assert swept.x is None
    for name in ("A", "B", "bias"):
        check(name, getattr(swept, name))
    if case.delta:
        check("velocity after", operands.delta.velocity)
        check("delta after", operands.delta.delta)
    if case.base:
        check("weight after", operands.base.weight)


def brought(operands, bring):
    """The operands with every array brought to a backend."""

    def part(values):
        if values is None:
            return None
        return type(values)(*[bring(v) if isinstance(v, np.ndarray) else v for v in values])

    return operands._replace(base=part(operands.base), low_rank=part(operands.low_rank), delta=part(operands.delta))


@pytest.mark.small
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(0, 5, 7, 1), (13, 8, 29, 8)], ids=str)
def test_the_reference_by_the_formulas(shape, dtype, transposed, case):
    if case.base or not transposed:
        run(shape, dtype, transposed, case, REFERENCE)


@pytest.mark.skipif(jit.JIT_DISABLED, reason="of compiled kernels")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 33, 70_001])
@pytest.mark.parametrize(
    ("operation", "arrays", "scalars"),
    [
        ("sgd_update", 2, (0.1,)),
        ("momentum_update", 3, (0.9, 0.1)),
        ("adamw_update", 4, (0.1, (0.9, 0.99), 1e-8, 0.02, 3)),
        ("add", 2, ()),
        ("scale", 1, (0.7,)),
        ("sum_of_squares", 1, ()),
    ],
)
def test_updates_by_the_reference(operation, arrays, scalars, size, dtype):
    given = abs(np.random.default_rng(5).standard_normal((arrays, 1, size))).astype(dtype)
    exact = given.astype(np.float64)
    result = getattr(BACKEND, operation)(*given, *scalars)
    expected = getattr(REFERENCE, operation)(*exact, *scalars)
    np.testing.assert_allclose(given, exact, rtol=3e-6 if dtype == "float32" else 1e-13, atol=1e-6)
    assert (result is None) == (expected is None)
    assert result is None or abs(result - expected) <= 1e-12 * expected


@pytest.mark.skipif(jit.JIT_DISABLED, reason="of compiled kernels")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ["mean_squared_error", "softmax_cross_entropy", "binary_cross_entropy"])
def test_losses_by_the_reference(loss, dtype):
    rng = np.random.default_rng(6)
    output = 5 * rng.standard_normal((70, 33)).astype(dtype)
    target = rng.integers(0, 33, 70) if loss.startswith("softmax") else rng.random((70, 33)).astype(dtype)
    value, gradient = getattr(BACKEND, loss)(output, target)
    expected, exact = getattr(REFERENCE, loss)(output.astype(np.float64), target)
    assert abs(value - expected) <= (1e-7 if dtype == "float32" else 1e-12) * abs(expected)
    assert gradient.dtype == output.dtype
    np.testing.assert_allclose(gradient, exact, rtol=1e-6 if dtype == "float32" else 1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_shapes(shape, dtype, transposed, case):
    if case.base or not transposed:
        run(shape, dtype, transposed, case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_shapes_of_many_blocks(shape, dtype, transposed, case):
    if case.base or not transposed:
        run(shape, dtype, transposed, case)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transposed", [False, True])
def test_accuracy_at_1024(dtype, transposed):
    run((256, 1024, 1024, 64), dtype, transposed, Case(train=True))


@pytest.mark.small
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(5, 20, 19, 2), (30, 33, 31, 3)])
def test_what_is_not_finite_reaches_only_what_depends_on_it(shape, bad, transposed):
    problem = Problem(shape, "float32", transposed, Case())
    problem.arrays["x"][3, 7] = bad
    problem.arrays["gy"][2, 5] = bad
    operands = problem.operands()
    with np.errstate(invalid="ignore"):
        expected = problem.formulas()
        y, saved = BACKEND.forward(problem.arrays["x"], operands, None, True)
        gradients = BACKEND.backward(problem.arrays["gy"], saved, operands)
        BACKEND.backward_update(problem.arrays["gy"], saved, operands, 0.1, 0.2)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected["y"]))
    np.testing.assert_array_equal(np.isfinite(gradients.x), np.isfinite(expected["x"]))
    after = operands.delta.delta.T if transposed else operands.delta.delta
    np.testing.assert_array_equal(np.isfinite(after), np.isfinite(expected["delta after"]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 40, 50, 3), (9, 300, 200, 3), (64, 300, 200, 3), (300, 300, 200, 3)])
def test_a_new_adapter_is_its_base_bit_for_bit(shape, transposed, dtype):
    problem = Problem(shape, dtype, transposed, Case())
    problem.arrays["D"][:] = 0
    problem.arrays["B"][:] = 0
    operands = problem.operands()
    adapted, _ = BACKEND.forward(problem.arrays["x"], operands, None, True)
    plain, _ = BACKEND.forward(problem.arrays["x"], operands._replace(low_rank=None, delta=None), None, True)
    np.testing.assert_array_equal(adapted, plain)
