"""The figures of a report: medians and ratios, the machine's limit, what a result may be off by."""

import numpy as np
import pytest

from nblora.bench.cases import CHECKED_LR, DELTA_SCALING, MOMENTUM, SCALING, Case, faults, make_arrays, parse_case
from nblora.bench.cases import reference as compute
from nblora.bench.limits import Machine, limit_seconds
from nblora.bench.summary import CaseResult, spread

TOLERANCE = 1e-12


def test_spread_is_median_and_inclusive_quartiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert spread(values).median == 3.0
    assert (spread(values).q1, spread(values).q3) == (2.0, 4.0)
    even = [1.0, 2.0, 3.0, 10.0]
    assert spread(even).median == 2.5
    np.testing.assert_allclose([spread(even).q1, spread(even).q3], np.percentile(even, [25, 75]), rtol=TOLERANCE)


def test_spread_of_one_value():
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_taken_pair_by_pair():
    """A machine that is slow in one round slows both of its pair: the ratio does not see it."""
    own, peer = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0]
    result = CaseResult(Case("step", 8, 16, 16), seconds={"nblora": own, "numpy": peer})
    assert result.ratio("numpy") == (2.0, 2.0, 2.0)
    assert result.ratio("jax") is None


@pytest.mark.parametrize(("kind", "flops", "sweeps"), [("step", 6, 7), ("forward", 2, 2), ("lora-step", 4, 2)])
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float64", 8)])
def test_limit_formula(kind, flops, sweeps, dtype, itemsize):
    case = Case(kind, 100, 30, 50, 4, dtype)
    machine = Machine(flops=1e9, bandwidth=1e8)
    products = flops * 100 * (30 * 50 + 4 * (30 + 50)) / 1e9
    memory = sweeps * 30 * 50 * itemsize / 1e8
    assert limit_seconds(case, machine) == pytest.approx(max(products, memory), rel=TOLERANCE)


def test_limit_turns_from_memory_to_products_as_samples_grow():
    few, many = Case("step", 1, 1024, 1024), Case("step", 2048, 1024, 1024)
    of_memory, of_products = Machine(flops=float("inf"), bandwidth=33e9), Machine(flops=186e9, bandwidth=float("inf"))
    both = Machine(of_products.flops, of_memory.bandwidth)
    assert limit_seconds(few, both) == limit_seconds(few, of_memory)
    assert limit_seconds(many, both) == limit_seconds(many, of_products)


def test_fraction_of_the_limit_is_limit_over_median():
    case, machine = Case("step", 64, 128, 128), Machine(1e9, 1e9)
    limit = limit_seconds(case, machine)
    result = CaseResult(case, seconds={"nblora": [2 * limit] * 3, "numpy": [4 * limit] * 3})
    assert result.fraction(machine) == pytest.approx(0.5)
    assert result.fraction(machine, "numpy") == pytest.approx(0.25)
    assert result.fraction(None) is None


def test_best_of_two_measurements_is_taken_figure_by_figure():
    best = Machine(1.0, 5.0, "numpy", "numpy").best(Machine(2.0, 4.0, "torch", "torch"))
    assert (best.flops, best.flops_by, best.bandwidth, best.bandwidth_by) == (2.0, "torch", 5.0, "numpy")


@pytest.mark.parametrize(
    ("text", "sizes"), [("64,768,512", (64, 768, 512, 8)), (" 8, 16,4 ", (8, 16, 4, 4)), ("1,2,3,2", (1, 2, 3, 2))]
)
def test_parse_case(text, sizes):
    assert parse_case(text) == sizes


@pytest.mark.parametrize("text", ["", "8,16", "8,16,16,2,3", "8;16;16", "8,16,x", "0,16,16", "8,16,16,17", "-8,16,16"])
def test_parse_case_refuses(text):
    with pytest.raises(ValueError):
        parse_case(text)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"kind": "sideways"}, "kind"), ({"dtype": "float16"}, "dtype"), ({"layout": "round"}, "layout"), ({"n": 0}, "n")],
)
def test_case_refuses(change, named):
    with pytest.raises(ValueError, match=named):
        Case(**({"kind": "step", "n": 8, "in_features": 16, "out_features": 16} | change))


