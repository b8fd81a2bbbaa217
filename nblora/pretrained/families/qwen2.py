"""Qwen2 (Yang et al., 2024): Llama's decoder, with biases of queries, keys and values."""

from ..config import Config
from ..source import Source
from . import llama
from .family import Family


def body(config: Config, source: Source, name: str) -> llama.Decoder:
    """The decoder."""
    config.expect("use_sliding_window", False, None)
    kinds = config.raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise config.fault("layer_types holds another kind than 'full_attention': a sliding window is not supported")
    return llama.Decoder(config, source, name, (True, False))


FAMILY = Family(
    called="Qwen2",
    prefix="model",
    body=body,
    tasks=("causal-lm", "sequence-classification", "embedding"),
    classifier=llama.classifier,
    head=("score",),
    place="last",
)
