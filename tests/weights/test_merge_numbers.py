"""The arithmetic of a merge: rounding, accumulation, order, and independence of blocks and threads."""

import ml_dtypes
import numpy as np
import pytest

from nblora.errors import FormatError
from nblora.kernels.common.jit import kernel
from nblora.kernels.weights import numbers as weights_numbers
from nblora.kernels.weights.codes import BFLOAT16, CODES, FLOAT16
from nblora.kernels.weights.numbers import encode_all
from nblora.weights import merge
from tests.weights.support import (
    DTYPES,
    exact_change,
    linear_factors,
    read_file,
    spacing,
    write_adapter,
    write_file,
)


@kernel
def decode(source, number, narrow, numbers):
    weights_numbers.decode(source, number, narrow, numbers)


NUMPY = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16}
BITS = np.arange(2**16, dtype=np.uint16)


def encoded(numbers, code):
    target = np.empty(len(numbers) * {0: 8, 1: 4, 2: 2, 3: 2}[code], np.uint8)
    scratch = np.empty(len(numbers), np.float32), np.empty(len(numbers), np.float32)
    encode_all(numbers, code, *scratch, target)
    return target


@pytest.mark.parametrize("working", [np.float32, np.float64])
@pytest.mark.parametrize("code", [FLOAT16, BFLOAT16])
def test_every_16_bit_number_is_read_exactly_and_written_back(code, working):
    numbers = np.empty(2**16, working)
    decode(BITS.view(np.uint8), code, np.empty(2**16, np.float32), numbers)
    with np.errstate(invalid="ignore"):  # signalling NaN
        reference = BITS.view(NUMPY[code]).astype(working)
    np.testing.assert_array_equal(numbers, reference)
    np.testing.assert_array_equal(np.signbit(numbers), np.signbit(reference))
    back = encoded(numbers, code).view(np.uint16)
    whole = ~np.isnan(reference)
    np.testing.assert_array_equal(back[whole], BITS[whole])
    assert np.isnan(back.view(NUMPY[code])[~whole].astype(np.float32)).all()


@pytest.mark.parametrize("code", [FLOAT16, BFLOAT16])
def test_float64_is_rounded_once_to_nearest_even(code, rng):
    with np.errstate(invalid="ignore"):
        exact = BITS.view(NUMPY[code]).astype(np.float64)
    exact = np.sort(exact[np.isfinite(exact)])
    ties = (exact[1:] + exact[:-1]) / 2
    # Nudges that float32 cannot hold: rounding to it on the way would make ties of them.
    cases = np.concatenate([ties, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40), rng.standard_normal(1000) * 1e-6])
    result = encoded(cases, code).view(NUMPY[code]).astype(np.float64)
    name = {FLOAT16: "F16", BFLOAT16: "BF16"}[code]
    error = abs(result - cases)
    below, above = np.searchsorted(exact, cases, "right") - 1, np.searchsorted(exact, cases, "left")
    np.testing.assert_array_equal(error, np.minimum(abs(exact[below] - cases), abs(exact[above] - cases)))
    even = encoded(ties, code).view(np.uint16)
    assert not (even[(ties != 0) & (ties != exact[1:])] & 1).any(), name


def test_overflow_becomes_infinity_and_nan_stays():
    for working in (np.float32, np.float64):
        numbers = np.array([65519.0, 65520.0, -65520.0, np.inf, -np.inf, np.nan, 1e30], working)
        result = encoded(numbers, FLOAT16).view(np.float16)
        np.testing.assert_array_equal(result, [65504, np.inf, -np.inf, np.inf, -np.inf, np.nan, np.inf])
    wide = np.array([3.3895e38, 3.4e38, 1e300, -1e300, np.inf, np.nan])
    result = encoded(wide, BFLOAT16).view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(result[1:], [np.inf, np.inf, -np.inf, np.inf, np.nan])
    assert np.isfinite(result[0])


@pytest.fixture
def layer(tmp_path, rng):
    """Makes a base of one 2-D weight and an adapter of rank 5 on it, and returns paths and exact numbers."""

    def make(dtype="BF16", shape=(37, 1101), factor=np.float32, rank=5, alpha=7, base_scale=1.0, **config):
        W = (rng.standard_normal(shape) * base_scale).astype(DTYPES[dtype])
        base = write_file(tmp_path / "base.safetensors", {"lin.weight": W})
        tensors = linear_factors(rng, "lin", *shape, rank=rank, dtype=factor)
        adapter = write_adapter(tmp_path / "adapter", tensors, r=rank, lora_alpha=alpha, **config)
        return base, adapter, W.astype(np.float64), exact_change(tensors, "lin", alpha / rank)

    return make


