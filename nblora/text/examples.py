"""Examples: records as token ids and what is to be learnt of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nblora.errors import FormatError

from .chat import Span
from .records import Records
from .tokens import Tokenizer

IGNORED = -100
"""The label of a token that nothing is learnt from."""
_BATCH = 1024
"""Texts that the tokenizer gets at once."""


@dataclass(frozen=True)
class Examples:
    """Token ids of records, and what is learnt of them: what `nblora.fit` takes.

    Attributes
    ----------
    ids : list of ndarray of int64
    kinds : list of ndarray of int64, or None
        Of which of two texts each token is.
    targets : ndarray of int64, shape (n,), or list of ndarray of int64
        The class of each text; of language a label for each token, -100 where nothing is learnt. The shift by one is
        the model's.
    places : list of int
        The record that each is of.
    cut : int
        Texts of which tokens were left out, since they are longer than was allowed.
    dropped : list of int
        Records of which nothing to learn was left by that, and that are no examples.
    """

    ids: list[np.ndarray]
    kinds: list[np.ndarray] | None
    targets: Any
    places: list[int]
    cut: int = 0
    dropped: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with."""
        return {"input_ids": self.ids} if self.kinds is None else {"input_ids": self.ids, "token_type_ids": self.kinds}

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(map(len, self.ids))

    def part(self, places: Iterable[int]) -> "Examples":
        """Some of the examples, by their places."""
        chosen = list(places)
        targets = self.targets
        return Examples(
            [self.ids[place] for place in chosen],
            None if self.kinds is None else [self.kinds[place] for place in chosen],
            targets[chosen] if isinstance(targets, np.ndarray) else [targets[place] for place in chosen],
            [self.places[place] for place in chosen],
            self.cut,
            self.dropped,
        )


def class_examples(
    records: Records, tokenizer: Tokenizer, classes: Sequence[str], max_length: int, *, kinds: bool = True
) -> Examples:
    """Examples of a classification.

    Parameters
    ----------
    records : Records
        Of the kind "labelled".
    tokenizer : Tokenizer
    classes : list of str
        The labels, in the order of their indices.
    max_length : int
        Tokens of a text beyond so many are left out, special ones counted; of two texts the longer is cut first.
    kinds : bool
        Whether the model tells two texts apart.

    Raises
    ------
    FormatError
        For a label that is none of the classes.
    """
    index = {name: place for place, name in enumerate(classes)}
    labels = records.column("label") or []
    for place, label in enumerate(labels):
        if label not in index:
            some = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
            raise FormatError(f"{records.place(place)}: the label {label!r} is none of those learnt ({some})")
    texts, pairs = records.column("text") or [], records.column("text_pair")
    whole = tokenizer.encode(texts, pairs)
    cut = sum(len(each) > max_length for each in whole.ids)
    found = tokenizer.encode(texts, pairs, max_length=max_length) if cut else whole
    for place, each in enumerate(found.ids):
        if not len(each):
            raise FormatError(f"{records.place(place)}: the text has no tokens")
    targets = np.array([index[label] for label in labels], np.int64)
    used = found.kinds if kinds and pairs is not None else None
    return Examples(found.ids, used, targets, list(range(len(records))), cut)


def language_examples(
    records: Records, tokenizer: Tokenizer, max_length: int, *, learn_prompt: bool = False
) -> Examples:
    """Examples of a language model.

    A text ends with the model's end token, which is learnt; so does a completion, and of a prompt with a completion
    the completion is learnt: what follows the longest beginning that the tokens of the prompt alone and of both share.
    Of a conversation the assistant's turns are learnt, with what the chat template ends them by. These are the ids and
    labels of TRL's `SFTTrainer` (of conversations with `assistant_only_loss=True`).

    Parameters
    ----------
    records : Records
        Of the kind "completion", "messages" or "text".
    tokenizer : Tokenizer
    max_length : int
        Tokens beyond so many are left out.
    learn_prompt : bool
        Learn every token.

    Raises
    ------
    FormatError
        That names the record: for one without tokens, a conversation without a turn of the assistant, and what the chat
        template refuses.
    ValueError
        For conversations and a tokenizer without a chat template.
    """
    if records.kind == "messages":
        found = _conversations(records, tokenizer, learn_prompt)
    elif records.kind == "completion":
        found = _completions(records, tokenizer)
    else:
        texts = [_ended(text, tokenizer) for text in records.column("text") or []]
        found = [(ids, np.ones(len(ids), bool)) for ids in tokenizer.encode(texts).ids]
    ids, targets, places, dropped, cut = [], [], [], [], 0
    for place, (tokens, learnt) in enumerate(found):
        if len(tokens) < 2 or not (learn_prompt or learnt[1:].any()):
            raise FormatError(f"{records.place(place)}: there is nothing to learn: {_lack(records, place)}")
        labels = tokens if learn_prompt else np.where(learnt, tokens, IGNORED)
        cut += len(tokens) > max_length
        if not (labels[1:max_length] != IGNORED).any():
            dropped.append(place)
            continue
        ids.append(tokens[:max_length])
        targets.append(labels[:max_length])
        places.append(place)
    return Examples(ids, None, targets, places, cut, tuple(dropped))


