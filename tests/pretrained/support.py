"""What tests of pretrained models share: the fixtures and their names."""

import numpy as np

from nblora.pretrained.families import FAMILIES
from tests.processes import ROOT

FIXTURES = ROOT / "tests" / "data" / "models"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
PREFIX = "base_model.model."
PARTS = {
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "miss_block": "block",
}


def relative_to_largest(found, exact):
    return float(np.max(np.abs(found - exact), initial=0)) / max(float(np.max(np.abs(exact), initial=0)), 1e-300)


def outputs(held, name):
    """Logits of the file; zeros at padding where there is one for every token."""
    logits = held[name]
    return logits * held["attention_mask"][..., None] if logits.ndim == 3 else logits


def targets(held, logits):
    """Labels as the loss compares logits with them: of language each token's next."""
    if logits.ndim == 2:
        return held["labels"]
    return np.concatenate([held["labels"][:, 1:], np.full((len(logits), 1), -100)], axis=1)


def own_name(name):
    """A tensor of an adapter's file as nblora calls the parameter."""
    short = name.removeprefix(PREFIX)
    for family in FAMILIES.values():
        if short.startswith(f"{family.prefix}."):
            short = family.own_name(short)
    for part, own in PARTS.items():
        if short.endswith(part):
            return short.removesuffix(part) + own
    return short


def logical(name, array):
    """An array of an adapter's file in the parameter's logical shape."""
    if name.endswith("embed_tokens.weight"):
        return array
    if name.endswith("lora_magnitude_vector"):
        return array.reshape(-1)
    if name.endswith("miss_block"):
        return array
    return array.reshape(len(array), -1).T if array.ndim > 1 else array


def of_file(held, kind):
    """The entries of a kind: their names, the parameters' own, and the arrays in logical shapes."""
    for key, value in held.items():
        if key.startswith(kind):
            name = key.removeprefix(kind)
            yield key, own_name(name), logical(name, value)
