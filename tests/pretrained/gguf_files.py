"""GGUF files for tests, made of transformers' folders as llama.cpp's convert_hf_to_gguf.py makes them."""

import json

import gguf
import numpy as np

from nblora.storage.safetensors_reader import SafetensorsFile
from nblora.storage.safetensors_writer import write_safetensors

_STEMS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "score": "cls",
}  # fmt: skip
_PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip


def tensors_of(folder):
    with SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.array(name) for name in file.tensors}


def stored_name(name):
    stem, _, end = name.rpartition(".")
    parts = stem.split(".")
    if len(parts) > 3:
        return f"blk.{parts[2]}.{_PARTS['.'.join(parts[3:])]}.{end}"
    return f"{_STEMS[stem]}.{end}"


def permuted(array, heads):
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    parts = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return parts.swapaxes(1, 2).reshape(array.shape)


def as_stored(name, array, config):
    if config["model_type"] == "llama" and "q_proj" in name:
        return permuted(array, config["num_attention_heads"])
    if config["model_type"] == "llama" and "k_proj" in name:
        return permuted(array, config["num_key_value_heads"])
    turned = config["model_type"] == "gpt2" and array.ndim == 2 and ".c_" in name
    return np.ascontiguousarray(array.T) if turned else array


def described(writer, config):
    """Add a model's sizes."""
    llama = "hidden_size" in config
    width, heads = (
        (config["hidden_size"], config["num_attention_heads"]) if llama else (config["n_embd"], config["n_head"])
    )
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    if llama:
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_rope_dimension_count(config.get("head_dim", width // heads))
        writer.add_vocab_size(config["vocab_size"])
    else:
        writer.add_context_length(config["n_positions"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config["n_inner"] or 4 * width)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def write_gguf(path, folder, kind="F32", *, more=None, without=(), tensors=None, architecture=None):
    """Write a GGUF file of a folder's model.

    Parameters
    ----------
    kind : str
        Type of the matrices; the rest is F32.
    more : callable, optional
        Adds entries to the writer.
    without : collection of str
        Tensors, by GGUF's names, that are left out.
    tensors : callable, optional
        Changes the arrays, by GGUF's names.
    """
    config = json.loads((folder / "config.json").read_text())
    held = {stored_name(name): as_stored(name, array, config) for name, array in tensors_of(folder).items()}
    if tensors is not None:
        tensors(held)
    writer = gguf.GGUFWriter(path, architecture or config["model_type"])
    described(writer, config)
    if more is not None:
        more(writer)
    for name, array in held.items():
        if name in without:
            continue
        if array.ndim == 2 and kind != "F32":
            code = gguf.GGMLQuantizationType[kind]
            blocks = gguf.quantize(array, code)
            writer.add_tensor(name, blocks, raw_dtype=code)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_llama(folder, kind="F32", *, width=32, inner=64, vocabulary=97, seed=0, **config):
    """Write a small Llama whose matrices are those that a GGUF of this kind has: random, quantised and back."""
    raw = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
    } | config  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for layer in (f"model.layers.{n}" for n in range(2)):
        sizes = {"q": (width, width), "k": (width // 2, width), "v": (width // 2, width), "o": (width, width)}
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": shape for part, shape in sizes.items()}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        array = rng.normal(scale=0.3 if len(shape) == 2 else 1.0, size=shape).astype(np.float32)
        if len(shape) == 2 and kind != "F32":
            code = gguf.GGMLQuantizationType[kind]
            array = gguf.dequantize(gguf.quantize(array, code), code)
        tensors[name] = array
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def sentencepiece(writer, size=97):
    """Add a vocabulary of so many tokens, of SentencePiece's kind, and a chat template."""
    letters = [*"▁abcdefgh", "▁a"]
    count = size - 3 - len(letters)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(count)), *letters])
    writer.add_token_types([2, 3, 3, *[6] * count, *[1] * len(letters)])
    writer.add_token_scores([0.0] * (3 + count) + [-float(n) for n in range(len(letters))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
