"""What a model makes of texts: labels with probabilities, or embeddings, texts of like length together."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from nblora import checks
from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.layers import tree
from nblora.linalg import softmax
from nblora.pretrained import TextModel, load_pretrained
from nblora.pretrained.labels import labels_of, name_labels
from nblora.storage.bounded import parse_object, read_bounded
from nblora.training.run import restore_modes

from .labels import read_labels
from .tokens import Encoding, Tokenizer, load_tokenizer

PathLike = str | os.PathLike[str]
CLASSES, LANGUAGE, EMBEDDING = "sequence-classification", "causal-lm", "embedding"
_TASKS = {"SEQ_CLS": CLASSES, "CAUSAL_LM": LANGUAGE, "FEATURE_EXTRACTION": EMBEDDING}


@dataclass(frozen=True)
class Predictor:
    """A model with its adapter, its tokenizer and its labels. Made by `load_predictor`.

    Attributes
    ----------
    model : TextModel
        Of the task "sequence-classification" or "embedding".
    tokenizer : Tokenizer
    labels : list of str or None
        What the classes are called, in the order of the outputs; None of an embedding.
    max_length : int or None
        Tokens that texts are cut at.
    """

    model: TextModel
    tokenizer: Tokenizer
    labels: list[str] | None
    max_length: int | None

    def outputs(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Logits or embeddings of texts.

        Parameters
        ----------
        texts : list of str
        pairs : list of str, optional
            A second text for each, for a classification.
        batch_size : int
            Texts that are computed at once.
        progress : callable, optional
            Called with the number of texts of each batch that is done.

        Returns
        -------
        ndarray of float32, shape (n, labels) or (n, features)
        """
        from .encoding import sentence_encoding

        if self.labels is None:
            if pairs is not None:
                raise ValueError("pairs of texts are for a classification, and this model makes embeddings")
            encoding = sentence_encoding(self.model, texts)
        else:
            encoding = self.tokenizer.encode(texts, pairs, max_length=self.max_length)
        return outputs_of(self.model, encoding, batch_size, progress)

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None, **options: Any) -> list[dict[str, Any]]:
        """What a line of `nblora predict` says of each text: label and probabilities, or an embedding.

        Parameters
        ----------
        texts, pairs, **options
            As in `outputs`.

        Returns
        -------
        list of dict
            `{"label": ..., "probabilities": {label: ...}}`, or `{"embedding": [...]}`.
        """
        outputs = self.outputs(texts, pairs, **options)
        if self.labels is None:
            return [{"embedding": row} for row in outputs.tolist()]
        names, shares = self.labels, softmax(outputs).tolist()
        best = outputs.argmax(axis=1).tolist()
        return [
            {"label": names[place], "probabilities": dict(zip(names, row, strict=True))}
            for place, row in zip(best, shares, strict=True)
        ]


def load_predictor(model: PathLike, adapter: PathLike | None = None, *, max_length: int | None = None) -> Predictor:
    """Load a model, and an adapter of it, to predict with.

    Parameters
    ----------
    model : path-like
        The folder or GGUF file that the adapter was made for; or a folder with a head of its own.
    adapter : path-like, optional
        A folder that `nblora finetune`, `TextClassifier.save_adapter` or PEFT wrote. Labels are those of its
        `labels.json`, else of the model's `config.json`.
    max_length : int, optional
        Tokens that texts are cut at; by default as many as in training, as far as the folder says (`finetune.json`),
        and the model's positions.

    Raises
    ------
    FormatError
        For an adapter of a causal model, a head that nothing was learnt of, and what is broken.
    OSError
        For what cannot be read.
    """
    folder = Path(model if adapter is None else adapter)
    labels = read_labels(folder) if folder.is_dir() else None
    task = CLASSES if labels is not None else None if adapter is None else adapter_task(folder)
    count = None if labels is None else len(labels)
    loaded = cast(TextModel, load_pretrained(model, task=task, num_labels=count, seed=0))
    if not isinstance(loaded, TextModel):
        raise FormatError(f"{model}: is a model of images; predict reads texts")
    if loaded.task == LANGUAGE:
        raise FormatError(f"{folder}: is of a causal language model, which has no labels: nblora generate is for it")
    if adapter is not None:
        loaded.load_adapter(adapter)
    if loaded.task == CLASSES:
        _check_head(loaded, folder)
        labels = labels_of(loaded) if labels is None else labels
        name_labels(loaded, labels)
    tokenizer = load_tokenizer(model)
    asked = _trained_length(folder) if max_length is None else max_length
    return Predictor(loaded, tokenizer, labels, longest_text(loaded, tokenizer, asked))


def adapter_task(folder: Path) -> str | None:
    """What an adapter says that it is for."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FormatError(f"{folder}: holds no adapter_config.json; expected the folder of an adapter")
    said = parse_object(read_bounded(path, MAX_JSON), path).get("task_type")
    return _TASKS.get(said) if isinstance(said, str) else None


def _check_head(model: TextModel, folder: Path) -> None:
    """FormatError where the head is still the one that was drawn, since no file had one."""
    brought = {name for name, layer in model.named_layers() if layer.trainable} if model.active_adapters else set()
    drawn = [name for name in model._origin.drawn if name in model.head.own and not model.active_adapters]
    if drawn or (model._origin.drawn and not brought & set(model.head.own)):
        raise FormatError(
            f"{folder}: has no head for a classification: tune one with nblora finetune, or name its adapter"
        )


def _trained_length(folder: Path) -> int | None:
    """Tokens that texts were cut at in training, as far as it is known."""
    path = folder / "finetune.json"
    if not path.is_file():
        return None
    settings = parse_object(read_bounded(path, MAX_JSON), path).get("settings")
    found = settings.get("max_length") if isinstance(settings, dict) else None
    return found if type(found) is int and found > 0 else None


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
