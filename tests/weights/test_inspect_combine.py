"""Into adapters and across them: inspect and combine."""

import json

import numpy as np
import pytest

from nblora.errors import FormatError
from nblora.formats import PeftAdapter
from nblora.weights import combine, inspect, merge
from tests.weights.support import FIXTURES, exact_change, linear_factors, read_file, write_adapter, write_file


def dense(folder, module):
    """s·B·A of a module as a float64 matrix."""
    with PeftAdapter(folder) as adapter:
        found = adapter.modules[module]
        B, A = adapter.file.read_wide(found.B.name), adapter.file.read_wide(found.A.name)
        return found.scaling * B.reshape(len(B), -1) @ A.reshape(len(A), -1)


@pytest.mark.parametrize(
    "name",
    ["mlp_r4", "conv2d_r4", "made_embedding", "made_patterns_rslora", "linear_r4_bf16_adapter", "made_high_rank"],
)
def test_inspect_equals_the_dense_decomposition(name):
    report = inspect(FIXTURES / name)
    assert report.modules
    for module in report.modules:
        change = dense(FIXTURES / name, module.name)
        values = np.linalg.svd(change, compute_uv=False)[: len(module.singular_values)]
        np.testing.assert_allclose(module.singular_values, values, atol=1e-12 * values[0])
        np.testing.assert_allclose(module.norm, np.linalg.norm(change), rtol=1e-12)
        np.testing.assert_allclose(module.stable_rank, (np.linalg.norm(change) / values[0]) ** 2, rtol=1e-12)
        assert change.shape == (module.out_features, module.in_features)
    assert report.parameters == sum(a.size for a in read_file(FIXTURES / name / "adapter_model.safetensors").values())
    assert json.loads(json.dumps(report.as_dict()))["modules"][0]["name"] == report.modules[0].name
    assert all(module.name in report.table() for module in report.modules)


def test_inspect_counts_what_is_not_finite_and_copes_with_zeros(tmp_path, rng):
    tensors = linear_factors(rng, "a", 5, 6) | linear_factors(rng, "b", 5, 6)
    tensors["a.lora_A.weight"][0, 0] = np.nan
    tensors["b.lora_B.weight"][:] = 0
    first, second = inspect(write_adapter(tmp_path / "x", tensors)).modules
    assert (first.not_finite, np.isnan(first.norm)) == (1, True)
    assert (second.norm, second.stable_rank, second.not_finite) == (0, 0, 0)


def test_inspect_draws_a_picture(tmp_path):
    report = inspect(FIXTURES / "mlp_r4")
    report.plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="picture's name"):
        report.plot(tmp_path / "p.docx")


def test_combine_is_the_weighted_sum(tmp_path, rng):
    first = linear_factors(rng, "x", 9, 7) | linear_factors(rng, "only", 3, 4, rank=2)
    second = linear_factors(rng, "x", 9, 7, rank=3) | linear_factors(rng, "y.x", 5, 5, rank=3)
    one = write_adapter(tmp_path / "one", first, rank_pattern={"only": 2}, target_modules=["x", "only"])
    two = write_adapter(tmp_path / "two", second, r=3, lora_alpha=5, use_rslora=True, target_modules=["x"])
    report = combine([(one, 0.5), (two, -1.5)], tmp_path / "sum", dtype="float64")
    exact = {
        "x": 0.5 * exact_change(first, "x", 2) - 1.5 * exact_change(second, "x", 5 / np.sqrt(3)),
        "only": 0.5 * exact_change(first, "only", 4), "y.x": -1.5 * exact_change(second, "y.x", 5 / np.sqrt(3)),
    }  # fmt: skip
    assert {module.name: (module.rank, module.error) for module in report.modules} == {
        "x": (7, 0),
        "only": (2, 0),
        "y.x": (3, 0),
    }
    for name, change in exact.items():
        np.testing.assert_allclose(dense(tmp_path / "sum", name), change, rtol=0, atol=1e-13)


def test_combining_one_adapter_keeps_its_bits(tmp_path):
    combine(FIXTURES / "made_patterns", tmp_path / "same")
    before, after = (
        read_file(folder / "adapter_model.safetensors") for folder in (FIXTURES / "made_patterns", tmp_path / "same")
    )
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].tobytes() == array.tobytes()
    for module in inspect(FIXTURES / "made_patterns").modules:
        np.testing.assert_allclose(
            dense(tmp_path / "same", module.name), dense(FIXTURES / "made_patterns", module.name), rtol=1e-14
        )


