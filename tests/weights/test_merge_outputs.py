"""What a merge writes, and what it refuses: shards, folders, names, ties, broken inputs, full disks."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from nblora.errors import FormatError
from nblora.weights import merge
from tests.weights.support import (
    exact_change,
    linear_factors,
    read_file,
    read_header,
    read_model,
    snapshot,
    write_adapter,
    write_file,
)


@pytest.fixture
def model(tmp_path, rng):
    """A folder with two shards, an index, and other files; and an adapter on both shards."""
    folder = tmp_path / "model"
    shards = {
        "model-00001-of-00002.safetensors": {
            "net.0.weight": rng.standard_normal((8, 6)).astype(np.float16), "net.0.bias": np.ones(8, np.float16),
            "steps": np.arange(5),
        },
        "model-00002-of-00002.safetensors": {
            "net.1.weight": rng.standard_normal((7, 8)).astype(np.float32), "mask": np.array([True, False, True]),
        },
    }  # fmt: skip
    for name, tensors in shards.items():
        write_file(folder / name, tensors, {"format": "pt", "made_by": "test"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(array.nbytes for tensors in shards.values() for array in tensors.values())
    index = {"metadata": {"total_size": total, "note": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text('{"torch_dtype": "float16", "hidden_size": 8}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    tensors = linear_factors(rng, "net.0", 8, 6) | linear_factors(rng, "net.1", 7, 8)
    return folder, write_adapter(tmp_path / "adapter", tensors), tensors


def check_merged(out, base, tensors):
    result, before = read_model(out), read_model(base)
    assert result.keys() == before.keys()
    for name, array in before.items():
        if name in ("net.0.weight", "net.1.weight"):
            exact = array.astype(np.float64) + exact_change(tensors, name.removesuffix(".weight"), 2.0)
            np.testing.assert_allclose(result[name].astype(np.float64), exact, rtol=2**-10, atol=2**-14)
            assert not np.array_equal(result[name], array)
        else:
            np.testing.assert_array_equal(result[name], array)


def test_folder_keeps_shards_index_metadata_and_other_files(model, tmp_path):
    base, adapter, tensors = model
    before = snapshot(base, adapter)
    merge(base, adapter, tmp_path / "out")
    check_merged(tmp_path / "out", base, tensors)
    assert snapshot(base, adapter) == before
    names = set(os.listdir(base)) - {"pytorch_model.bin"}
    assert set(os.listdir(tmp_path / "out")) == names
    for name in names - {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    for name in names:
        if name.startswith("model-"):
            assert read_header(tmp_path / "out" / name)[0] == read_header(base / name)[0]


def test_index_may_be_given_and_a_second_run_replaces_the_first(model, tmp_path):
    base, adapter, tensors = model
    for _ in range(2):
        merge(base / "model.safetensors.index.json", adapter, tmp_path / "out")
        check_merged(tmp_path / "out", base, tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model", "out"]


def test_folder_without_an_index_stays_without(model, tmp_path):
    base, adapter, tensors = model
    (base / "model.safetensors.index.json").unlink()
    merge(base, adapter, tmp_path / "out")
    check_merged(tmp_path / "out", base, tensors)
    assert "model.safetensors.index.json" not in os.listdir(tmp_path / "out")


def test_shard_size_splits_and_joins(model, tmp_path):
    base, adapter, tensors = model
    merge(base, adapter, tmp_path / "split", shard_size="155B")
    files = sorted(path.name for path in (tmp_path / "split").glob("*.safetensors"))
    assert files == [f"model-{at:05d}-of-00003.safetensors" for at in (1, 2, 3)]
    check_merged(tmp_path / "split", base, tensors)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in read_file(tmp_path / "split" / file)
    assert index["weight_map"].keys() == read_model(base).keys()
    merge(base, adapter, tmp_path / "joined", shard_size="1GB")
    assert [path.name for path in (tmp_path / "joined").glob("*.safetensors")] == ["model.safetensors"]
    check_merged(tmp_path / "joined", base, tensors)


def test_dtype_is_told_to_the_loader(model, tmp_path):
    base, adapter, _ = model
    merge(base, adapter, tmp_path / "out", dtype="float64")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float64", "hidden_size": 8}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    arrays = read_model(tmp_path / "out")
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in arrays.values()), "note": 1}
    assert {array.dtype for name, array in arrays.items() if name.startswith("net")} == {np.dtype(np.float64)}


def test_dry_run_writes_nothing_and_names_what_would_change(model, tmp_path):
    base, adapter, _ = model
    report = merge(base, adapter, tmp_path / "out", dry_run=True)
    assert [tensor.name for tensor in report.tensors] == ["net.0.weight", "net.1.weight"]
    assert report.as_dict()["tensors"][0]["change_norm"] is None
    assert not (tmp_path / "out").exists()


def test_map_renames_parts_of_names(model, tmp_path, rng):
    base, _, _ = model
    tensors = linear_factors(rng, "transformer.layers.0", 8, 6) | linear_factors(rng, "transformer.layers.1", 7, 8)
    adapter = write_adapter(tmp_path / "renamed", tensors)
    with pytest.raises(FormatError, match=r"transformer\.layers\.0\.weight .*nearest .*net\.0\.weight"):
        merge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "out", maps=["transformer.layers=net"])
    renamed = {name.replace("transformer.layers", "net"): array for name, array in tensors.items()}
    check_merged(tmp_path / "out", base, renamed)
    for bad in ("transformer", "=net", "..=net"):
        with pytest.raises(ValueError, match="OLD=NEW"):
            merge(base, adapter, tmp_path / "out", maps=[bad])


def test_prefix_that_was_put_twice_is_dropped_by_a_map(model, tmp_path):
    base, _, tensors = model
    twice = {f"base_model.model.{name}": array for name, array in tensors.items()}
    adapter = write_adapter(tmp_path / "twice", twice)
    merge(base, adapter, tmp_path / "out", maps=["base_model.model.="])
    check_merged(tmp_path / "out", base, tensors)


@pytest.mark.parametrize(("name", "hint"), [("model.net.0", "--map model="), ("0", "--map 0=net.0")])
def test_unmatched_tensor_lists_nearest_names_and_the_map_that_helps(name, hint, model, tmp_path, rng):
    base, _, _ = model
    adapter = write_adapter(tmp_path / "renamed", linear_factors(rng, name, 8, 6))
    with pytest.raises(FormatError) as caught:
        merge(base, adapter, tmp_path / "out")
    assert hint in str(caught.value)
    assert "nearest net.0.weight" in str(caught.value)
    merge(base, adapter, tmp_path / "out", maps=[hint.removeprefix("--map ")])


def test_tied_weights_get_one_change_and_stay_tied(tmp_path, rng):
    embed = rng.standard_normal((11, 6))
    tensors = linear_factors(rng, "lm_head", 11, 6, dtype=np.float64)
    tensors["embed.lora_embedding_A"] = rng.standard_normal((4, 11))
    tensors["embed.lora_embedding_B"] = rng.standard_normal((6, 4))
    adapter = write_adapter(tmp_path / "adapter", tensors)
    exact = embed + exact_change(tensors, "lm_head", 2.0)
    exact += 2.0 * (tensors["embed.lora_embedding_B"] @ tensors["embed.lora_embedding_A"]).T
    # Stored twice, under one name and an alias in the metadata, and under one name in a model that ties by default.
    twice = write_file(tmp_path / "twice.safetensors", {"embed.weight": embed, "lm_head.weight": embed})
    alias = write_file(tmp_path / "alias.safetensors", {"embed.weight": embed}, {"lm_head.weight": "embed.weight"})
    for base in (twice, alias):
        report = merge(base, adapter, tmp_path / "out.safetensors")
        result = read_file(tmp_path / "out.safetensors")
        assert result.keys() == read_file(base).keys()
        for array in result.values():
            np.testing.assert_allclose(array, exact, rtol=0, atol=1e-12)
        assert {name for tensor in report.tensors for name in (tensor.name, *tensor.tied)} == {
            "embed.weight",
            "lm_head.weight",
        }
    once = write_file(tmp_path / "once" / "model.safetensors", {"embed_tokens.weight": embed}).parent
    renamed = {name.replace("embed.", "embed_tokens."): array for name, array in tensors.items()}
    adapter = write_adapter(tmp_path / "adapter", renamed)
    with pytest.raises(FormatError, match="lm_head"):
        merge(once, adapter, tmp_path / "out")
    (once / "config.json").write_text('{"tie_word_embeddings": true}')
    merge(once, adapter, tmp_path / "out")
    np.testing.assert_allclose(read_model(tmp_path / "out")["embed_tokens.weight"], exact, rtol=0, atol=1e-12)
    (once / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(FormatError, match="lm_head"):
        merge(once, adapter, tmp_path / "out")


def test_copies_that_are_no_ties_stay_apart(tmp_path, rng):
    W = rng.standard_normal((6, 6))
    zeros = np.zeros((6, 6))
    arrays = {"layers.0.q.weight": W, "layers.1.q.weight": W, "a.weight": zeros, "b.weight": zeros}
    base = write_file(tmp_path / "base.safetensors", arrays)
    tensors = linear_factors(rng, "layers.0.q", 6, 6) | linear_factors(rng, "a", 6, 6)
    merge(base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "out.safetensors")
    result = read_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(result["layers.1.q.weight"], W)
    np.testing.assert_array_equal(result["b.weight"], zeros)
    assert not np.array_equal(result["layers.0.q.weight"], W)


def refused(match, base, adapter, out, error=FormatError, **options):
    """The merge ends in this error, changes no input and leaves nothing behind."""
    before = snapshot(base, adapter if not isinstance(adapter, list) else adapter[0])
    beside = sorted(os.listdir(out.parent)) if out.parent.is_dir() else None
    with pytest.raises(error, match=match):
        merge(base, adapter, out, **options)
    assert snapshot(base, adapter if not isinstance(adapter, list) else adapter[0]) == before
    if beside is not None:
        assert sorted(os.listdir(out.parent)) == beside


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "a\\b", "n\0l"]
)
def test_index_that_leads_elsewhere_is_refused(name, model, tmp_path):
    base, adapter, _ = model
    write_file(tmp_path / "evil.safetensors", {"net.1.weight": np.ones((7, 8))})
    index = base / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["net.1.weight"] = name
    index.write_text(json.dumps(data))
    refused("index.json: names the shard", base, adapter, tmp_path / "out")


def test_index_that_contradicts_its_shards_is_refused(model, tmp_path):
    base, adapter, _ = model
    index = base / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    for change, match in (
        ({"net.9.weight": "model-00001-of-00002.safetensors"}, "says that .* holds 'net.9.weight', which it does not"),
        ({"net.1.weight": "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors', which is not there"),
        ({"net.1.weight": 7}, "expected a weight_map"),
    ):
        index.write_text(json.dumps(data | {"weight_map": data["weight_map"] | change}))
        refused(match, base, adapter, tmp_path / "out")
    index.write_text("[]")
    refused("expected a JSON object", base, adapter, tmp_path / "out")


def test_linked_shard_is_refused(model, tmp_path):
    base, adapter, _ = model
    shard = base / "model-00002-of-00002.safetensors"
    shutil.move(shard, tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused("model-00002-of-00002.safetensors: is a symbolic link", base, adapter, tmp_path / "out")


def test_output_that_is_an_input_or_holds_foreign_files_is_refused(model, tmp_path):
    base, adapter, _ = model
    single = write_file(tmp_path / "single.safetensors", read_model(base))
    refused("is the output and the input", base, adapter, base)
    refused("is the output and the input", single, adapter, single)
    refused("is the output and the input", single, adapter, adapter / "adapter_model.safetensors")
    os.link(single, tmp_path / "hard.safetensors")
    refused("is the output and the input", single, adapter, tmp_path / "hard.safetensors")
    (tmp_path / "soft.safetensors").symlink_to(single)
    refused("symbolic link", single, adapter, tmp_path / "soft.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    refused("holds 'thesis.tex'", base, adapter, tmp_path / "full")
    refused("got a file", base, adapter, single)
    refused("does not exist", base, adapter, tmp_path / "no" / "out", error=FileNotFoundError)
    refused("Not a directory|does not exist", single, adapter, single / "out", error=OSError)


@pytest.mark.parametrize("folder", [True, False])
def test_full_disk_leaves_nothing(folder, model, tmp_path, monkeypatch):
    base, adapter, _ = model
    source = base if folder else write_file(tmp_path / "single.safetensors", read_model(base))
    out = tmp_path / "out" if folder else tmp_path / "out.safetensors"
    real, left = os.pwrite, [2]

    def pwrite(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(f"No space left on device: '{out}'", source, adapter, out, error=OSError)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    refused("bytes are needed and 10 are free", source, adapter, out, error=OSError)
    monkeypatch.undo()
    merge(source, adapter, out)
    assert read_model(out).keys() == read_model(base).keys()


def test_damaged_base_leaves_nothing(model, tmp_path):
    base, adapter, _ = model
    shard = base / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("model-00002-of-00002.safetensors: .*the file is cut", base, adapter, tmp_path / "out")


def test_ambiguous_and_empty_folders_are_refused(model, tmp_path):
    base, adapter, _ = model
    (tmp_path / "empty").mkdir()
    refused("holds no safetensors file", tmp_path / "empty", adapter, tmp_path / "out")
    for name in ("one", "two"):
        shutil.copy(base / "model.safetensors.index.json", base / f"{name}.safetensors.index.json")
    (base / "model.safetensors.index.json").unlink()
    refused("several indexes", base, adapter, tmp_path / "out")
    for path in base.glob("*.index.json"):
        path.unlink()
    shutil.copy(base / "model-00001-of-00002.safetensors", base / "extra.safetensors")
    refused("holds the tensor 'net.0.weight', which .* holds too", base, adapter, tmp_path / "out")


def test_shapes_that_do_not_fit_are_refused(model, tmp_path, rng):
    base, _, _ = model
    for out, inputs in ((8, 7), (6, 6), (7, 6)):
        adapter = write_adapter(tmp_path / "other", linear_factors(rng, "net.0", out, inputs))
        refused(r"net\.0\.weight has shape \(8, 6\)", base, adapter, tmp_path / "out")
    adapter = write_adapter(tmp_path / "other", linear_factors(rng, "steps_layer", 8, 6) | {"steps": np.ones(5)})
    refused("match", base, adapter, tmp_path / "out")
    adapter = write_adapter(tmp_path / "other", {**linear_factors(rng, "net.0", 8, 6), "steps": np.ones(5)})
    refused("stored as I64", base, adapter, tmp_path / "out")
    adapter = write_adapter(tmp_path / "other", {**linear_factors(rng, "net.0", 8, 6), "net.0.bias": np.ones(9)})
    refused(r"has shape \(9,\)", base, adapter, tmp_path / "out")


def test_whole_tensors_have_no_weights_and_no_rivals(model, tmp_path, rng):
    base, _, _ = model
    tensors = linear_factors(rng, "net.0", 8, 6)
    adapter = write_adapter(tmp_path / "x", {**tensors, "net.0.base_layer.bias": np.full(8, 2.0)}, bias="all")
    rival = write_adapter(tmp_path / "y", {**tensors, "net.0.base_layer.bias": np.full(8, 3.0)}, bias="all")
    with pytest.raises(FormatError, match=r"net\.0\.base_layer\.bias replaces net\.0\.bias whole"):
        merge(base, (adapter, 0.5), tmp_path / "out")
    with pytest.raises(FormatError, match=r"replace net\.0\.bias by different numbers"):
        merge(base, [adapter, rival], tmp_path / "out")
    merge(base, [adapter, adapter], tmp_path / "out")
    np.testing.assert_array_equal(read_model(tmp_path / "out")["net.0.bias"], np.full(8, 2.0, np.float16))


def test_lora_bias_without_a_base_bias_is_refused(model, tmp_path, rng):
    base, _, _ = model
    tensors = {**linear_factors(rng, "net.1", 7, 8), "net.1.lora_B.bias": np.ones(7)}
    adapter = write_adapter(tmp_path / "x", tensors, lora_bias=True)
    refused(r"net\.1 has no bias", base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"max_memory": "1kB"}, "max_memory is 1000"),
        ({"max_memory": "much"}, "max_memory is 'much'"),
        ({"max_memory": 0}, "max_memory is 0"),
        ({"shard_size": "-1GB"}, "shard_size is '-1GB'"),
    ],
)
def test_arguments_out_of_range_are_named(options, match, model, tmp_path):
    base, adapter, _ = model
    refused(match, base, adapter, tmp_path / "out", error=ValueError, **options)


def test_weights_that_are_no_numbers_and_no_adapters_are_refused(model, tmp_path):
    base, adapter, _ = model
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of adapter"):
            merge(base, (adapter, weight), tmp_path / "out")
    with pytest.raises(ValueError, match="adapters is empty"):
        merge(base, [], tmp_path / "out")
