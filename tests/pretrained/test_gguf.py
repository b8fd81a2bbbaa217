"""GGUF files: the model of the folder that they were made of, and nothing foreign where they are broken."""

import contextlib
import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest

import nblora
from nblora.errors import FormatError, MissingExtraError
from nblora.storage.gguf_reader import BLOCKS, GGUFFile
from tests.fuzz import mutation
from tests.pretrained.support import FIXTURES

gguf = pytest.importorskip("gguf")

from tests.pretrained.gguf_files import random_llama, sentencepiece, stored_name, tensors_of, write_gguf  # noqa: E402

LLAMA = FIXTURES / "llama_clm_all" / "base"
IDS = [[5, 6, 7, 8, 9], [8, 1]]


def same_parameters(found, wanted):
    assert found.parameter_names() == wanted.parameter_names()
    for name in wanted.parameter_names():
        np.testing.assert_array_equal(found.get_parameter(name), wanted.get_parameter(name), err_msg=name)


# --- the same model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama_clm_all", "qwen2_clm_tied", "gpt2_clm"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_model_is_that_of_the_folder(tmp_path, case, dtype):
    folder = FIXTURES / case / "base"
    wanted = nblora.load_pretrained(folder, dtype=dtype)
    found = nblora.load_pretrained(write_gguf(tmp_path / "model.gguf", folder), dtype=dtype)
    same_parameters(found, wanted)
    np.testing.assert_array_equal(found(IDS), wanted(IDS))
    assert (found.task, found.model_type) == (wanted.task, wanted.model_type)


def test_an_adapter_of_the_folder_loads_on_the_file(tmp_path):
    held = np.load(LLAMA.parent / "io.npz")
    model = nblora.load_pretrained(write_gguf(tmp_path / "model.gguf", LLAMA), dtype="float64")
    model.load_adapter(LLAMA.parent / "adapter")
    found = model(held["input_ids"], held["attention_mask"])
    wanted = held["logits"] * held["attention_mask"][..., None]
    assert abs(found - wanted).max() < 1e-9 * abs(wanted).max()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_are_those_of_the_gguf_package(tmp_path, kind, dtype):
    path = write_gguf(tmp_path / "model.gguf", random_llama(tmp_path / "folder"), kind)
    with GGUFFile(path) as file:
        for tensor in gguf.GGUFReader(path).tensors:
            found = file.read_as(tensor.name, np.dtype(dtype))
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, gguf.dequantize(tensor.data, tensor.tensor_type), err_msg=tensor.name)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_quantised_model_is_that_of_its_numbers(tmp_path, kind):
    folder = random_llama(tmp_path / "folder", kind)
    found = nblora.load_pretrained(write_gguf(tmp_path / "model.gguf", folder, kind))
    same_parameters(found, nblora.load_pretrained(folder))


def test_a_tensor_of_several_pieces_is_whole(tmp_path):
    folder = random_llama(tmp_path / "folder", vocabulary=70001)
    path = write_gguf(tmp_path / "model.gguf", folder, "Q4_1")
    with GGUFFile(path) as file:
        assert file.tensors["token_embd.weight"].nbytes > 1 << 20
        tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
        found = file.read_as("token_embd.weight", np.dtype("float32"))
    np.testing.assert_array_equal(found, gguf.dequantize(tensor.data, tensor.tensor_type))


