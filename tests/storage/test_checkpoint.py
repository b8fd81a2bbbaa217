"""Files of layers: what is written comes back, and what is broken or hostile is a FormatError that says why."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nblora
from nblora.errors import FormatError
from nblora.storage.checkpoint import FORMAT_VERSION, read_checkpoint, take_tensor, write_checkpoint
from nblora.storage.safetensors_reader import SafetensorsFile
from tests.helpers import LAYOUTS, assert_unchanged, make_adapter, make_layer, randomise, snapshot

pytestmark = pytest.mark.small


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def adapter(rng):
    return make_adapter(rng, base=make_layer(rng, layout=nblora.FullyConnected, activation="gelu"), lora_dropout=0.25)


def model(rng):
    inner = nblora.Sequential(make_layer(rng, (6, 6)), make_adapter(rng, base=make_layer(rng, (6, 6))))
    first = make_adapter(rng, base=make_layer(rng, (7, 6)), frozen=False)
    return nblora.Sequential({"first": first, "inner": inner, "head": make_layer(rng, (6, 5), bias=False)})


MAKERS = {
    "Dense": lambda rng: make_layer(rng, dtype="float32", activation="relu"),
    "FullyConnected": lambda rng: make_layer(rng, layout=nblora.FullyConnected, bias=False),
    "LoRALayer": lambda rng: randomise(nblora.LoRALayer(7, 5, 3, 2.0, use_rslora=True, seed=rng), rng),
    "LoRAAdapter": lambda rng: make_adapter(rng, nblora.LoRAAdapter, frozen=False, use_rslora=True),
    "DeltaLoRAAdapter": lambda rng: make_adapter(rng, delta_scaling=0.5, momentum_factor=0.25, lora_dropout=0.125),
    "on an adapter": lambda rng: make_adapter(rng, nblora.LoRAAdapter, make_adapter(rng)),
    "Sequential": model,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_everything_comes_back(rng, path, kind, mode):
    layer = getattr(MAKERS[kind](rng), mode)()
    layer.save(path)
    loaded = nblora.load(path)
    assert type(loaded) is type(layer)
    assert loaded.dtype == layer.dtype
    assert loaded._config() == layer._config()
    assert_unchanged(loaded, snapshot(layer))
    assert type(layer).load(str(path)).training is layer.training
    loaded.set_parameters(loaded.get_parameters() + 1)  # what was read can be trained


def test_nan_and_infinity_come_back(adapter, path):
    adapter.set_parameter("delta", np.resize([np.nan, np.inf, -np.inf, -0.0, 5e-324], (7, 5)))
    adapter.save(path)
    np.testing.assert_array_equal(
        nblora.load(path).get_parameter("delta").view(np.uint64), adapter.get_parameter("delta").view(np.uint64)
    )


def test_a_rank_above_the_bound_comes_back(rng, path):
    layer = nblora.LoRALayer.from_factors(rng.normal(size=(3, 9)), rng.normal(size=(9, 2)))
    layer.save(path)
    assert nblora.load(path).rank == 9


def test_another_kind_is_a_format_error(adapter, path):
    adapter.save(path)
    for kind in (nblora.Dense, nblora.LoRAAdapter, nblora.Sequential):
        with pytest.raises(FormatError, match=f"adapter.safetensors: holds a DeltaLoRAAdapter, not a {kind.__name__}"):
            kind.load(path)


def test_a_missing_file_is_an_os_error(path):
    with pytest.raises(FileNotFoundError):
        nblora.load(path)
    with pytest.raises(IsADirectoryError):
        nblora.load(path.parent)


def test_no_pickle(adapter, path):
    import pickle

    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    assert_refused(path)


# --- broken files ------------------------------------------------------------------------------------------------


def assert_refused(path, fault=""):
    """FormatError that names the file and the fault."""
    with pytest.raises(FormatError) as caught:
        nblora.load(path)
    assert str(caught.value).startswith(str(path))
    assert fault in str(caught.value)


def test_truncated_anywhere(adapter, path):
    adapter.save(path)
    whole = path.read_bytes()
    for size in [*range(0, 64), *range(64, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert_refused(path)
    path.write_bytes(whole + b"\0")
    assert_refused(path)


def test_any_flipped_bit_is_seen(adapter, path, rng):
    adapter.save(path)
    whole = path.read_bytes()
    before = snapshot(adapter)
    for place in {*range(8), *rng.integers(8, len(whole), 300).tolist()}:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        if not is_refused(path):
            # A bit of nothing that counts: the version of nblora, or a blank of the header's padding.
            loaded = nblora.load(path)
            assert_unchanged(loaded, before)
            assert loaded._config() == adapter._config()


def is_refused(path):
    """Whether loading ends in a FormatError; any other error passes through."""
    try:
        nblora.load(path)
    except FormatError:
        return True
    return False


@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "bytes"
    path.write_bytes(data)
    assert_refused(path)


def raw(path, header, data=b"", claimed=None):
    """Write a safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)


