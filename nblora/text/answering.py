"""Text that a causal model goes on with, given out as it comes."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.pretrained import TextModel, load_pretrained
from nblora.pretrained.generation import stream_tokens
from nblora.storage.bounded import parse_object, read_bounded

from .predicting import LANGUAGE, adapter_task
from .tokens import Tokenizer, load_tokenizer

PathLike = str | os.PathLike[str]
_UNFINISHED = "\ufffd"
"""What a character becomes of which a token holds a part of the bytes alone."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of one byte, of which a character is only known when the next is none."""


def load_generator(model: PathLike, adapter: PathLike | None = None) -> tuple[TextModel, Tokenizer]:
    """Load a causal model, and an adapter of it, with its tokenizer.

    Parameters
    ----------
    model : path-like
        The folder or GGUF file that the adapter was made for.
    adapter : path-like, optional
        A folder that `nblora finetune` or PEFT wrote.

    Raises
    ------
    FormatError
        For an adapter of another task, and what is broken.
    OSError
        For what cannot be read.
    """
    if adapter is not None and adapter_task(Path(adapter)) not in (None, LANGUAGE):
        raise FormatError(f"{adapter}: is no adapter of a causal language model: nblora predict is for it")
    loaded = cast(TextModel, load_pretrained(model, task=LANGUAGE))
    if adapter is not None:
        loaded.load_adapter(adapter)
    return loaded, load_tokenizer(model)


def speaks_chat(tokenizer: Tokenizer, adapter: PathLike | None) -> bool:
    """Whether a prompt is to be put into the chat template: where there is one, unless the adapter learnt otherwise."""
    if tokenizer.chat_template is None:
        return False
    path = None if adapter is None else Path(adapter, "finetune.json")
    if path is None or not path.is_file():
        return True
    return parse_object(read_bounded(path, MAX_JSON), path).get("records") in (None, "messages")


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, chat: bool, system: str | None = None) -> np.ndarray:
    """Token ids of a prompt: as it is, or as the user's turn of a conversation.

    Raises
    ------
    ValueError
        For a prompt without tokens, and a conversation with a tokenizer that has no chat template.
    """
    if chat:
        turns = [{"role": "user", "content": prompt}]
        turns = turns if system is None else [{"role": "system", "content": system}, *turns]
        (ids,) = tokenizer.encode([tokenizer.chat(turns, add_generation_prompt=True)], special=False).ids
    else:
        if system is not None:
            raise ValueError("a system message is for a conversation, and the prompt is taken as it is")
        (ids,) = tokenizer.encode([prompt]).ids
        if len(ids) > 1 and ids[-1] == tokenizer.token_id("eos_token"):  # some put it after every text
            ids = ids[:-1]
    if not len(ids):
        raise ValueError("the prompt has no tokens")
    return ids


def stream_text(model: TextModel, tokenizer: Tokenizer, ids: np.ndarray, **settings: Any) -> Iterator[str]:
    """Go on with a text, and yield it piece by piece, as soon as its characters are whole.

    Parameters
    ----------
    model : TextModel
        Loaded for "causal-lm".
    tokenizer : Tokenizer
    ids : ndarray of integers, shape (length,)
        The prompt.
    **settings
        As in `nblora.generate`: `max_new_tokens`, `temperature`, `top_p`, `seed`, `eos`.

    Yields
    ------
    str
        Without special tokens. All pieces together are what `tokenizer.decode` makes of all tokens.
    """
    found: list[int] = []
    told = ""
    for _, tokens in stream_tokens(model, [ids], **settings):
        found.append(int(tokens[0]))
        text = tokenizer.decode(found)
        parted = _BYTE.fullmatch(tokenizer.token(found[-1])) or text.endswith(_UNFINISHED)
        if not parted and len(text) > len(told):
            yield text[len(told) :]
            told = text
    text = tokenizer.decode(found) if found else ""
    if len(text) > len(told):
        yield text[len(told) :]
