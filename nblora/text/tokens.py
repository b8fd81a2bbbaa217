"""`Tokenizer`: text to token ids and back, by the `tokenizers` package."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nblora import checks
from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.pretrained import gguf_tokenizer
from nblora.storage.bounded import parse_object, read_bounded

from . import chat
from .chat import Messages, Span
from .extras import import_tokenizers
from .wordpiece import NAMES, wordpiece

PathLike = str | os.PathLike[str]
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoding(NamedTuple):
    """Token ids of some texts, and of which of two texts each token is: 0 or 1. Arrays of int64, one for each text."""

    ids: list[np.ndarray]
    kinds: list[np.ndarray]


class Tokenizer:
    """Makes token ids of texts and texts of token ids. Made by `load_tokenizer`.

    Nothing is padded: models take a list of sequences of different lengths.

    Parameters
    ----------
    content : mapping
        A `tokenizer.json`, whose own padding and truncation are left out.
    settings : mapping
        A `tokenizer_config.json`.
    source : str
        Where they came from, for messages.

    Attributes
    ----------
    special_tokens : dict of str to str
        "bos_token", "eos_token", ... as far as they are said.
    chat_template : str or None
        Of jinja2.
    longest : int or None
        Tokens that `tokenizer_config.json` allows a text.

    Raises
    ------
    MissingExtraError
        Without the `tokenizers` package.
    FormatError
        For contents that are broken.
    """

    def __init__(self, content: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> None:
        self._content = {**content, "padding": None, "truncation": None}
        self._settings, self.source = settings, source
        tokenizers = import_tokenizers()
        with self._faults():
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(self._content))
        self.special_tokens = _special_tokens(settings)
        self.chat_template = _chosen_template(settings.get("chat_template"), source)
        longest = settings.get("model_max_length")
        self.longest = longest if type(longest) is int and longest > 0 else None

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """FormatError for what goes wrong in the package, whose errors have no type of their own: the file's fault, for
        what a caller can do wrong was checked. A panic of its Rust code is no Exception."""
        try:
            yield
        except MemoryError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise FormatError(f"{self.source}: the tokenizer fails: {error}") from None

    def __len__(self) -> int:
        """Tokens of the vocabulary, those included that were added to it."""
        return int(self._backend.get_vocab_size())

    def __repr__(self) -> str:
        return f"Tokenizer({self.source!r}, {len(self):,d} tokens)"

    def token_id(self, token: str) -> int | None:
        """The id of one token; of "eos_token" and the like the id of what `special_tokens` says. None without it."""
        found = self._backend.token_to_id(self.special_tokens.get(token, token))
        return None if found is None else int(found)

    def token(self, number: int) -> str:
        """The token of an id, as the vocabulary writes it; "" for an id beyond it."""
        found = self._backend.id_to_token(number)
        return "" if found is None else str(found)

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        special: bool = True,
        max_length: int | None = None,
    ) -> Encoding:
        """Make token ids.

        Parameters
        ----------
        texts : list of str
        pairs : list of str, optional
            A second text for each.
        special : bool
            Put the tokens around a text that the model was trained with ([CLS], [SEP], <s>).
        max_length : int, optional
            Leave out what is beyond so many tokens, special ones included; of two texts the longer is cut first.

        Raises
        ------
        TypeError
            For texts that are none; one text is a list of one.
        ValueError
            For a `max_length` that leaves no room, and for as many pairs as there are no texts.
        """
        given: Any = _check_texts("texts", texts)
        if pairs is not None:
            second = _check_texts("pairs", pairs)
            if len(second) != len(given):
                raise ValueError(f"pairs must hold as many texts as texts, {len(given)}, got {len(second)}")
            given = list(zip(given, second, strict=True))
        flag = checks.check_flag("special", special)
        if max_length is None:
            self._backend.no_truncation()
        else:
            room = self._backend.num_special_tokens_to_add(pairs is not None) if flag else 0
            self._backend.enable_truncation(checks.check_integer("max_length", max_length, room + 1))
        with self._faults():
            found = self._backend.encode_batch(given, add_special_tokens=flag)
        ids = [np.array(each.ids, np.int64) for each in found]
        return Encoding(ids, [np.array(each.type_ids, np.int64) for each in found])

    def encode_spans(self, texts: Sequence[str], *, special: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
        """Make token ids, and say which characters each token stands for.

        Parameters
        ----------
        texts, special
            As in `encode`.

        Returns
        -------
        list of tuple of ndarray of int64
            Of each text its ids (length,), and (length, 2): the first character of each token, and that behind its
            last. Tokens that stand for none, and those of one character, share a place.
        """
        given = _check_texts("texts", texts)
        self._backend.no_truncation()
        with self._faults():
            found = self._backend.encode_batch(given, add_special_tokens=checks.check_flag("special", special))
        return [(np.array(e.ids, np.int64), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in found]

    def decode(self, ids: Any, *, special: bool = False) -> str:
        """The text of token ids.

        Parameters
        ----------
        ids : array_like of integers, shape (length,)
        special : bool
            Whether special tokens are part of it.

        Raises
        ------
        IndexError
            For ids beyond the vocabulary.
        """
        array = checks.as_indices("ids", ids)
        if array.ndim != 1:
            raise ValueError(f"ids must be one sequence of integers, got shape {array.shape}")
        wrong = (array < 0) | (array >= 2**32)
        if wrong.any():
            raise IndexError(f"ids must hold tokens of the vocabulary, got {array[wrong][0]}")
        flag = checks.check_flag("special", special)
        with self._faults():
            return str(self._backend.decode(array.tolist(), skip_special_tokens=not flag))

    def chat(
        self, messages: Messages, *, add_generation_prompt: bool = False, tools: Any = None, **variables: Any
    ) -> str:
        """A conversation as one text, by the model's chat template.

        Special tokens are part of it: `encode(..., special=False)` adds no others.

        Parameters
        ----------
        messages : list of dict
            Each with "role" and "content".
        add_generation_prompt : bool
            Whether it ends with what an answer begins with.
        tools : list of dict, optional
            Descriptions of functions, for templates that know them.
        **variables
            What else the template may name.

        Raises
        ------
        ValueError
            For a model without a template, and messages that are none.
        FormatError
            For a template that is broken, or refuses the messages.
        """
        known = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        return chat.render(self._template(), self.source, messages, self._variables(known))

    def chat_turns(self, messages: Messages, **variables: Any) -> tuple[str, list[Span]]:
        """A conversation as one text, as `chat` makes it, and where in it the assistant's turns are.

        Returns
        -------
        tuple of str and list
            The text, and of each turn its first character and that behind its last, what ends the turn included.

        Raises
        ------
        ValueError, FormatError
            As `chat`; and for a template by which it cannot be said.
        """
        return chat.render_turns(self._template(), self.source, messages, self._variables(variables))

    def _template(self) -> str:
        if self.chat_template is None:
            raise ValueError(f"{self.source} has no chat template")
        return self.chat_template

    def _variables(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.special_tokens, "tools": None, "documents": None, "add_generation_prompt": False, **more}

    def lowercased(self) -> "Tokenizer":
        """The same of texts that are brought to lower case before anything else."""
        own = self._content.get("normalizer")
        steps = [{"type": "Lowercase"}, *([own] if own else [])]
        content = {**self._content, "normalizer": {"type": "Sequence", "normalizers": steps}}
        return Tokenizer(content, self._settings, self.source)


def load_tokenizer(path: PathLike) -> Tokenizer:
    """Load the tokenizer of a pretrained model.

    Parameters
    ----------
    path : path-like
        A folder with `tokenizer.json`, or of a BERT with `vocab.txt`; or a GGUF file. `tokenizer_config.json` and
        `chat_template.jinja` are read where they are there.

    Raises
    ------
    MissingExtraError
        Without the `tokenizers` package: `pip install 'nblora[text]'`.
    FormatError
        For a folder without a tokenizer, and one that is broken.
    OSError
        For a file that cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        return _of_folder(place)
    files = gguf_tokenizer.tokenizer_files(place)
    if not files:
        raise FormatError(f"{place}: the file has no tokenizer")
    return Tokenizer(files["tokenizer.json"], files["tokenizer_config.json"], str(place))


