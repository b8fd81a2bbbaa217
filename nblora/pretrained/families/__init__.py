"""Families of models: one file each, and one line here."""

from . import bert, distilbert, gpt2, llama, qwen2, resnet, roberta, vit
from .family import Family

FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "distilbert": distilbert.FAMILY,
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "resnet": resnet.FAMILY,
    "roberta": roberta.FAMILY,
    "vit": vit.FAMILY,
}
"""By the `model_type` of their `config.json`."""

__all__ = ["FAMILIES", "Family"]