@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_16_bit_result_is_the_exact_sum_rounded_once(dtype, rank, layer, tmp_path):
    # Enough entries for float32 sums to land on the wrong side of a tie, had they the last word.
    base, adapter, W, change = layer(dtype, shape=(211, 1301), rank=rank)
    merge(base, adapter, tmp_path / "out.safetensors")
    result = read_file(tmp_path / "out.safetensors")["lin.weight"].astype(np.float64)
    error, larger = abs(result - (W + change)), np.maximum(abs(W), abs(change))
    assert (error <= spacing(larger, dtype)).all()
    assert (error <= 0.5 * spacing(W + change, dtype) * (1 + 1e-9)).all()


def test_float32_result_is_rounded_from_float64(layer, tmp_path):
    base, adapter, W, change = layer("F32")
    merge(base, adapter, tmp_path / "out.safetensors")
    result = read_file(tmp_path / "out.safetensors")["lin.weight"].astype(np.float64)
    assert (abs(result - (W + change)) <= 0.5 * spacing(W + change, "F32") * (1 + 1e-7)).all()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stored", [(1301, 700), (700, 1301)])
def test_bits_and_report_do_not_depend_on_blocks_or_threads(dora, stored, tmp_path, rng):
    W = rng.standard_normal(stored).astype(np.float32)
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W})
    tensors = linear_factors(rng, "lin", 700, 1301, rank=9)
    if dora:
        tensors["lin.lora_magnitude_vector"] = rng.uniform(1, 2, 700).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", tensors, r=9, use_dora=dora)
    results = []
    for memory, threads in (("1MiB", 1), ("3MiB", 2), ("64MiB", 1), ("64MiB", 3), ("1GiB", 7)):
        out = tmp_path / "out.safetensors"
        report = merge(base, adapter, out, dtype="bfloat16", max_memory=memory, threads=threads)
        results.append((out.read_bytes(), report.tensors))
    assert all(result == results[0] for result in results[1:])


def test_factors_larger_than_the_memory_are_read_again(tmp_path, rng):
    W = rng.standard_normal((900, 2100)).astype(np.float32)
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W})
    tensors = linear_factors(rng, "lin", 900, 2100, rank=150)
    adapter = write_adapter(tmp_path / "adapter", tensors, r=150)
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    merge(base, adapter, small, max_memory="1MiB")
    merge(base, adapter, large, max_memory="1GiB")
    assert small.read_bytes() == large.read_bytes()
    exact = W + exact_change(tensors, "lin", 8 / 150)
    np.testing.assert_allclose(read_file(small)["lin.weight"], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_report_measures_change_share_loss_and_infinities(dtype, tmp_path, rng):
    W = rng.standard_normal((40, 90))
    W[3, 4], W[5, 6] = np.inf, np.nan
    W = W.astype(DTYPES[dtype])
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W, "other": np.zeros(3, np.float32)})
    tensors = linear_factors(rng, "lin", 40, 90, rank=2, scale=0.02)
    tensors["lin.lora_B.weight"][7] = 0  # a row without a change is not lost
    adapter = write_adapter(tmp_path / "adapter", tensors, r=2, lora_alpha=2)
    report = merge(base, adapter, tmp_path / "out.safetensors")
    (tensor,) = report.tensors
    assert (tensor.name, tensor.shape, tensor.not_finite) == ("lin.weight", (40, 90), 2)
    assert np.isnan(tensor.base_norm)
    assert report.copied == 1
    W[3, 4] = W[5, 6] = 0.5
    write_file(base, {"lin.weight": W, "other": np.zeros(3, np.float32)})
    (tensor,) = merge(base, adapter, tmp_path / "out.safetensors").tensors
    change = exact_change(tensors, "lin", 1.0)
    result = read_file(tmp_path / "out.safetensors")["lin.weight"]
    lost = (change != 0) & (result == W)
    assert tensor.lost_fraction == lost.mean()
    assert (lost.mean() > 0.05) == (dtype in ("F16", "BF16"))
    np.testing.assert_allclose(tensor.change_norm, np.linalg.norm(change), rtol=1e-6)
    np.testing.assert_allclose(tensor.base_norm, np.linalg.norm(W.astype(np.float64)), rtol=1e-12)
    np.testing.assert_allclose(tensor.share, tensor.change_norm / tensor.base_norm)