def _of_folder(folder: Path) -> Tokenizer:
    settings = _object(folder / "tokenizer_config.json")
    named = _object(folder / "special_tokens_map.json")
    settings = {**{name: token for name, token in named.items() if name in _SPECIAL}, **settings}
    if (template := folder / "chat_template.jinja").is_file():
        try:
            settings["chat_template"] = read_bounded(template, MAX_JSON).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{template}: not UTF-8 at byte {error.start}") from None
    if (whole := folder / "tokenizer.json").is_file():
        return Tokenizer(parse_object(read_bounded(whole, MAX_JSON), whole), settings, str(folder))
    if (vocabulary := folder / "vocab.txt").is_file():
        settings = {**NAMES, **settings}
        return Tokenizer(wordpiece(vocabulary, settings, _special_tokens(settings)), settings, str(folder))
    raise FormatError(
        f"{folder}: holds no tokenizer.json; transformers writes one: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _object(path: Path) -> dict[str, Any]:
    """A file that holds an object of JSON; an empty one without the file."""
    return parse_object(read_bounded(path, MAX_JSON), path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their names, which files write as texts, or as objects with their flags."""
    found = {}
    for name in _SPECIAL:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _chosen_template(given: Any, source: str) -> str | None:
    """The template, of several the one called "default"."""
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    if given is not None and not isinstance(given, str):
        raise FormatError(f"{source}: chat_template must be a text, or a list of named ones")
    return given


def _check_texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence | np.ndarray):
        raise TypeError(f"{name} must be a list of texts, got {type(texts).__name__}: one text is a list of one")
    result = list(texts)
    for place, text in enumerate(result):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{place}] must be a text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}[{place}] holds half of a surrogate pair, which is no text") from None
    return [str(text) for text in result]