@pytest.mark.parametrize("claimed", [10 * 2**30, 2**63, 2**64 - 1, 50])
def test_a_header_that_claims_more_than_there_is(path, claimed):
    raw(path, {}, claimed=claimed)
    assert_refused(path, "not a readable safetensors file")


def test_a_tensor_that_claims_10_gb(path):
    raw(path, {"weight": {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10**10]}}, b"\0" * 64)
    assert_refused(path, "not a readable safetensors file")


def header_of(path):
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    return whole[8 : 8 + size].decode(), whole[8 + size :]


def test_duplicate_names(adapter, path):
    adapter.save(path)
    header, data = header_of(path)
    start = header.index('"lora_A"')
    entry = header[start : header.index("}", start) + 1]
    raw(path, (header[:start] + entry + "," + header[start:]).encode(), data)
    assert_refused(path, "'lora_A' occurs twice")


def test_duplicate_metadata(adapter, path):
    adapter.save(path)
    header, data = header_of(path)
    raw(path, header.replace('"format":', '"kind":"Dense","format":', 1).encode(), data)
    assert_refused(path, "'kind' occurs twice")


def test_a_file_of_others(path):
    from safetensors.numpy import save_file

    save_file({"weight": np.ones((2, 2))}, path)
    assert_refused(path, "not one that nblora saved")


def edit_metadata(path, **changes):
    header, data = header_of(path)
    parsed = json.loads(header)
    parsed["__metadata__"].update(changes)
    raw(path, {k: v for k, v in parsed.items() if v is not None}, data)


@pytest.mark.parametrize("version", ["0", "2", "1.0", "", "one"])
def test_another_version(adapter, path, version):
    adapter.save(path)
    edit_metadata(path, format_version=version)
    assert_refused(path, f"format version {version!r}")


def test_an_edited_configuration(adapter, path):
    adapter.save(path)
    edit_metadata(path, config="{}")
    assert_refused(path, "checksum")


# --- hostile contents, well formed and with the right checksum ---------------------------------------------------


def write(path, kind="DeltaLoRAAdapter", config=None, tensors=None, of=None, drop=(), **changes):
    """Write the state of `of` with changes to its config and tensors."""
    held = {name: of.get_parameter(name) for name in of.parameter_names()} if of is not None else {}
    settings = of._config() if of is not None else {}
    settings = settings | changes if config is None else config
    kept = {name: value for name, value in settings.items() if name not in drop} if drop else settings
    write_checkpoint(path, kind, kept, {n: v for n, v in (held | (tensors or {})).items() if v is not None})


@pytest.mark.parametrize("kind", ["Layer", "Linear", "Adapter", "NamedParameters", "os.system", "", "object", "dense"])
def test_unknown_kinds(adapter, path, kind):
    write(path, kind, of=adapter)
    assert_refused(path, "missing or unknown")


@pytest.mark.parametrize("config", [None, [], "text", 3, {}, [[]], {"base": 1}, {"layers": [1]}])
@pytest.mark.parametrize(
    "kind", ["Dense", "FullyConnected", "LoRALayer", "LoRAAdapter", "DeltaLoRAAdapter", "Sequential"]
)
def test_configurations_of_the_wrong_type(path, kind, config):
    write_checkpoint(path, kind, config, {"weight": np.ones((2, 2))})
    assert_refused(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 2),
        ("rank", -1),
        ("rank", "3"),
        ("rank", 10**30),
        ("alpha", 0.0),
        ("alpha", "1"),
        ("alpha", None),
        ("delta_scaling", -1.0),
        ("momentum_factor", 1.0),
        ("lora_dropout", 1.0),
        ("use_rslora", 1),
        ("freeze_base_layer", "no"),
        ("random_state", None),
        ("random_state", {"bit_generator": "PCG64"}),
        ("random_state", {"bit_generator": "MT19937", "state": {}}),
        ("base", None),
        ("base", {"kind": "DeltaLoRAAdapter", "config": {}}),
        ("base", {"kind": ["Dense"], "config": {}}),
    ],
)
def test_settings_out_of_range(adapter, path, name, value):
    write(path, of=adapter, **{name: value})
    assert_refused(path)


