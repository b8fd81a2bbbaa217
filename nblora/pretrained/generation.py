"""`generate`: text that a causal model goes on with, one token after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array
from nblora.errors import NonFiniteError
from nblora.formats.model_files import MAX_JSON
from nblora.layers.cache import Cache
from nblora.layers.run import Run, Sequences
from nblora.storage.bounded import parse_object, read_bounded

from .config import Config
from .rows import Tokens, read_tokens
from .text import TextModel

ROOM = 256
"""New tokens that memory is taken for at first."""


def generate(
    model: TextModel,
    input_ids: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | np.random.Generator | None = None,
    eos: Any = None,
) -> list[np.ndarray]:
    """Go on with some texts, with a causal language model.

    Keys and values of earlier tokens are kept, so that each token is computed once. Dropout is off, in training mode
    too.

    Parameters
    ----------
    model : TextModel
        Loaded for "causal-lm".
    input_ids : array_like of integers, shape (batch, length) or (length,), or a list of sequences
        The prompts, without padding: a list where they differ in length.
    max_new_tokens : int
        Of each text.
    temperature : float
        0 takes the likeliest token each time. Otherwise tokens are drawn by the softmax of logits / temperature.
    top_p : float
        In (0, 1]: draw only among the likeliest tokens, as few as have this share of the probability (Holtzman et al.,
        2020).
    seed : int or numpy.random.Generator, optional
        Same seed, same tokens. Each text draws from its own child of it, whatever the others do.
    eos : int or list of int, optional
        Tokens that end a text; an empty list for none. By default those of `generation_config.json` in the model's
        folder, or else of its `config.json`.

    Returns
    -------
    list of ndarray of int64
        The new tokens of each text, the one that ended it among them.

    Raises
    ------
    TypeError
        For what is no text model, and ids that are no integers.
    IndexError
        For ids beyond the vocabulary.
    ValueError
        For a model that is not causal, an empty prompt, more tokens than the model has positions, and settings out of
        their range.
    NonFiniteError
        Where the model's logits are NaN, or all of them infinite.
    """
    found: list[list[int]] = []
    for texts, ids in stream_tokens(
        model, input_ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, eos=eos
    ):
        found = found or [[] for _ in texts]
        for text, token in zip(texts.tolist(), ids.tolist(), strict=True):
            found[text].append(token)
    return [np.array(tokens, np.int64) for tokens in found]


def stream_tokens(
    model: TextModel,
    input_ids: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | np.random.Generator | None = None,
    eos: Any = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same as `generate`, token by token.

    Parameters
    ----------
    model, input_ids, max_new_tokens, temperature, top_p, seed, eos
        As in `generate`, whose errors come before the first token.

    Yields
    ------
    texts, tokens : ndarray of int64, shape (n,)
        The texts that go on, by their places, and the next token of each; first all of them.
    """
    _check_causal(model)
    tokens = model._check_tokens(read_tokens(input_ids))
    count = checks.check_integer("max_new_tokens", max_new_tokens, 1)
    lengths, longest = np.diff(tokens.begins), model.body.longest
    if longest is not None and lengths.max() + count > longest:
        raise ValueError(
            f"max_new_tokens must be at most {longest - lengths.max()}, got {count}: the model has {longest} "
            f"positions, and prompt {lengths.argmax()} takes {lengths.max()} of them"
        )
    choice = Choice(temperature, top_p, np.random.default_rng(seed).spawn(len(tokens)))
    ends = _ends(model) if eos is None else np.atleast_1d(checks.as_indices("eos", eos))
    if eos is not None:
        checks.check_range("eos", ends, model.out_features)
    return _tokens_of(model, tokens, lengths, count, choice, ends)


