"""MiSS by its formula, and its files; what PEFT computes of it is in tests/pretrained."""

import numpy as np
import pytest

import nblora
from nblora.adapters import MiSSAdapter
from nblora.errors import FormatError
from nblora.formats import SafetensorsFile, load_peft
from nblora.formats.peft import PeftAdapter
from nblora.formats.peft_writer import write_adapter
from nblora.storage.safetensors_writer import write_safetensors
from tests.adapters.support import base_of, taught
from tests.helpers import assert_close
from tests.processes import run

pytestmark = pytest.mark.small
CONFIG = {"peft_type": "MISS", "r": 3, "init_weights": True, "target_modules": ["layer"]}
KEY = "base_model.model.layer.miss_block"


@pytest.mark.parametrize("kind", ["dense", "fully_connected"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_shards_are_added_up_and_share_one_matrix(kind, rank, rng):
    base, x = base_of(kind)  # 7 inputs: the last shard is filled up
    adapter = taught(MiSSAdapter(base, rank, seed=1), x, rng)
    rows = x.reshape(-1, 7)
    filled = np.pad(rows, [(0, 0), (0, -7 % rank)])
    shards = filled.reshape(len(rows), -1, rank).sum(axis=1)
    z = rows @ adapter.get_parameter("base.weight") + shards @ adapter.block
    z = z if base.bias is None else z + base.bias
    wanted = nblora.Dense(np.eye(6), activation=base.activation)(z)
    assert_close(adapter(x).reshape(-1, 6), wanted)
    assert adapter.parameter_count == rank * 6
    assert adapter.parameter_names()[-1] == "block"


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dense", "conv2d", "embedding"])
def test_gradients_against_differences(kind, freeze, dropout, rng):
    base, x = base_of(kind)
    adapter = taught(MiSSAdapter(base, 3, freeze, lora_dropout=dropout, seed=1), x, rng)
    state = adapter._rng.bit_generator.state
    g = rng.normal(size=adapter(x).shape)
    adapter._rng.bit_generator.state = state
    adapter(x)
    adapter.backward(g)
    found, at = adapter.get_parameter_gradients(), adapter.get_parameters()

    def value(vector):
        adapter.set_parameters(vector)
        adapter._rng.bit_generator.state = state
        return float((adapter(x) * g).sum())

    steps = 1e-6 * np.eye(len(at))
    slopes = [(value(at + step) - value(at - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(found, slopes, rtol=0, atol=1e-7)


@pytest.mark.parametrize("turned", [False, True])
def test_a_file_and_the_merge_tool(turned, tmp_path, rng):
    """On a weight stored (out, in), and on one stored (in, out)."""
    weight, block = rng.normal(size=(6, 7)), rng.normal(size=(3, 6))
    write_adapter(tmp_path / "a", CONFIG, {KEY: block})
    stored = np.ascontiguousarray(weight.T) if turned else weight
    write_safetensors(tmp_path / "base.safetensors", {"layer.weight": stored}, {})
    nblora.merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "merged.safetensors")
    wanted = weight + np.tile(block, (3, 1))[:7].T
    with SafetensorsFile(tmp_path / "merged.safetensors") as file:
        merged = file.read("layer.weight")
    assert_close(merged.T if turned else merged, wanted)
    (adapter,) = load_peft(tmp_path / "a", tmp_path / "base.safetensors", dtype="float64").values()
    assert type(adapter) is MiSSAdapter
    assert type(adapter.base_layer) is (nblora.Dense if turned else nblora.FullyConnected)
    assert_close(adapter.merge_to_original_layer().get_parameter("weight"), wanted.T)
    nblora.save_peft({"layer": adapter}, tmp_path / "back", config=CONFIG)
    with PeftAdapter(tmp_path / "back") as opened:
        np.testing.assert_array_equal(opened.file.read(KEY), block)
        assert opened.config.raw["peft_type"] == "MISS"
        assert not {"lora_alpha", "use_rslora", "use_dora"} & opened.config.raw.keys()


@pytest.mark.parametrize(
    ("changes", "tensors", "match"),
    [
        ({"init_weights": "bat"}, {}, "init_weights is 'bat'"),
        ({"init_weights": "mini", "mini_r": 2}, {}, "init_weights is 'mini'"),
        ({"bias": "all"}, {}, "bias is 'all'"),
        ({"r": 2}, {}, "expected rank 2"),
        ({}, {KEY: np.ones(6)}, "expected rank 3"),
        ({}, {KEY.replace("miss_block", "lora_A.weight"): np.ones((3, 7))}, "expected rank 3"),
    ],
)
def test_files_that_mean_something_else_are_refused(changes, tensors, match, tmp_path, rng):
    write_adapter(tmp_path / "a", CONFIG | changes, {KEY: rng.normal(size=(3, 6))} | tensors)
    with pytest.raises(FormatError, match=match):
        PeftAdapter(tmp_path / "a")


def test_tools_that_need_two_factors_say_so(tmp_path, rng):
    write_adapter(tmp_path / "a", CONFIG, {KEY: rng.normal(size=(3, 6))})
    with pytest.raises(FormatError, match="does not add up"):
        nblora.combine([tmp_path / "a", tmp_path / "a"], tmp_path / "b")
    with pytest.raises(FormatError, match="follows from the size of the base's"):
        nblora.inspect(tmp_path / "a")
    write_safetensors(tmp_path / "base.safetensors", {"layer.weight": rng.normal(size=(5, 7))}, {})
    with pytest.raises(FormatError, match=r"layer\.weight has shape"):
        nblora.merge(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match=r"layer\.weight has shape"):
        load_peft(tmp_path / "a", tmp_path / "base.safetensors")


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "embedding"])
def test_pefts_files_know_linear_layers_alone(kind, tmp_path):
    base, _ = base_of(kind)
    with pytest.raises(ValueError, match="PEFT knows 'miss' on linear layers alone"):
        nblora.save_peft(MiSSAdapter(base, 2), tmp_path / "a")


def test_ranks_that_differ_have_no_file(tmp_path):
    layers = {name: MiSSAdapter(nblora.Dense.random(6, 6, seed=1), rank) for name, rank in (("a", 2), ("b", 3))}
    with pytest.raises(ValueError, match="MiSS has one rank for all layers"):
        nblora.save_peft(layers, tmp_path / "a")


ON_A_GPU = """
import numpy as np, nblora
from nblora.adapters import MiSSAdapter

rng = np.random.default_rng(0)
host = MiSSAdapter(nblora.Dense.random(7, 5, activation="tanh", dtype="float64", seed=1), 3)
there = host.clone().to("cuda")
for step in range(3):
    x, g = rng.normal(size=(9, 7)), rng.normal(size=(9, 5))
    assert np.abs(host(x) - there(x)).max() < 1e-12
    assert np.abs(host.backward_update(g, 0.05) - there.backward_update(g, 0.05)).max() < 1e-12
print(np.abs(host.get_parameters() - there.get_parameters()).max() < 1e-12)
"""


def test_on_the_simulated_gpu():
    assert run(ON_A_GPU, NUMBA_ENABLE_CUDASIM="1").stdout == "True\n"