def test_biases_of_queries_and_keys_are_turned_back_too(tmp_path):
    folder = random_llama(tmp_path / "folder", attention_bias=True)
    from nblora.storage.safetensors_writer import write_safetensors

    held, rng = tensors_of(folder), np.random.default_rng(1)
    for layer in range(2):
        for part, size in {"q": 32, "k": 16, "v": 16, "o": 32}.items():
            held[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = rng.normal(size=size).astype("f4")
    write_safetensors(folder / "model.safetensors", held, {"format": "pt"})
    same_parameters(nblora.load_pretrained(write_gguf(tmp_path / "model.gguf", folder)), nblora.load_pretrained(folder))


def test_a_missing_head_is_the_table_and_so_is_an_equal_one(tmp_path):
    folder = random_llama(tmp_path / "folder")
    wanted = nblora.load_pretrained(folder)

    def twice(held):
        held["output.weight"] = held["token_embd.weight"]

    def other(held):
        held["output.weight"] = held["token_embd.weight"] + 1

    for change, tied in ((None, True), (twice, True), (other, False)):
        found = nblora.load_pretrained(write_gguf(tmp_path / "model.gguf", folder, tensors=change))
        assert found.config["tie_word_embeddings"] == tied
        assert ("lm_head.weight" in found.parameter_names()) != tied
        assert np.array_equal(found(IDS), wanted(IDS)) == tied


def test_other_tasks_load(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_llama(tmp_path / "folder"))
    model = nblora.load_pretrained(path, task="sequence-classification", num_labels=3, seed=0)
    assert model(IDS).shape == (2, 3)
    assert nblora.load_pretrained(path, task="embedding")(IDS).shape == (2, 32)


def test_the_memory_is_that_of_the_model_and_one_piece(tmp_path):
    """The peak beside the model's own arrays, of a file of 40 MB of Q8_0 whose model takes 150 MB."""
    path = write_gguf(
        tmp_path / "m.gguf", random_llama(tmp_path / "f", width=512, inner=4096, vocabulary=40000), "Q8_0"
    )
    code = (
        "import sys, resource, numpy as np, gguf, nblora, nblora.pretrained\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\nmodel = nblora.load_pretrained(sys.argv[1])\n"
        "held = sum(model.get_parameter(n).nbytes for n in model.parameter_names()) / 2**20\n"
        "print(peak() - before, held)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    used, held = map(float, done.stdout.split())
    assert held > 100
    assert used < 1.2 * held


# --- saving ------------------------------------------------------------------------------------------------------


def test_the_saved_folder_is_the_same_model_with_its_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_llama(tmp_path / "folder"), "Q8_0", more=sentencepiece)
    model = nblora.load_pretrained(path)
    model.save_pretrained(tmp_path / "saved")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(tmp_path / "saved")) == names
    same_parameters(nblora.load_pretrained(tmp_path / "saved"), model)
    assert "lm_head.weight" not in tensors_of(tmp_path / "saved")


