"""Out again, and whether it is in: unmerge and verify."""

import json
import os

import numpy as np
import pytest

from nblora.errors import FormatError
from nblora.weights import combine, merge, unmerge, verify
from nblora.weights.verification import Verdict
from tests.weights.support import (
    DTYPES,
    FIXTURES,
    exact_change,
    linear_factors,
    read_file,
    read_header,
    snapshot,
    write_adapter,
    write_file,
)

KEPT = [
    "mlp_r4", "mlp_bf16_all", "conv2d_r4_dora", "gpt2_conv1d_r4", "made_embedding_dora", "made_bias_all_lora_bias",
    "made_model_llama_tied", "made_model_gpt2_mixed", "made_modules_to_save",
]  # fmt: skip


def base_of(name):
    return next(path for path in (FIXTURES / name / "base", FIXTURES / name / "base.safetensors") if path.exists())


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"shard_size": "700B", "dtype": "float64"}])
@pytest.mark.parametrize("name", KEPT)
def test_kept_originals_bring_the_base_back_byte_by_byte(name, options, tmp_path):
    base = base_of(name)
    merge(base, FIXTURES / name, tmp_path / "merged", keep_original=True, **options)
    before = snapshot(tmp_path / "merged")
    report = unmerge(tmp_path / "merged", tmp_path / "back")
    assert report.exact
    assert snapshot(tmp_path / "merged") == before
    back = snapshot(tmp_path / "back")
    assert list(back.values()) == list(snapshot(base).values())
    if base.is_dir():
        assert sorted(os.listdir(base)) == sorted(os.listdir(tmp_path / "back"))
    assert verify(tmp_path / "merged", FIXTURES / name).verdict is Verdict.YES


@pytest.mark.small
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_subtraction_says_how_far_off_it_is(dtype, tmp_path, rng):
    W = rng.standard_normal((31, 33)).astype(DTYPES[dtype])
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W, "x": np.arange(3)})
    adapter = write_adapter(tmp_path / "a", linear_factors(rng, "lin", 31, 33))
    merge(base, (adapter, 0.5), tmp_path / "merged.safetensors")
    report = unmerge(tmp_path / "merged.safetensors", tmp_path / "back.safetensors", (adapter, 0.5))
    error = abs(read_file(tmp_path / "back.safetensors")["lin.weight"].astype(np.float64) - W.astype(np.float64))
    assert report.exact is False
    assert 0 < error.max() <= report.off_by * (1 + 1e-9)
    # An estimate: errors of two roundings, spread evenly.
    assert 0.4 < np.sqrt((error**2).mean()) / report.off_by_rms < 1.5
    assert "off by at most" in report.table()


