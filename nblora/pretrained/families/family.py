"""What a family of models states: its body, its heads, and the names of its tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nblora.layers import Embedding, Layer

from ..blocks import Block
from ..config import Config
from ..source import Source


class TextBody(Block, abstract=True):
    """Makes rows of features of tokens.

    Attributes
    ----------
    longest : int or None
        Tokens of the longest sequence that positions are stored for, None where they are computed.
    """

    longest: int | None = None

    @property
    def table(self) -> Embedding | Any:
        """The words' table, or an adapter around it."""
        raise NotImplementedError


def _no_layers(config: Config, source: Source) -> dict[str, Layer]:
    """No layers, for families whose class has none beside body and head."""
    return {}


def _no_dropouts(config: Config) -> dict[str, float]:
    """No dropout, for families whose heads have none."""
    return {}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes
    ----------
    called : str
        What the names of its classes in transformers begin with.
    prefix : str
        What the names of the body's tensors begin with; a file of the bare body lacks it.
    body : callable
        Makes the body: (config, source, prefix).
    tasks : tuple of str
        What it can be loaded for.
    classifier : callable
        Makes the layers of the classification head by their names: (config, source, labels).
    head : tuple of str
        Those of them that are drawn where a file lacks them, and trained.
    dropouts : callable
        What is dropped in `fit(base_dropout=True)` before layers of the head: (config).
    place : {"first", "last", None}
        The row of a sequence that they read.
    pooler : str
        A layer of the body that only the classification computes, drawn like the head where a file lacks it.
    idle : callable
        Makes the layers that an embedding keeps and does not compute: (config, source).
    tied : bool
        Whether a file that says nothing ties the language head to the table.
    renames : tuple of pairs
        Expressions of other spellings, and what the model's class calls them.
    adapter_names : tuple of pairs
        Expressions of names, and how PEFT calls these modules today.
    unused : tuple of str
        Expressions of tensors that a task may leave, beside heads.
    buffers : tuple of str
        Expressions of tensors that are no parameters.
    """

    called: str
    prefix: str
    body: Callable[[Config, Source, str], Any]
    tasks: tuple[str, ...]
    classifier: Callable[[Config, Source, int], Mapping[str, Layer]]
    head: tuple[str, ...]
    place: str | None
    dropouts: Callable[[Config], Mapping[str, float]] = _no_dropouts
    pooler: str = ""
    idle: Callable[[Config, Source], Mapping[str, Layer]] = _no_layers
    tied: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    adapter_names: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def architecture(self, task: str) -> str:
        """The class of transformers for a task."""
        if task == "causal-lm" and self.called == "GPT2":
            return "GPT2LMHeadModel"
        return self.called + TASKS[task]

    @property
    def of_images(self) -> bool:
        """Whether it reads images, and not text."""
        return "image-classification" in self.tasks

    def own_name(self, name: str, bare: bool = False) -> str:
        """What the model's class calls a tensor, or a layer, that is spelled in another way; `bare`: without prefix."""
        for pattern, replacement in (*_RENAMES, *self.renames):
            name = re.sub(pattern, replacement, name)
        if bare and not f"{name}.".startswith(_HEADS):
            name = f"{self.prefix}.{name}"
        return name

    def is_bare(self, names: list[str]) -> bool:
        """Whether names of tensors or layers are those of a file of the body alone."""
        return not any(name.startswith(f"{self.prefix}.") for name in names)

    def adapter_name(self, name: str) -> str:
        """What PEFT calls the layer of this name."""
        for pattern, replacement in self.adapter_names:
            name = re.sub(pattern, replacement, name)
        return name

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is no parameter."""
        return any(re.search(pattern, name) for pattern in (*_BUFFERS, *self.buffers))

    def is_unused(self, name: str) -> bool:
        """Whether a task may leave a tensor: another task's head."""
        return not name.startswith(f"{self.prefix}.") or any(re.search(pattern, name) for pattern in self.unused)


TASKS = {
    "sequence-classification": "ForSequenceClassification",
    "causal-lm": "ForCausalLM",
    "image-classification": "ForImageClassification",
    "embedding": "Model",
}
"""Every task, and how the names of transformers' classes for it end."""
_RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_BUFFERS = (r"(^|\.)position_ids$", r"(^|\.)num_batches_tracked$", r"(^|\.)inv_freq$", r"embeddings\.token_type_ids$")
_HEADS = ("classifier.", "pre_classifier.", "score.", "lm_head.", "cls.", "qa_outputs.", "vocab_")