def test_an_unknown_tokenizer_is_left_out_with_a_warning(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", LLAMA, more=lambda writer: writer.add_tokenizer_model("t5"))
    with pytest.warns(UserWarning, match=r"the tokenizer is not written: .*tokenizer.ggml.model is 't5'"):
        nblora.load_pretrained(path).save_pretrained(tmp_path / "saved")
    assert set(os.listdir(tmp_path / "saved")) == {"config.json", "model.safetensors"}


def test_a_saved_checkpoint_does_not_need_the_file(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", LLAMA)
    model = nblora.load_pretrained(path)
    model.save(tmp_path / "model.nblora")
    path.unlink()
    np.testing.assert_array_equal(nblora.load(tmp_path / "model.nblora")(IDS), model(IDS))


# --- what is refused ---------------------------------------------------------------------------------------------


def test_without_the_package_the_message_names_the_extra(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", random_llama(tmp_path / "folder"), "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nblora\[gguf\]'"):
        nblora.load_pretrained(path)


@pytest.mark.parametrize("kind", ["Q5_0", "Q6_K", "Q4_K", "IQ4_NL"])
def test_other_quantisations_are_named(tmp_path, kind):
    code = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[code]
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((97, 256 // numbers * size), np.uint8), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=rf"token_embd.weight' is of the type {kind}, .*supported are F32"):
        nblora.load_pretrained(path)


REFUSED = {
    "rope.scaling.type is 'linear'": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
    "rope.scaling.type is 'yarn'": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "rope.scaling.factor is 4": lambda w: w.add_rope_scaling_factor(4.0),
    "attention.sliding_window is 16": lambda w: w.add_sliding_window(16),
    "expert_count is 8": lambda w: w.add_expert_count(8),
    "logit_scale is 0.5": lambda w: w.add_logit_scale(0.5),
    "attention.key_length is 8, which|attention.value_length is 8, and": lambda w: w.add_value_length(8),
    "attention.causal is False": lambda w: w.add_causal_attention(False),
    "is one of 3 parts: join them first": lambda w: w.add_uint16("split.count", 3),
    "general.type is 'adapter'; expected a model": lambda w: w.add_type("adapter"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_changes_the_arithmetic_is_named(tmp_path, message):
    path = write_gguf(tmp_path / "model.gguf", LLAMA, more=REFUSED[message])
    with pytest.raises(FormatError, match=message):
        nblora.load_pretrained(path)


def test_what_changes_nothing_is_not_refused(tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_expert_count(0)
        writer.add_sliding_window(0)
        writer.add_key_length(6)
        writer.add_name("x")

    path = write_gguf(tmp_path / "model.gguf", LLAMA, more=more)
    np.testing.assert_array_equal(nblora.load_pretrained(path)(IDS), nblora.load_pretrained(LLAMA)(IDS))


def set_entry(writer, key, value):
    kind = gguf.GGUFValueType.get_type(value)
    writer.kv_data[0].pop(key, None)
    writer.add_key_value(key, value, kind)


def test_entries_for_each_layer_count_where_all_are_the_same(tmp_path):
    def more(writer, values):
        set_entry(writer, "llama.attention.head_count_kv", values)

    path = tmp_path / "model.gguf"
    found = nblora.load_pretrained(write_gguf(path, LLAMA, more=lambda writer: more(writer, [2, 2])))
    np.testing.assert_array_equal(found(IDS), nblora.load_pretrained(LLAMA)(IDS))
    with pytest.raises(FormatError, match=r"attention.head_count_kv differs between layers"):
        nblora.load_pretrained(write_gguf(path, LLAMA, more=lambda writer: more(writer, [2, 4])))


def test_missing_entries_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    for key in ("llama.block_count", "llama.attention.layer_norm_rms_epsilon", "llama.context_length"):
        with pytest.raises(FormatError, match=f"{key} is missing"):
            nblora.load_pretrained(write_gguf(path, LLAMA, more=lambda writer, key=key: writer.kv_data[0].pop(key)))
    qwen = FIXTURES / "qwen2_clm_tied" / "base"
    with pytest.raises(FormatError, match=r"attention.key_length is 8, not 24 / 4"):
        nblora.load_pretrained(write_gguf(path, qwen, more=lambda writer: (
            writer.add_key_length(8), set_entry(writer, "qwen2.rope.dimension_count", 8))))  # fmt: skip


def test_mapping_changes_nothing(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", LLAMA)
    same_parameters(nblora.load_pretrained(path, mmap=True), nblora.load_pretrained(LLAMA))


def test_factors_of_a_rope_scaling_are_named(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf", LLAMA, tensors=lambda held: held.update({"rope_freqs.weight": np.ones(3, "f4")})
    )
    with pytest.raises(FormatError, match=r"holds 'rope_freqs.weight', factors of a RoPE scaling"):
        nblora.load_pretrained(path)


def test_other_architectures_and_tensors_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(FormatError, match=r"general.architecture is 'mamba'; .*llama, qwen2, gpt2"):
        nblora.load_pretrained(write_gguf(path, LLAMA, architecture="mamba"))
    extra = np.ones(24, "f4")
    with pytest.raises(FormatError, match=r"holds the tensor 'blk.0.attn_q_norm.weight', which a llama does not have"):
        nblora.load_pretrained(write_gguf(path, LLAMA, tensors=lambda h: h.update({"blk.0.attn_q_norm.weight": extra})))
    with pytest.raises(FormatError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        nblora.load_pretrained(write_gguf(path, LLAMA, without=["blk.1.ffn_up.weight"]))
    with pytest.raises(FormatError, match=r"holds no tensor 'token_embd.weight'"):
        nblora.load_pretrained(write_gguf(path, LLAMA, without=["token_embd.weight"]))
    with pytest.raises(FormatError, match=r"layers.0.mlp.up_proj.weight has shape \(40, 23\), expected \(40, 24\)"):
        nblora.load_pretrained(
            write_gguf(path, LLAMA, tensors=lambda h: h.update({"blk.0.ffn_up.weight": np.ones((40, 23), "f4")}))
        )


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "model.gguf"
    for data, message in {
        b"": "is not a GGUF file",
        b"PK\3\4" + bytes(40): "is not a GGUF file",
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0): "of version 1; supported are versions 2 and 3",
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0): "of a big-endian machine",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60): "says that 1152921504606846976 entries follow",
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0): "says that 1152921504606846976 tensors follow",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0): "general.architecture is None",
    }.items():
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message):
            nblora.load_pretrained(path)
    with pytest.raises(FileNotFoundError):
        nblora.load_pretrained(tmp_path / "none.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(FormatError):
        nblora.load_pretrained(tmp_path / "folder.gguf")


def test_a_folder_of_a_file_names_the_file(tmp_path):
    write_gguf(tmp_path / "model.gguf", LLAMA)
    with pytest.raises(FormatError, match=r"holds no safetensors file but model.gguf: pass that file"):
        nblora.load_pretrained(tmp_path)


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (entry(b"k", 9, struct.pack("<IQ", 0, 2**60)), "numbers of the entry 'k' follow"),
        (entry(b"k", 9, struct.pack("<IQ", 8, 2**60)), "strings of the entry 'k' follow"),
        (entry(b"k", 9, struct.pack("<IQ", 9, 1)), "array of the unsupported type 9"),
        (entry(b"k", 8, struct.pack("<Q", 2**60)), "bytes of the entry 'k' follow"),
        (entry(b"k", 8, struct.pack("<Q", 1) + b"\xff"), "is not UTF-8"),
        (entry(b"k", 13, b"\0"), "of the unknown type 13"),
        (entry(b"general.alignment", 4, struct.pack("<I", 3)), "expected a power of two"),
        (entry(b"general.alignment", 4, struct.pack("<I", 0)), "expected a power of two"),
    ],
)
def test_a_header_that_lies(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + content)
    with pytest.raises(FormatError, match=message):
        nblora.load_pretrained(path)


def test_an_entry_that_occurs_twice(tmp_path):
    path, one = tmp_path / "model.gguf", entry(b"key", 8, struct.pack("<Q", 1) + b"x")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + one + one)
    with pytest.raises(FormatError, match="the entry 'key' occurs twice"):
        nblora.load_pretrained(path)


def test_the_memory_of_strings_is_bounded(tmp_path):
    path = tmp_path / "model.gguf"
    strings = struct.pack("<IQ", 8, 2_100_000) + bytes(8 * 2_100_000)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry(b"key", 9, strings))
    with pytest.raises(FormatError, match="holds more than the 2000000 strings"):
        nblora.load_pretrained(path)


def tensor(name, shape, code, offset):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", code, offset)
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor(b"a", [2**40, 2**40], 0, 0)], "has 4835703278458516698824704 bytes"),
        ([tensor(b"a", [8], 0, 0), tensor(b"a", [8], 0, 32)], "two tensors have the same name"),
        ([tensor(b"a", [8], 0, 0), tensor(b"b", [8], 0, 0)], "overlap"),
        ([tensor(b"a", [8], 0, 4)], "which the alignment 32 does not divide"),
        ([tensor(b"a", [8], 0, 64)], "the file is cut"),
        ([tensor(b"a", [8], 0, 2**63)], "the file is cut"),
        ([tensor(b"a", [31], 8, 0)], r"expected rows of 32·n"),
        ([tensor(b"a", [0], 0, 0)], "has the shape"),
        ([tensor(b"a", [1] * 5, 0, 0)], "has 5 axes"),
        ([tensor(b"a", [8], 99, 0)], "is of the type 99, which is not supported"),
    ],
)
def test_tensors_that_lie(tmp_path, tensors, message):
    path = tmp_path / "model.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0) + b"".join(tensors)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(64))
    with pytest.raises(FormatError, match=message):
        nblora.load_pretrained(path)


