"""GGUF files, llama.cpp's format, as checkpoints: the `config.json` that transformers would have, and its names.

llama.cpp's conversion undone here (convert_hf_to_gguf.py): names; of Llama the order of rows of queries and keys, which
its rotary positions turn in pairs of neighbours and transformers' in halves; of GPT-2 the weights, which it stores
(out, in); a tied head, which is left out.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles
from nblora.storage.gguf_reader import GGUFFile
from nblora.storage.safetensors_reader import TensorInfo

from .config import shortened
from .families import FAMILIES

SUFFIX = ".gguf"
_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_LAYERS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_HARMLESS = {
    "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.causal",
}  # fmt: skip
_ARITHMETIC = re.compile(r"rope\.|attention\.|expert|ssm\.|.*(scal|softcap|parallel|sliding|clamp|swin)")
"""Entries of an architecture that change what is computed, unless they are in `_HARMLESS`."""


class Architecture(NamedTuple):
    """How GGUF files describe one family.

    Attributes
    ----------
    stems : dict
        transformers' names of the tensors without a layer.
    layers : str
        What the names of layers begin with.
    parts : dict
        transformers' names of a layer's parts.
    fields : dict
        Entries, and what `config.json` calls them.
    turned : tuple of str
        Parts whose weights transformers stores (in, out).
    permuted : bool
        Whether rows of queries and keys are in llama.cpp's order.
    """

    stems: dict[str, str]
    layers: str
    parts: dict[str, str]
    fields: dict[str, str]
    turned: tuple[str, ...] = ()
    permuted: bool = False


_DECODER_STEMS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DECODER_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
ARCHITECTURES = {
    "llama": Architecture(_DECODER_STEMS, "model.layers", _LAYERS, _DECODER_FIELDS, permuted=True),
    "qwen2": Architecture(_DECODER_STEMS, "model.layers", _LAYERS, _DECODER_FIELDS),
    "gpt2": Architecture(
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        "transformer.h",
        _GPT2_LAYERS,
        {
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "context_length": "n_positions",
        },
        turned=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}
_OPTIONAL = {"attention.head_count_kv", "rope.freq_base"}
_SPECIAL_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


@contextmanager
def open_gguf(path: str | os.PathLike[str]) -> Iterator[ModelFiles]:
    """Open a GGUF file as a checkpoint, its tensors under transformers' names.

    Raises
    ------
    FormatError
        If the file is broken, of an unknown architecture, or says what is not supported.
    OSError
        If it cannot be read.
    """
    with GGUFFile(path) as file:
        translated = _Translated(file)
        yield ModelFiles(Path(path), [translated], config=translated.config)  # type: ignore[list-item]  # reads alike


class _Translated:
    """A GGUF file that reads like a safetensors file of the same model.

    Attributes
    ----------
    tensors : dict of str to TensorInfo
        Shapes as transformers has them; quantised numbers are float32, as which they are read.
    config : dict
        What `config.json` would say.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.path, self._file = file.path, file
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self.fault(
                f"general.architecture is {shortened(name)}; the architectures that can be loaded: {known}"
            )
        self._prefix, self._kind = f"{name}.", ARCHITECTURES[name]
        self._check_entries()
        self._names: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for info in file.tensors.values():
            own = self._own_name(info.name)
            shape = info.shape[::-1] if self._is_turned(info.name) else info.shape
            self._names[own] = info.name
            self.tensors[own] = TensorInfo(own, "F32", shape, info.start, info.stop)
        tied = self._drop_tied_head()
        self.config = self._config(tied)

    def fault(self, text: str) -> FormatError:
        """An error of this file."""
        return FormatError(f"{self.path}: {text}")

    def read_as(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Return one tensor in this dtype, in the layout of transformers."""
        stored = self._names[name]
        array = self._file.read_as(stored, dtype)
        if self._is_turned(stored):
            return np.ascontiguousarray(array.T)
        if self._kind.permuted and (found := re.search(r"\.attn_([qk])\.", stored)):
            field = "num_attention_heads" if found[1] == "q" else "num_key_value_heads"
            return _in_halves(array, self.config[field])
        return array

    def mapped(self, name: str) -> np.ndarray:
        """The same in float32: what is quantised cannot be mapped."""
        return self.read_as(name, np.dtype("float32"))

    # --- names -------------------------------------------------------------------------------------------------

    def _own_name(self, stored: str) -> str:
        stem, _, end = stored.rpartition(".")
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        own = (
            f"{self._kind.layers}.{found[1]}.{self._kind.parts.get(found[2])}" if found else self._kind.stems.get(stem)
        )
        if "rope_freqs" in stem or "rope_factors" in stem:
            raise self.fault(f"holds {stored!r}, factors of a RoPE scaling: only the default RoPE is supported")
        if own is None or own.endswith(".None") or end not in ("weight", "bias"):
            raise self.fault(f"holds the tensor {stored!r}, which a {self._prefix[:-1]} does not have")
        return f"{own}.{end}"

    def _is_turned(self, stored: str) -> bool:
        parts = stored.split(".")
        return len(parts) == 4 and parts[2] in self._kind.turned and parts[3] == "weight"

    def _drop_tied_head(self) -> bool:
        """Whether the head is the table: it is left out, or stored twice."""
        head, table = (self._file.tensors.get(f"{name}.weight") for name in ("output", "token_embd"))
        if head is None or table is None:
            return head is None
        if (head.dtype, head.shape) != (table.dtype, table.shape):
            return False
        if self._file.bytes_of(head.name) != self._file.bytes_of(table.name):
            return False
        del self.tensors["lm_head.weight"]
        return True

    # --- config.json -------------------------------------------------------------------------------------------

    def _check_entries(self) -> None:
        """FormatError for what is no whole model, and for what changes the arithmetic and is not supported."""
        kind, parts = (self._file.metadata.get(key) for key in ("general.type", "split.count"))
        if kind not in (None, "model"):
            raise self.fault(f"general.type is {shortened(kind)}; expected a model")
        if parts not in (None, 0, 1):
            raise self.fault(f"is one of {shortened(parts)} parts: join them first (llama-gguf-split --merge)")
        scaling = self._entry("rope.scaling.type")
        if scaling not in (None, "none"):
            raise self.fault(f"{self._prefix}rope.scaling.type is {shortened(scaling)}: no RoPE scaling is supported")
        for key, value in self._file.metadata.items():
            name = key.removeprefix(self._prefix)
            if name == key or name in _HARMLESS or not _ARITHMETIC.match(name):
                continue
            if isinstance(value, int | float) and (not value or (value == 1 and name.startswith("rope.scal"))):
                continue  # no experts, no window, a factor of 1
            raise self.fault(f"{key} is {shortened(value)}, which is not supported")
        if self._entry("attention.causal") is False:
            raise self.fault(f"{self._prefix}attention.causal is False, which is not supported")

    def _config(self, tied: bool) -> dict[str, Any]:
        kind, metadata = self._kind, self._file.metadata
        config: dict[str, Any] = {
            "architectures": [FAMILIES[self._prefix[:-1]].architecture("causal-lm")],
            "model_type": self._prefix[:-1],
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
        }
        for entry, field in kind.fields.items():
            value = self._single(entry)
            if value is None and entry not in _OPTIONAL:
                raise self.fault(f"{self._prefix}{entry} is missing")
            if value is not None:
                config[field] = value
        table = self._file.tensors.get("token_embd.weight")
        if table is None:
            raise self.fault("holds no tensor 'token_embd.weight'")
        config["vocab_size"] = table.shape[0]
        for entry, field in _SPECIAL_IDS.items():
            value = metadata.get(f"tokenizer.ggml.{entry}")
            config[field] = value if type(value) is int and value < table.shape[0] else None
        return config | ({"activation_function": "gelu_new"} if "n_head" in config else self._decoder(config))

    def _decoder(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What Llama and Qwen2 have beside the fields that both name."""
        width, heads = config["hidden_size"], config["num_attention_heads"]
        if type(heads) is not int or type(width) is not int or heads < 1:
            raise self.fault(f"{self._prefix}attention.head_count is {shortened(heads)}; expected a positive integer")
        size = self._single("attention.key_length") or width // heads
        for entry in ("attention.value_length", "rope.dimension_count"):
            other = self._single(entry)
            if other not in (None, size):
                raise self.fault(f"{self._prefix}{entry} is {shortened(other)}, and a head has {size} features")
        found = {
            "hidden_act": "silu",
            "num_key_value_heads": config.get("num_key_value_heads", heads),
            "rope_theta": config.get("rope_theta", 10000.0),
            "rope_parameters": {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
        }
        if self._kind.permuted:  # Llama states what Qwen2 has fixed
            biases = {part for part in ("attn_q", "ffn_up") if f"blk.0.{part}.bias" in self._file.tensors}
            return found | {"head_dim": size, "attention_bias": "attn_q" in biases, "mlp_bias": "ffn_up" in biases}
        if size * heads != width:
            raise self.fault(f"{self._prefix}attention.key_length is {size}, not {width} / {heads}")
        return found

    def _entry(self, name: str) -> Any:
        return self._file.metadata.get(f"{self._prefix}{name}")

    def _single(self, name: str) -> Any:
        """An entry of a number, which may be given for each layer where all have the same."""
        value = self._entry(name)
        if isinstance(value, np.ndarray):
            if len(value) == 0 or (value != value[0]).any():
                raise self.fault(f"{self._prefix}{name} differs between layers, which is not supported")
            value = value[0].item()
        if value is not None and (type(value) not in (int, float)):
            raise self.fault(f"{self._prefix}{name} is {shortened(value)}; expected a number")
        return _shortest(value) if isinstance(value, float) else value


def _in_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head, of which llama.cpp has those that turn together side by side, as two halves; the model's sizes
    were asked for, so that they are pairs."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _shortest(value: float) -> float:
    """The decimal number that was stored as a float32: 1e-05, not 9.999999747378752e-06."""
    narrow = np.float32(value)
    return float(str(narrow)) if narrow == value else value