def _lack(records: Records, place: int) -> str:
    if records.kind == "messages" and not any(m["role"] == "assistant" for m in records.rows[place]["messages"]):
        return "the conversation has no turn of the assistant"
    return "it has fewer than two tokens, or none behind the first is to be learnt"


def _ended(text: str, tokenizer: Tokenizer) -> str:
    """A text with the end token, unless it has it."""
    end = tokenizer.special_tokens.get("eos_token", "")
    return text if text.endswith(end) else text + end


def _completions(records: Records, tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    prompts = records.column("prompt") or []
    both = [
        prompt + _ended(completion, tokenizer)
        for prompt, completion in zip(prompts, records.column("completion") or [], strict=True)
    ]
    found = []
    for alone, ids in zip(tokenizer.encode(prompts).ids, tokenizer.encode(both).ids, strict=True):
        shared = min(len(alone), len(ids))
        differing = np.flatnonzero(alone[:shared] != ids[:shared])
        begin = int(differing[0]) if len(differing) else shared
        found.append((ids, np.arange(len(ids)) >= begin))
    return found


def _conversations(records: Records, tokenizer: Tokenizer, learn_prompt: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    texts, spans = [], []
    for place, messages in enumerate(records.column("messages") or []):
        try:
            if learn_prompt:
                text = tokenizer.chat(messages)
                turns = [(0, len(text))]
            else:
                text, turns = tokenizer.chat_turns(messages)
        except FormatError as error:
            raise FormatError(f"{records.place(place)}: {error}") from None
        texts.append(text)
        spans.append(turns)
    found = []
    for start in range(0, len(texts), _BATCH):
        encoded = tokenizer.encode_spans(texts[start : start + _BATCH], special=False)
        found += [(ids, _within(offsets, turns)) for (ids, offsets), turns in zip(encoded, spans[start:], strict=False)]
    return found


def _within(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens stand for a character of any of the spans."""
    result = np.zeros(len(offsets), bool)
    for begin, end in spans:
        result |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    return result


def check_vocabulary(examples: Examples, records: Records, tokenizer: Tokenizer, count: int) -> None:
    """FormatError where the model's table has no row for a token.

    Parameters
    ----------
    count : int
        Rows of the table.
    """
    for place, ids in zip(examples.places, examples.ids, strict=True):
        if ids.max() >= count:
            raise FormatError(
                f"{tokenizer.source}: the tokenizer does not fit the model: {records.place(place)} gives the token "
                f"{int(ids.max())}, and the model has {count} (the tokenizer {len(tokenizer)})"
            )


def show_example(examples: Examples, place: int, tokenizer: Tokenizer, classes: Sequence[str] | None = None) -> str:
    """One example as lines of tokens, those that are learnt marked by a star."""
    ids, targets = examples.ids[place], examples.targets
    lines = []
    for position, token in enumerate(ids.tolist()):
        learnt = classes is None and position > 0 and targets[place][position] != IGNORED
        text = tokenizer.decode([token], special=True)
        lines.append(f"{'*' if learnt else ' '} {token:>7d}  {text!r}")
    if classes is not None:
        return "\n".join([*lines, f"label: {classes[int(targets[place])]}"])
    count = sum(line.startswith("*") for line in lines)
    return "\n".join([*lines, f"learnt: {count} of {len(ids)} tokens, marked *"])