@pytest.mark.parametrize("name", ["conv2d_r4", "made_embedding", "made_lora_bias"])
def test_combined_kinds_merge_as_their_parts_do(name, tmp_path):
    base = FIXTURES / name / "base.safetensors"
    combine([(FIXTURES / name, 0.75), (FIXTURES / name, -0.5)], tmp_path / "sum", dtype="float64")
    merge(base, tmp_path / "sum", tmp_path / "one.safetensors", dtype="float64")
    merge(base, [(FIXTURES / name, 0.75), (FIXTURES / name, -0.5)], tmp_path / "two.safetensors", dtype="float64")
    ours, theirs = read_file(tmp_path / "one.safetensors"), read_file(tmp_path / "two.safetensors")
    for key, array in theirs.items():
        np.testing.assert_allclose(ours[key], array, rtol=0, atol=1e-13)


def test_recompression_is_the_best_of_its_rank(tmp_path, rng):
    adapters = [write_adapter(tmp_path / str(at), linear_factors(rng, "x", 30, 20)) for at in range(3)]
    exact = sum(dense(adapter, "x") for adapter in adapters)
    values = np.linalg.svd(exact, compute_uv=False)
    report = combine(adapters, tmp_path / "sum", rank=5, dtype="float64")
    best = np.sqrt((values[5:] ** 2).sum()) / np.linalg.norm(values)
    error = np.linalg.norm(dense(tmp_path / "sum", "x") - exact) / np.linalg.norm(exact)
    np.testing.assert_allclose([report.modules[0].error, error], best, rtol=1e-9)
    assert report.modules[0].rank == 5
    assert combine(adapters, tmp_path / "whole", rank=12).modules[0].error == 0


def test_what_does_not_add_up_is_refused(tmp_path, rng):
    plain = write_adapter(tmp_path / "plain", linear_factors(rng, "x", 5, 6))
    dora = write_adapter(
        tmp_path / "dora", {**linear_factors(rng, "x", 5, 6), "x.lora_magnitude_vector": np.ones(5)}, use_dora=True
    )
    other = write_adapter(tmp_path / "other", linear_factors(rng, "x", 6, 6))
    heads = [
        write_adapter(tmp_path / f"h{at}", {**linear_factors(rng, "x", 5, 6), "head.weight": np.full((2, 2), at)})
        for at in (1.0, 2.0)
    ]
    for adapters, match in (
        ([plain, dora], "DoRA"),
        ([plain, other], "linear 6×6"),
        (heads, r"replace head\.weight by different numbers"),
        ([plain, (heads[0], 0.5)], "cannot have the weight 0.5"),
    ):
        with pytest.raises(FormatError, match=match):
            combine(adapters, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    with pytest.raises(FormatError, match="is the output and the input"):
        combine([plain, other], plain)
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank is"):
            combine([plain], tmp_path / "sum", rank=rank)
    combine([plain, heads[0]], tmp_path / "sum")
    np.testing.assert_array_equal(
        read_file(tmp_path / "sum" / "adapter_model.safetensors")["base_model.model.head.weight"], np.ones((2, 2))
    )


def test_combination_of_16_bit_adapters_is_rounded_once(tmp_path, rng):
    tensors = linear_factors(rng, "x", 50, 60, dtype=np.float16)
    adapter = write_adapter(tmp_path / "a", tensors)
    combine([(adapter, 1.0), (adapter, 0.3)], tmp_path / "sum")
    stored = read_file(tmp_path / "sum" / "adapter_model.safetensors")
    B = tensors["x.lora_B.weight"]
    assert stored["base_model.model.x.lora_A.weight"].dtype == np.float16
    np.testing.assert_array_equal(stored["base_model.model.x.lora_B.weight"][:, :4], B)
    exact = (B.astype(np.float64) * 0.3).astype(np.float16)
    np.testing.assert_array_equal(stored["base_model.model.x.lora_B.weight"][:, 4:], exact)
    write_file(tmp_path / "base.safetensors", {"x.weight": np.zeros((50, 60))})
    merge(tmp_path / "base.safetensors", tmp_path / "sum", tmp_path / "out.safetensors")
    np.testing.assert_allclose(
        read_file(tmp_path / "out.safetensors")["x.weight"], dense(tmp_path / "sum", "x"), atol=1e-14
    )
