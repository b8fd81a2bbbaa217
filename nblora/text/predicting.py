"""What a model makes of texts: logits of a classification, or features, texts of like length together."""

import os
from collections.abc import Callable

import numpy as np

from nblora import checks
from nblora.layers import tree
from nblora.pretrained import TextModel
from nblora.training.run import restore_modes

from .tokens import Encoding, Tokenizer

PathLike = str | os.PathLike[str]


def inputs_of(model: TextModel, encoding: Encoding) -> dict[str, list[np.ndarray]]:
    """Tokens as a model is called with them: the kinds of two texts only where it tells them apart."""
    inputs = {"input_ids": encoding.ids}
    types = getattr(getattr(model.body, "embeddings", None), "types", None)
    if types is not None and types.in_features > 1 and any(kinds.any() for kinds in encoding.kinds):
        inputs["token_type_ids"] = encoding.kinds
    return inputs


def longest_text(model: TextModel, tokenizer: Tokenizer, max_length: int | None) -> int | None:
    """Tokens to cut texts at: as many as were asked for, as the tokenizer allows, and as the model has positions."""
    asked = None if max_length is None else checks.check_integer("max_length", max_length, 1)
    limits = [limit for limit in (asked, tokenizer.longest, model.body.longest) if limit is not None]
    return min(limits, default=None)


def outputs_of(
    model: TextModel, encoding: Encoding, batch_size: int = 32, progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """The model's outputs for each text, in evaluation mode, in the order of the texts.

    Parameters
    ----------
    model : TextModel
        With an output for each text.
    encoding : Encoding
    batch_size : int
        Texts that are computed at once.
    progress : callable, optional
        Called with the number of texts of each batch that is done.

    Returns
    -------
    ndarray of the model's dtype, shape (n, outputs)
    """
    size = checks.check_integer("batch_size", batch_size, 1)
    inputs = inputs_of(model, encoding)
    result = np.empty((len(encoding.ids), model.out_features), model.dtype)
    order = np.argsort([-len(each) for each in encoding.ids], kind="stable")
    modes = tree.modes(model)
    try:
        model.eval()
        with model._backend.lending():
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                result[chosen] = model(**{name: [part[place] for place in chosen] for name, part in inputs.items()})
                if progress is not None:
                    progress(len(chosen))
    finally:
        restore_modes(modes)
    return result