def _tokens_of(
    model: TextModel, tokens: Tokens, lengths: np.ndarray, count: int, choice: "Choice", ends: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    decoding = Decoding(model, lengths + min(count, ROOM))
    going = np.arange(len(tokens))
    ids = tokens.ids
    with model._backend.lending():
        for _ in range(count):
            ids = choice(decoding.logits(ids, lengths), going, model._backend)
            yield going, ids
            on = np.flatnonzero(~np.isin(ids, ends))
            if not len(on):
                break
            decoding.keep(on)
            ids, going = ids[on], going[on]
            lengths = np.ones(len(on), np.int64)


class Decoding:
    """A causal model that reads texts in pieces.

    Parameters
    ----------
    model : TextModel
    rooms : ndarray of int64, shape (texts,)
        Tokens of each text to have room for at first.
    """

    def __init__(self, model: TextModel, rooms: np.ndarray) -> None:
        self._model, self._cache = model, Cache(rooms, model._backend)

    def logits(self, ids: np.ndarray, counts: np.ndarray) -> Array:
        """Logits after the next tokens of each text, (texts, vocabulary), where the model is; so many of each, one
        after the other."""
        run = Run(self._model._backend)
        run.cache, run.sequences = self._cache, self._cache.next_rows(counts)
        run.reads = _last
        rows = self._model.body._forward(Tokens(ids, None, run.sequences.begins, int(counts.max())), run)
        return self._model.head._forward(rows, run)

    def keep(self, texts: np.ndarray) -> None:
        """Go on with these texts alone, given by their places."""
        self._cache.keep(texts)


def _last(sequences: Sequences) -> np.ndarray:
    return sequences.begins[1:] - 1


class Choice:
    """The next token of each text: the likeliest, or one that is drawn.

    Parameters
    ----------
    temperature, top_p : float
        As in `generate`.
    generators : list of Generator
        One for each text.

    Raises
    ------
    ValueError
        For settings out of their range.
    """

    def __init__(self, temperature: float, top_p: float, generators: list[np.random.Generator]) -> None:
        self._temperature = checks.check_not_negative("temperature", temperature)
        self._share = checks.check_positive("top_p", top_p)
        if self._share > 1:
            raise ValueError(f"top_p must be in (0, 1], got {self._share}")
        self._generators = generators

    def __call__(self, logits: Array, texts: np.ndarray, backend: Any) -> np.ndarray:
        """Take a token of each text by its logits (texts, vocabulary), which are brought to the host where tokens are
        drawn."""
        best, values = backend.largest(logits)
        for token, value, text in zip(best.tolist(), values.tolist(), texts.tolist(), strict=True):
            if not np.isfinite(value):  # NaN, if there is any
                raise NonFiniteError(f"the logits of text {text} are not finite: {value} at token {token}")
        if self._temperature == 0:
            return np.asarray(best)
        rows = zip(backend.to_host(logits), values.tolist(), texts.tolist(), strict=True)
        return np.array([self._drawn(row, largest, text) for row, largest, text in rows])

    def _drawn(self, logits: np.ndarray, largest: float, text: int) -> int:
        with np.errstate(over="ignore"):  # of a tiny temperature: e^-inf is 0
            weights = np.exp((logits.astype(np.float64) - largest) / self._temperature)
        if self._share == 1:
            return _draw(weights, self._generators[text])
        order = np.argsort(-weights, kind="stable")
        sums = np.cumsum(weights[order])
        nucleus = order[: int(np.searchsorted(sums, self._share * sums[-1])) + 1]
        return int(nucleus[_draw(weights[nucleus], self._generators[text])])


def _draw(weights: np.ndarray, generator: np.random.Generator) -> int:
    """A place, by weights of any sum."""
    sums = np.cumsum(weights)
    return min(int(np.searchsorted(sums, generator.random() * sums[-1], "right")), int(np.flatnonzero(weights)[-1]))


def _check_causal(model: Any) -> None:
    if not isinstance(model, TextModel):
        raise TypeError(f"model must be what nblora.load_pretrained returns for text, got {type(model).__name__}")
    model._require_open()
    if not model.head.by_token:
        raise ValueError(
            f"model must be a causal language model, and this one was loaded for {model.task!r}: load it with "
            "task='causal-lm', if its family can"
        )


def _ends(model: TextModel) -> np.ndarray:
    """The tokens that end a text by the model's own files; FormatError for what are no tokens."""
    path = Path(model._origin.folder, "generation_config.json")
    if model._origin.folder and path.is_file():
        raw = parse_object(read_bounded(path, MAX_JSON, follow_links=True), path)
        if raw.get("eos_token_id") is not None:
            return _tokens(Config(raw, path))
    return _tokens(Config(model.config, Path(model._origin.folder, "config.json")))


def _tokens(config: Config) -> np.ndarray:
    held = config.raw.get("eos_token_id")
    found = [] if held is None else held if isinstance(held, list) else [held]
    if not all(type(token) is int for token in found):
        raise config.fault(f"eos_token_id is {held!r}; expected an integer or a list of them")
    return np.array(found, np.int64)