def test_several_adapters_and_weights_add_up(tmp_path, rng):
    W = rng.standard_normal((12, 9))
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W})
    adapters, exact = [], W.copy()
    for at, weight in enumerate([0.5, -2.0, 1.0]):
        tensors = linear_factors(rng, "lin", 12, 9, rank=at + 1, dtype=np.float64)
        folder = write_adapter(tmp_path / f"a{at}", tensors, r=at + 1, lora_alpha=3, use_rslora=at == 1)
        adapters.append((folder, weight))
        exact += weight * exact_change(tensors, "lin", 3 / (np.sqrt(at + 1) if at == 1 else at + 1))
    merge(base, adapters, tmp_path / "out.safetensors")
    np.testing.assert_allclose(read_file(tmp_path / "out.safetensors")["lin.weight"], exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dora_first", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_dora_beside_a_plain_adapter_keeps_the_order(dora_first, weight, tmp_path, rng):
    W = rng.standard_normal((12, 9))
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W})
    plain = linear_factors(rng, "lin", 12, 9, dtype=np.float64)
    dora = linear_factors(rng, "lin", 12, 9, dtype=np.float64)
    magnitude = dora["lin.lora_magnitude_vector"] = rng.uniform(0.5, 2, 12)
    folders = [write_adapter(tmp_path / "plain", plain), write_adapter(tmp_path / "dora", dora, use_dora=True)]
    plain_change, dora_change = exact_change(plain, "lin", 2), exact_change(dora, "lin", 2)
    factor = (magnitude / np.linalg.norm(W + dora_change, axis=1))[:, None]

    def with_dora(X):
        return X + weight * (factor * (X + dora_change) - X)

    order = [(folders[1], weight), (folders[0], 1.0)] if dora_first else [(folders[0], 1.0), (folders[1], weight)]
    exact = with_dora(W) + plain_change if dora_first else with_dora(W + plain_change)
    merge(base, order, tmp_path / "out.safetensors")
    np.testing.assert_allclose(read_file(tmp_path / "out.safetensors")["lin.weight"], exact, rtol=0, atol=1e-12)


def test_two_dora_adapters_on_one_layer_are_refused(tmp_path, rng):
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": rng.standard_normal((5, 5))})
    folders = []
    for name in "xy":
        tensors = linear_factors(rng, "lin", 5, 5, rank=2) | {"lin.lora_magnitude_vector": np.ones(5)}
        folders.append(write_adapter(tmp_path / name, tensors, r=2, use_dora=True))
    with pytest.raises(FormatError, match=r"both DoRA on lin\.weight"):
        merge(base, folders, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F32", "float16"), ("F16", "bfloat16"), ("F64", "float32"), ("BF16", "float64")]
)
def test_dtype_converts_every_floating_tensor(stored, dtype, tmp_path, rng):
    numbers = np.array([[0.0, -0.0, 1.5], [np.inf, -np.inf, 3e-5]]).astype(DTYPES[stored])
    counts = np.arange(4)
    base = write_file(tmp_path / "base.safetensors", {"n": counts, "x": numbers, "lin.weight": numbers + 1})
    adapter = write_adapter(tmp_path / "a", linear_factors(rng, "lin", 2, 3, rank=1), r=1, lora_alpha=0)
    merge(base, adapter, tmp_path / "out.safetensors", dtype=dtype)
    result = read_file(tmp_path / "out.safetensors")
    target = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(dtype) or np.dtype(dtype)
    assert result["x"].tobytes() == numbers.astype(target).tobytes()
    assert result["lin.weight"].dtype == target
    np.testing.assert_array_equal(result["n"], counts)
    assert result["n"].dtype == np.int64


@pytest.mark.small
@pytest.mark.parametrize("code", [FLOAT16, BFLOAT16, CODES["F32"], CODES["F64"]])
def test_small_numbers_go_through_the_kernels_and_back(code):
    numbers = np.array([0.0, 1.0, -2.5, 6.1e-5, 1e-7, 300.0], np.float64)
    stored = encoded(numbers, code)
    back = np.empty(6)
    decode(stored, code, np.empty(6, np.float32), back)
    expected = {FLOAT16: np.float16, BFLOAT16: ml_dtypes.bfloat16, 1: np.float32, 0: np.float64}[code]
    np.testing.assert_array_equal(back, numbers.astype(expected).astype(np.float64))


@pytest.mark.small
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_small_merge_equals_the_formula(dtype, tmp_path, rng):
    W = rng.standard_normal((5, 7)).astype(DTYPES[dtype])
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W})
    tensors = linear_factors(rng, "lin", 5, 7, rank=2) | {"lin.lora_magnitude_vector": np.linspace(1, 2, 5)}
    adapter = write_adapter(tmp_path / "a", tensors, r=2, use_dora=True)
    merge(base, adapter, tmp_path / "out.safetensors", threads=1)
    moved = W.astype(np.float64) + exact_change(tensors, "lin", 4)
    exact = np.linspace(1, 2, 5)[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    result = read_file(tmp_path / "out.safetensors")["lin.weight"].astype(np.float64)
    tolerance = 1e-12 if dtype == "F64" else 0.51 * spacing(exact, dtype)
    assert (abs(result - exact) <= tolerance).all()
