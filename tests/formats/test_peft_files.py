"""PEFT adapters read: what the configuration says, what contradicts it, and what is refused."""

import json

import numpy as np
import pytest

from nblora.errors import FormatError
from nblora.formats import PeftAdapter
from nblora.formats.peft_config import UNSUPPORTED
from tests.weights.support import FIXTURES, linear_factors, read_file, write_adapter

SET = {
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 3}, "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2]], "megatron_config": {"a": 1}, "monteclora_config": {"num_samples": 8},
    "target_parameters": ["experts"], "trainable_token_indices": [0], "use_bdlora": {"nblocks": 2}, "use_qalora": True,
}  # fmt: skip
INITS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "something"]


@pytest.fixture
def adapter(tmp_path, rng):
    """Writes an adapter of one linear layer, rank 4, with changes to its configuration and tensors."""

    def make(more=None, less=(), **config):
        tensors = {**linear_factors(rng, "net.lin", 6, 5), **(more or {})}
        return write_adapter(tmp_path / "adapter", {k: v for k, v in tensors.items() if k not in less}, **config)

    return make


def refused(path, *words):
    with pytest.raises(FormatError) as caught:
        PeftAdapter(path)
    assert all(word in str(caught.value) for word in (str(path), *words))


def test_every_unsupported_field_has_a_case_here():
    assert SET.keys() == UNSUPPORTED.keys()


@pytest.mark.parametrize("field", SET)
def test_field_that_changes_the_arithmetic_is_named(field, adapter):
    refused(adapter(**{field: SET[field]}), field)
    for off in (None, False, [], {}):
        with PeftAdapter(adapter(**{field: off})):
            pass


@pytest.mark.parametrize("init", INITS)
def test_initialisation_that_changes_the_base_is_named(init, adapter):
    refused(adapter(init_lora_weights=init), "init_lora_weights", init)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisation_that_leaves_the_base_alone_is_read(init, adapter):
    with PeftAdapter(adapter(init_lora_weights=init)) as opened:
        assert opened.config.raw["init_lora_weights"] == init


@pytest.mark.parametrize("value", [True, {"a": 1}, [1]])
def test_unknown_switch_is_named_and_unknown_note_is_kept(value, adapter):
    refused(adapter(use_novelty=value), "use_novelty")
    with PeftAdapter(adapter(use_novelty=False, novelty_size=16, note="mine")) as opened:
        assert opened.config.raw["note"] == "mine"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "ADALORA"}, ["peft_type", "ADALORA"]),
        ({"peft_type": None}, ["peft_type"]),
        ({"r": 3}, ["net.lin", "rank 4", "says 3"]),
        ({"r": "4"}, ["r holds the rank '4'"]),
        ({"r": True}, ["rank True"]),
        ({"lora_alpha": "8"}, ["lora_alpha"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"rank_pattern": {"net.lin": 2}}, ["rank 4", "says 2"]),
        ({"rank_pattern": {"(": 4}}, ["rank_pattern", "'('"]),
        ({"rank_pattern": [4]}, ["rank_pattern"]),
        ({"alpha_pattern": {"lin": None}}, ["alpha_pattern"]),
        ({"use_dora": True}, ["use_dora", "lora_magnitude_vector is missing"]),
        ({"lora_bias": True}, ["lora_bias", "lora_B.bias is missing"]),
        ({"use_rslora": "yes"}, ["use_rslora", "'yes'"]),
        ({"bias": "some"}, ["bias", "'some'"]),
        ({"use_dora": True, "lora_bias": True}, ["use_dora", "lora_bias"]),
        ({"modules_to_save": "head"}, ["modules_to_save", "list of names"]),
        ({"modules_to_save": [["head"]]}, ["modules_to_save", "list of names"]),
        ({"target_modules": [1]}, ["target_modules", "list of names"]),
        ({"target_modules": ["other", "in"]}, ["target_modules", "none of the modules", "net.lin"]),
        ({"target_modules": r".*\.other"}, ["target_modules", "none of the modules", "net.lin"]),
        ({"target_modules": "("}, ["target_modules", "not a regular expression"]),
    ],
)
def test_configuration_that_contradicts_the_tensors_or_itself_is_refused(config, words, adapter):
    refused(adapter(**config), *words)