def test_missing_settings(adapter, path):
    for name in adapter._config():
        if name != "training":
            write(path, of=adapter, drop=(name,))
            assert_refused(path)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("lora_A", np.ones((7, 3), np.float32), "must be float64"),
        ("lora_A", np.ones((7, 3), np.int64), "must be float64"),
        ("lora_B", np.ones((5, 3)), "of shape (3, 5)"),
        ("delta", np.ones((5, 7)), "of shape (7, 5)"),
        ("velocity", None, "'velocity' is missing"),
        ("base.weight", np.ones((7, 6)), "of shape (7, 5)"),
        ("base.bias", None, "'bias' is missing"),
        ("lora_A", np.ones(()), "of shape (7, 3)"),
        ("lora_A", np.ones((7, 0)), "of shape (7, 3)"),
    ],
)
def test_wrong_tensors(adapter, path, name, value, fault):
    write(path, of=adapter, tensors={name: value})
    assert_refused(path, fault)


def test_a_dtype_that_is_not_ours(adapter, path):
    """NumPy knows bfloat16 or not, as other modules were imported; nblora refuses it either way."""
    adapter.save(path)
    header, data = header_of(path)
    parsed = json.loads(header)
    parsed["base.bias"] |= {"dtype": "BF16", "shape": [20]}
    raw(path, parsed, data)
    assert_refused(path)


def test_deep_nesting(path):
    """Neither the JSON of a configuration nor the layers in it may exhaust the stack."""
    config = "[" * 100_000 + "]" * 100_000
    header = {"__metadata__": {"format": "nblora", "format_version": str(FORMAT_VERSION), "kind": "Dense"}}
    header["__metadata__"] |= {"config": config, "checksum": "00000000"}
    raw(path, header)
    assert_refused(path)
    nested = {"kind": "Dense", "config": {}}
    for _ in range(150):
        nested = {"kind": "LoRAAdapter", "config": {"base": nested}}
    write_checkpoint(path, "LoRAAdapter", {"base": nested}, {})
    assert_refused(path)


def test_a_header_nested_deeply(path):
    raw(path, b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    assert_refused(path)


@pytest.mark.parametrize("layers", [[], [{"name": "", "kind": "Dense", "config": {}}], {"a": 1}, 5])
def test_hostile_models(path, layers):
    write_checkpoint(path, "Sequential", {"layers": layers, "training": True}, {})
    assert_refused(path)


# --- the two functions below every layer -------------------------------------------------------------------------


def test_write_and_read(path):
    tensors = {"a": np.arange(6).reshape(2, 3), "empty": np.zeros((0, 4)), "scalar": np.float32(3).reshape(())}
    write_checkpoint(path, "Kind", {"x": [1, None, "ä"]}, tensors | {"view": tensors["a"].T})
    kind, config, found = read_checkpoint(path, lambda *state: state)
    assert (kind, config) == ("Kind", {"x": [1, None, "ä"]})
    assert found.keys() == {*tensors, "view"}
    for name, value in (tensors | {"view": tensors["a"].T}).items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


def test_a_configuration_that_json_cannot_hold_writes_nothing(path):
    path.write_bytes(b"old")
    for config in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((TypeError, ValueError)):
            write_checkpoint(path, "Kind", config, {})
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_take_tensor():
    tensor = np.ones((2, 3), np.float32)
    assert take_tensor({"a": tensor}, "a", np.dtype(np.float32), (2, 3)) is tensor
    with pytest.raises(KeyError):
        take_tensor({}, "a", np.dtype(np.float32), (2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_a_broken_file_leaves_the_object_alone(rng, path, layout):
    adapter = make_adapter(rng, base=make_layer(rng, layout=layout))
    before = snapshot(adapter)
    adapter.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError):
        type(adapter).load(path)
    assert_unchanged(adapter, before)


def test_a_file_that_shrinks_while_it_is_read(path, monkeypatch):
    """A mapping of it would end the process."""
    nblora.Dense.random(700, 700, seed=0).save(path)
    original = SafetensorsFile.array

    def cut_first(self, name):
        os.truncate(path, 4000)
        return original(self, name)

    monkeypatch.setattr(SafetensorsFile, "array", cut_first)
    assert_refused(path, "cut while being read")


def test_a_link_to_a_file_is_read_and_a_pipe_is_refused(adapter, path):
    adapter.save(path)
    link, pipe = path.with_name("link"), path.with_name("pipe")
    link.symlink_to(path)
    assert_unchanged(nblora.load(link), snapshot(adapter))
    os.mkfifo(pipe)
    with pytest.raises(FormatError, match="regular file"):
        nblora.load(pipe)
    loop = path.with_name("loop")
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="symbolic links"):
        nblora.load(loop)
