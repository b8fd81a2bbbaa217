"""Merges of adapters that PEFT wrote, against PEFT's own merge in float64."""

import numpy as np
import pytest

from nblora.errors import FormatError
from nblora.weights import merge
from tests.weights.support import FIXTURES, read_file, read_model, spacing

FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
SMALL = {"linear_r4_dora", "made_gpt2_dora", "mlp_bf16_all", "made_bias_all_lora_bias", "made_embedding_dora"}
MERGEABLE = [
    pytest.param(name, marks=pytest.mark.small if name in SMALL else ()) for name in FOLDERS if name != "conv2d_grouped"
]
TIED = {"made_model_gpt2_mixed": "transformer.wte.weight", "made_model_llama_tied": "model.embed_tokens.weight"}


def base_of(name):
    return next(path for path in (FIXTURES / name / "base", FIXTURES / name / "base.safetensors") if path.exists())


def expected_of(name):
    with np.load(FIXTURES / name / "io.npz") as arrays:
        merged = {key.removeprefix("merged/"): arrays[key] for key in arrays.files if key.startswith("merged/")}
    for key, array in read_file(FIXTURES / name / "adapter_model.safetensors").items():
        if "lora_" not in key:  # a tensor that the adapter brings whole, with or without factors beside it
            merged.setdefault(key.removeprefix("base_model.model.").replace("base_layer.", ""), array)
    if name in TIED:  # stored under one name, as transformers stores tied weights
        np.testing.assert_array_equal(merged.pop("lm_head.weight"), merged[TIED[name]])
    return merged


@pytest.mark.parametrize("name", MERGEABLE)
def test_float64_merge_equals_peft(name, tmp_path):
    reference = expected_of(name)
    report = merge(base_of(name), FIXTURES / name, tmp_path / "out", dtype="float64")
    computed, base = read_model(tmp_path / "out"), read_model(base_of(name))
    assert computed.keys() == base.keys()
    changed = {tensor.name for tensor in report.tensors}
    for key, array in computed.items():
        assert array.dtype == np.float64
        exact = reference[key] if key in reference else base[key].astype(np.float64)
        np.testing.assert_allclose(array, exact, rtol=0, atol=1e-12)
        assert key in changed or np.array_equal(exact, base[key].astype(np.float64))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_16_bit_merge_is_the_exact_value_rounded_once(name, dtype, tmp_path):
    reference = expected_of(name)
    merge(base_of(name), FIXTURES / name, tmp_path / "out", dtype={"F16": "float16", "BF16": "bfloat16"}[dtype])
    for key, array in read_model(tmp_path / "out").items():
        if key in reference:
            error = abs(array.astype(np.float64) - reference[key])
            assert (error <= 0.5 * spacing(reference[key], dtype) * (1 + 1e-9)).all()


def test_grouped_convolution_is_refused_by_name(tmp_path):
    with pytest.raises(FormatError, match=r"conv\.weight belongs to a grouped convolution \(groups=2\)"):
        merge(base_of("conv2d_grouped"), FIXTURES / "conv2d_grouped", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_stored_bfloat16_stays_bfloat16(tmp_path):
    out = tmp_path / "out.safetensors"
    merge(base_of("mlp_bf16_all"), FIXTURES / "mlp_bf16_all", out)
    reference, base = expected_of("mlp_bf16_all"), read_file(base_of("mlp_bf16_all"))
    for key, array in read_file(out).items():
        assert array.dtype == base[key].dtype
        if key in reference:
            change = reference[key] - base[key].astype(np.float64)
            unit = spacing(np.maximum(abs(base[key].astype(np.float64)), abs(change)), "BF16")
            assert (abs(array.astype(np.float64) - reference[key]) <= unit).all()
        else:
            np.testing.assert_array_equal(array, base[key])