@pytest.mark.parametrize(("name", "match"), [("linear_r4_dora", "DoRA"), ("mlp_r4", "head.bias whole")])
def test_what_cannot_be_subtracted_is_refused(name, match, tmp_path):
    merge(base_of(name), FIXTURES / name, tmp_path / "merged.safetensors")
    with pytest.raises(FormatError, match=match):
        unmerge(tmp_path / "merged.safetensors", tmp_path / "back.safetensors", FIXTURES / name)
    with pytest.raises(ValueError, match="no originals beside it"):
        unmerge(tmp_path / "merged.safetensors", tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


@pytest.mark.parametrize("name", ["linear_r4", "made_model_llama_tied", "mlp_bf16_all"])
def test_a_flipped_bit_of_an_original_is_not_restored(name, tmp_path, rng):
    merge(base_of(name), FIXTURES / name, tmp_path / "merged", keep_original=True)
    kept = next(tmp_path.rglob("*.nblora-originals"))
    whole = kept.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in [start, len(whole) - 1, *rng.integers(start, len(whole), 10)]:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << int(rng.integers(8))
        kept.write_bytes(spoiled)
        with pytest.raises(FormatError, match=r"the original of .* was damaged"):
            unmerge(tmp_path / "merged", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def merged_as_by_0_1(tmp_path, **more):
    """A merge whose originals have no digests, as nblora 0.1.0 wrote them, and `more` tensors."""
    merge(base_of("linear_r4"), FIXTURES / "linear_r4", tmp_path / "merged", keep_original=True)
    kept = next(tmp_path.rglob("*.nblora-originals"))
    header, _ = read_header(kept)
    record = json.loads(header["__metadata__"]["nblora-originals"]) | {"version": 1}
    del record["digests"]
    write_file(kept, read_file(kept) | more, {"nblora-originals": json.dumps(record)})
    return tmp_path / "merged"


def test_originals_without_digests_restore_as_before(tmp_path):
    unmerge(merged_as_by_0_1(tmp_path), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == base_of("linear_r4").read_bytes()


def test_an_original_without_a_place_is_refused(tmp_path):
    with pytest.raises(FormatError, match="extra has 0 places"):
        unmerge(merged_as_by_0_1(tmp_path, extra=np.ones(2, np.float32)), tmp_path / "back")


def test_originals_of_another_merge_or_maker_are_refused(tmp_path, rng):
    for name in ("linear_r4", "mlp_r4"):
        merge(base_of(name), FIXTURES / name, tmp_path / name, keep_original=True)
    with pytest.raises(FormatError, match="does not belong"):
        unmerge(tmp_path / "linear_r4", tmp_path / "back", originals=tmp_path / "mlp_r4.nblora-originals")
    plain = write_file(tmp_path / "plain", {"proj.weight": np.ones((6, 8), np.float32)})
    with pytest.raises(FormatError, match="not a file of originals"):
        unmerge(tmp_path / "linear_r4", tmp_path / "back", originals=plain)
    record = {
        "version": 1,
        "headers": {"../x": "{}"},
        "index": None,
        "index_text": "",
        "config_text": None,
        "adapters": [],
    }
    write_file(plain, {"proj.weight": np.ones((6, 8), np.float32)}, {"nblora-originals": json.dumps(record)})
    with pytest.raises(FormatError, match="no usable record"):
        unmerge(tmp_path / "linear_r4", tmp_path / "back", originals=plain)
    assert not (tmp_path / "back").exists()


@pytest.fixture
def trio(tmp_path, rng):
    """A base, an adapter, and its merge."""
    W = rng.standard_normal((30, 32)).astype(np.float32)
    base = write_file(tmp_path / "base.safetensors", {"lin.weight": W, "other.weight": W[:3]})
    adapter = write_adapter(tmp_path / "a", linear_factors(rng, "lin", 30, 32))
    merge(base, adapter, tmp_path / "merged.safetensors")
    return base, adapter, tmp_path / "merged.safetensors"


@pytest.mark.small
def test_verify_tells_merged_from_unmerged_and_from_another(trio, tmp_path, rng):
    base, adapter, merged = trio
    report = verify(merged, adapter, base)
    assert (report.verdict, report.exit_code, report.tensors[0].finding) == (Verdict.YES, 0, "exact")
    report = verify(base, adapter, base)
    assert (report.exit_code, report.tensors[0].finding, report.tensors[0].contained) == (1, "absent", 0.0)
    other = write_adapter(tmp_path / "b", linear_factors(rng, "lin", 30, 32))
    report = verify(merged, other, base)
    assert (report.exit_code, report.tensors[0].finding) == (1, "different")
    assert verify(merged, (adapter, 2.0), base).exit_code == 1
    assert verify(merged, [adapter, (adapter, 0.0)], base).exit_code == 0


@pytest.mark.small
def test_verify_sees_a_single_flipped_bit(trio):
    base, adapter, merged = trio
    data = bytearray(merged.read_bytes())
    data[-(3 * 32 * 4) - 8] ^= 1
    merged.write_bytes(data)
    report = verify(merged, adapter, base)
    assert (report.exit_code, report.tensors[0].finding, report.tensors[0].differing) == (3, "near", 1)
    assert report.tensors[0].furthest_steps == 1


def test_verify_is_inconclusive_without_a_base_or_a_change(trio, tmp_path, rng):
    base, adapter, merged = trio
    assert verify(merged, adapter).exit_code == 3
    tensors = {name: array * 1e-12 for name, array in linear_factors(rng, "lin", 30, 32).items()}
    lost = write_adapter(tmp_path / "lost", tensors)
    report = verify(base, lost, base)
    assert (report.exit_code, report.tensors[0].finding) == (3, "same")
    assert verify(merged, lost, base).exit_code == 1


def test_verify_knows_a_merge_by_other_arithmetic(trio, tmp_path):
    base, adapter, _ = trio
    tensors = {
        name.removeprefix("base_model.model."): array
        for name, array in read_file(adapter / "adapter_model.safetensors").items()
    }
    arrays = dict(read_file(base))
    arrays["lin.weight"] = (
        arrays["lin.weight"] + exact_change(tensors, "lin", 2.0).astype(np.float32) * np.float32(1.000001)
    ).astype(np.float32)
    report = verify(write_file(tmp_path / "theirs.safetensors", arrays), adapter, base)
    assert (report.exit_code, report.tensors[0].finding) == (3, "near")
    assert abs(report.tensors[0].contained - 1) < 1e-4


def test_verify_says_no_to_missing_and_misshapen_tensors(trio, tmp_path):
    base, adapter, _ = trio
    arrays = read_file(base)
    for lin in ({}, {"lin.weight": arrays["lin.weight"][:5]}, {"lin.weight": np.arange(4)}):
        other = write_file(tmp_path / "other.safetensors", {"other.weight": arrays["other.weight"], **lin})
        report = verify(other, adapter, base)
        assert (report.exit_code, report.tensors[0].finding) == (1, "misshapen" if lin else "missing")


def test_a_combination_verifies_as_its_parts(trio, tmp_path, rng):
    base, adapter, _ = trio
    other = write_adapter(tmp_path / "b", linear_factors(rng, "lin", 30, 32, rank=3), r=3)
    combine([(adapter, 0.5), (other, -0.25)], tmp_path / "sum", dtype="float64")
    merge(base, tmp_path / "sum", tmp_path / "one.safetensors")
    report = verify(tmp_path / "one.safetensors", [(adapter, 0.5), (other, -0.25)], base)
    assert report.tensors[0].finding in ("exact", "near")
    assert report.tensors[0].furthest_steps <= 1
