"""`encode`: sentence embeddings, as sentence-transformers computes them."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.pretrained import TextModel
from nblora.storage.bounded import parse_object, read_bounded

from .predicting import outputs_of
from .tokens import Encoding, Tokenizer, load_tokenizer

_SETTINGS = ("bert", "roberta", "distilbert")
"""What a sentence_..._config.json may be called by."""


def encode(model: TextModel, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
    """Compute the embeddings of texts.

    Texts are tokenised with the model's special tokens and cut at the length that the folder's
    `sentence_bert_config.json` says, else at the model's positions. Texts of like length are computed together, none is
    padded, and the results come in the order of the texts.

    Parameters
    ----------
    model : TextModel
        Of the task "embedding".
    texts : list of str
    batch_size : int
        Texts that are computed at once.

    Returns
    -------
    ndarray of the model's dtype, shape (n, features)

    Raises
    ------
    TypeError
        For texts that are none; one text is a list of one.
    ValueError
        For a model of another task, or whose folder is not known.
    MissingExtraError
        Without the `tokenizers` package: `pip install 'nblora[text]'`.
    FormatError
        For a folder without a tokenizer, and one that is broken.
    """
    if not isinstance(model, TextModel) or model.task != "embedding":
        what = f"a model of the task {model.task!r}" if isinstance(model, TextModel) else type(model).__name__
        raise ValueError(f"model must be one of the task 'embedding', got {what}: load_pretrained(task='embedding')")
    checks.check_integer("batch_size", batch_size, 1)
    return outputs_of(model, sentence_encoding(model, texts), batch_size)


def sentence_encoding(model: TextModel, texts: Sequence[str]) -> Encoding:
    """The tokens of texts as the model's folder says: cut, and behind its prompt where there is one."""
    tokenizer, longest, prompt = sentence_settings(model)
    if not prompt:
        return tokenizer.encode(texts, max_length=longest)
    tokenizer.encode(texts, special=False)  # a fault is that of the texts as they came
    return tokenizer.encode([prompt + text for text in texts], max_length=longest)


def sentence_settings(model: TextModel) -> tuple[Tokenizer, int | None, str]:
    """A model's tokenizer, the tokens of its longest text, and what is put before each text."""
    source = model.source
    if not source or not Path(source).exists():
        raise ValueError(f"the model came from {source or 'no folder'!r}, which is not there: its tokenizer is needed")
    files = sorted(os.listdir(source)) if Path(source).is_dir() else []
    signature = tuple((name, os.stat(Path(source, name)).st_mtime_ns) for name in files) or os.stat(source).st_mtime_ns
    tokenizer, said, prompt = _read_settings(source, signature)
    positions = model.body.longest
    limits = [limit for limit in (said or tokenizer.longest, positions) if limit is not None]
    return tokenizer, min(limits, default=None), prompt


@functools.lru_cache(maxsize=4)
def _read_settings(source: str, signature: Any) -> tuple[Tokenizer, int | None, str]:
    """What the files of a folder say, read again when one of them changes."""
    tokenizer, folder = load_tokenizer(source), Path(source)
    held: dict[str, Any] = {}
    for name in _SETTINGS:
        path = folder / f"sentence_{name}_config.json"
        if path.is_file():
            held = parse_object(read_bounded(path, MAX_JSON), path)
            break
    longest = held.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise FormatError(f"{path}: max_seq_length is {longest!r}; expected a positive integer")
    if held.get("do_lower_case") is True:
        tokenizer = tokenizer.lowercased()
    return tokenizer, longest, _prompt(folder)


def _prompt(folder: Path) -> str:
    """The prompt that `config_sentence_transformers.json` puts before every text."""
    path = folder / "config_sentence_transformers.json"
    held = parse_object(read_bounded(path, MAX_JSON), path) if path.is_file() else {}
    name, prompts = held.get("default_prompt_name"), held.get("prompts")
    if name is None:
        return ""
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise FormatError(f"{path}: default_prompt_name is {name!r}, and prompts holds no text of that name")
    pooling = folder / "1_Pooling" / "config.json"
    if (
        prompt
        and pooling.is_file()
        and parse_object(read_bounded(pooling, MAX_JSON), pooling).get("include_prompt") is False
    ):
        raise FormatError(f"{pooling}: include_prompt is False: a prompt that is not pooled is not supported")
    return prompt