@pytest.mark.parametrize("target", [["lin"], ["other", "net.lin"], r".*\.l.n", "all-linear", None, []])
def test_targets_that_name_a_module_are_read(target, adapter):
    with PeftAdapter(adapter(target_modules=target)) as opened:
        assert list(opened.modules) == ["net.lin"]


@pytest.mark.parametrize(
    ("more", "less", "words"),
    [
        ({}, ["net.lin.lora_B.weight"], ["net.lin", "lora_B is missing"]),
        ({}, ["net.lin.lora_A.weight"], ["net.lin", "lora_A is missing"]),
        ({"net.lin.lora_B.weight": np.ones((6, 3))}, (), ["ranks differ"]),
        ({"net.lin.lora_B.weight": np.ones(6)}, (), ["no factors"]),
        ({"net.lin.lora_A.weight": np.ones((4, 0))}, (), ["no factors"]),
        ({"net.lin.lora_magnitude_vector": np.ones(6)}, (), ["use_dora is not set"]),
        ({"net.lin.lora_B.bias": np.ones(6)}, (), ["lora_bias is not set"]),
        ({"net.lin.lora_diag": np.ones(4)}, (), ["lora_diag", "not a tensor"]),
        ({"net.lin.lora_A.weight": np.ones((4, 5), np.int64)}, (), ["I64"]),
    ],
)
def test_tensors_that_make_no_adapter_are_refused(more, less, words, adapter):
    refused(adapter(more, less), *words)


def test_wrong_sizes_of_magnitude_and_bias_are_refused(adapter):
    refused(adapter({"net.lin.lora_magnitude_vector": np.ones(5)}, use_dora=True), "expected 6 numbers")
    refused(adapter({"net.lin.lora_B.bias": np.ones((2, 3))}, lora_bias=True), "expected 6 numbers")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"r": 4, "r": 5}', b"\xff", b'{"peft_type": "LORA", "r": NaN}'])
def test_broken_configuration_is_refused(text, adapter):
    path = adapter()
    (path / "adapter_config.json").write_bytes(text)
    refused(path, "adapter_config.json")


def test_missing_files_are_named(adapter, tmp_path):
    path = adapter()
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        PeftAdapter(path)
    (path / "adapter_model.bin").write_bytes(b"")
    refused(path, "pickle")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PeftAdapter(tmp_path / "nowhere")


def test_patterns_and_scalings(adapter):
    config = {"r": 9, "rank_pattern": {"other": 2, r"net\.l.n": 4, "lin": 5}, "lora_alpha": 3}
    with PeftAdapter(adapter(**config, alpha_pattern={"in": 99, "lin": 7, "net.lin": 8})) as opened:
        module = opened.modules["net.lin"]
        assert (module.rank, module.alpha, module.scaling) == (4, 7, 7 / 4)
    with PeftAdapter(adapter(**config, alpha_pattern={"^lin": 7}, use_rslora=True)) as opened:
        assert opened.modules["net.lin"].scaling == 3 / np.sqrt(4)
    with PeftAdapter(adapter(r=4, lora_alpha=6.5)) as opened:
        assert opened.modules["net.lin"].scaling == 6.5 / 4


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
def test_round_trip_keeps_every_bit_and_key(name, tmp_path):
    with PeftAdapter(FIXTURES / name) as opened:
        opened.save(tmp_path / "copy")
    before, after = (read_file(folder / "adapter_model.safetensors") for folder in (FIXTURES / name, tmp_path / "copy"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert (after[key].dtype, after[key].shape) == (array.dtype, array.shape)
        assert after[key].tobytes() == array.tobytes()
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (FIXTURES / name, tmp_path / "copy")
    ]
    assert configs[0] == configs[1]