def test_arrays_are_the_same_for_the_same_seed_and_never_zero():
    case = Case("step", 8, 12, 10, 3, layout="fullyconnected")
    one, two, other = make_arrays(case, 1), make_arrays(case, 1), make_arrays(case, 2)
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
        assert np.all(array != 0)
        assert not np.array_equal(array, other[name])
    assert one["W"].shape == one["D"].shape == one["V"].shape == (10, 12)


@pytest.mark.parametrize("layout", ["dense", "fullyconnected"])
def test_reference_against_loops(layout):
    """Every value from the equations, element by element."""
    case = Case("step", 3, 5, 4, 2, "float64", layout)
    arrays = make_arrays(case)
    x, g, b, A, B = (arrays[name] for name in ("x", "g", "b", "A", "B"))
    W, D, V = (arrays[name].T if layout == "fullyconnected" else arrays[name] for name in ("W", "D", "V"))
    s, c, m, lr = SCALING, DELTA_SCALING, MOMENTUM, CHECKED_LR
    samples, ins, outs, ranks = range(3), range(5), range(4), range(2)
    want = {
        "y": [
            [
                b[o] + sum(x[n, i] * (W[i, o] + c * D[i, o] + s * sum(A[i, r] * B[r, o] for r in ranks)) for i in ins)
                for o in outs
            ]
            for n in samples
        ],
        "grad_input": [
            [
                sum(g[n, o] * (W[i, o] + c * D[i, o] + s * sum(A[i, r] * B[r, o] for r in ranks)) for o in outs)
                for i in ins
            ]
            for n in samples
        ],
        "A": [
            [A[i, r] - lr * s * sum(x[n, i] * g[n, o] * B[r, o] for n in samples for o in outs) for r in ranks]
            for i in ins
        ],
        "B": [
            [B[r, o] - lr * s * sum(x[n, i] * A[i, r] * g[n, o] for n in samples for i in ins) for o in outs]
            for r in ranks
        ],
        "V": [[m * V[i, o] + (1 - m) * c * sum(x[n, i] * g[n, o] for n in samples) for o in outs] for i in ins],
    }
    want["D"] = [[D[i, o] - lr * want["V"][i][o] for o in outs] for i in ins]
    got = compute(case, arrays)
    assert set(got) == set(want)
    for name, value in want.items():
        stored = got[name].T if layout == "fullyconnected" and name in "DV" else got[name]
        np.testing.assert_allclose(stored, value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["y", "grad_input", "A", "B", "D", "V"])
def test_faults_finds_a_wrong_result(name, dtype):
    """A part in a hundred of an output, or of how far a parameter should have moved, is a fault."""
    case = Case("step", 16, 24, 20, 4, dtype)
    arrays = make_arrays(case)
    right = compute(case, arrays)
    got = {key: value.astype(dtype) for key, value in right.items()}
    assert faults(case, arrays, right, got) == []
    scale = np.max(np.abs(right[name] - arrays[name])) if name in "ABD" else np.max(np.abs(right[name]))
    got[name] = got[name].copy()
    got[name][1, 1] += 0.01 * scale
    found = faults(case, arrays, right, got)
    assert len(found) == 1
    assert found[0].startswith(f"{name} is off by")


def test_faults_finds_what_is_missing_misshapen_of_another_dtype_or_nan():
    case = Case("forward", 4, 6, 5, 2)
    arrays = make_arrays(case)
    right = compute(case, arrays)
    y = right["y"].astype(np.float32)
    broken = y.copy()
    broken[0, 0] = np.nan
    assert faults(case, arrays, right, {"y": y}) == []
    assert faults(case, arrays, right, {}) == ["y is missing"]
    assert "shape" in faults(case, arrays, right, {"y": y.T})[0]
    assert "dtype" in faults(case, arrays, right, {"y": right["y"]})[0]
    assert "off by nan" in faults(case, arrays, right, {"y": broken})[0]