def test_a_file_of_a_wide_alignment_reads(tmp_path):
    def more(writer):
        writer.add_custom_alignment(1024)

    path = write_gguf(tmp_path / "model.gguf", LLAMA, more=more)
    np.testing.assert_array_equal(nblora.load_pretrained(path)(IDS), nblora.load_pretrained(LLAMA)(IDS))


def test_cut_files_are_refused_wherever_they_end(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", LLAMA, more=sentencepiece).read_bytes()
    path = tmp_path / "model.gguf"
    for stop in [*range(0, 2000, 37), *range(2000, len(whole), 997)]:
        path.write_bytes(whole[:stop])
        with pytest.raises(FormatError):
            nblora.load_pretrained(path)


def test_every_entry_of_another_type_is_refused_or_read(tmp_path):
    """Each entry of the architecture and of the tokenizer, in turn, as another type of value."""
    values = [0, 1, -1, 2**63, 1.5, float("nan"), True, "x", ["a"], [1, 2]]
    keys = ["block_count", "embedding_length", "feed_forward_length", "context_length", "rope.freq_base"]
    keys += ["attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"]
    path = tmp_path / "model.gguf"
    for key in keys:
        for value in values:

            def more(writer, key=key, value=value):
                kind = gguf.GGUFValueType.UINT64 if value == 2**63 else gguf.GGUFValueType.get_type(value)
                writer.kv_data[0].pop(f"llama.{key}", None)
                writer.add_key_value(f"llama.{key}", value, kind)

            write_gguf(path, LLAMA, more=more)
            with contextlib.suppress(FormatError):
                nblora.load_pretrained(path)


def test_damaged_files_are_refused_or_read(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", LLAMA, more=sentencepiece).read_bytes()
    path, outcomes = tmp_path / "model.gguf", set()
    for number in range(300):
        path.write_bytes(mutation.damage(random.Random(number), whole))
        try:
            nblora.load_pretrained(path)
            outcomes.add("read")
        except FormatError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_stored_names_are_llama_cpps():
    """The names that this file's helper gives are those of the gguf package's own map."""
    maps = {arch: gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), 2) for arch in ("LLAMA", "QWEN2", "GPT2")}
    for case, arch in {"llama_clm_all": "LLAMA", "qwen2_clm_tied": "QWEN2", "gpt2_clm": "GPT2"}.items():
        for name in tensors_of(FIXTURES / case / "base"):
            theirs = maps[arch].get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
            assert stored_name(name) == (theirs or maps[arch].get_name(name, try_suffixes=(".weight", ".bias")))
