"""The tokenizer of a GGUF file, in the files that transformers and the `tokenizers` package read.

llama.cpp stores tokens, their kinds, merges or scores, and the name of the rule that parts text beforehand. What the
`tokenizer.json` says beside them is what transformers says of the same file: ids are equal to those of
`AutoTokenizer.from_pretrained(folder, gguf_file=...)`.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nblora.errors import FormatError
from nblora.storage.gguf_reader import GGUFFile

from .config import shortened

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "smollm", "olmo", "dolma", "phi-2", "mpt", "starcoder"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
    "tekken": _TEKKEN,
}
"""Expressions that part text, by llama.cpp's names (`tokenizer.ggml.pre`); None is GPT-2's, the byte level's own."""
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SPACE = "▁"


def tokenizer_files(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `tokenizer.json` and `tokenizer_config.json` would hold, by these names; empty without a tokenizer.

    Parameters
    ----------
    path : path-like
        A GGUF file.

    Raises
    ------
    FormatError
        If the tokenizer is broken, or of a kind that is not known.
    OSError
        If the file cannot be read.
    """
    with GGUFFile(path) as file:
        if not any(key.startswith("tokenizer.") for key in file.metadata):
            return {}
        vocabulary = _Vocabulary(file.path, file.metadata)
    return {"tokenizer.json": vocabulary.tokenizer(), "tokenizer_config.json": vocabulary.settings()}


def write_tokenizer(path: str | os.PathLike[str], folder: Path) -> None:
    """Write these files of a GGUF file into a folder.

    A tokenizer of a kind that is not known is left out, with a warning: the model does not need it.
    """
    try:
        files = tokenizer_files(path)
    except FormatError as error:
        warnings.warn(f"the tokenizer is not written: {error}", UserWarning, stacklevel=5)
        files = {}
    for name, content in files.items():
        with open(folder / name, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2 if "config" in name else None)
            file.write("\n")


class _Vocabulary:
    """The `tokenizer.*` entries of a file, checked."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path, self._metadata = path, metadata
        self._kind = self._entry("model")
        if self._kind not in ("gpt2", "llama"):
            raise self._fault("model", "supported are 'gpt2', byte-level BPE, and 'llama', SentencePiece's BPE")
        self._tokens: list[str] = self._entry("tokens")
        if not isinstance(self._tokens, list) or not self._tokens:
            raise self._fault("tokens", "expected a list of strings")
        self._types = self._numbers("token_type")
        self.special = {
            name: self._tokens[place]
            for name, entry in _SPECIAL.items()
            if type(place := self._entry(f"{entry}_token_id")) is int and 0 <= place < len(self._tokens)
        }

    def tokenizer(self) -> dict[str, Any]:
        """The content of `tokenizer.json`."""
        byte_level = self._kind == "gpt2"
        vocab = {self._spelled(token): place for place, token in enumerate(self._tokens)}
        merges = self._merges() if "tokenizer.ggml.merges" in self._metadata or byte_level else self._implied_merges()
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "" if byte_level else None,
            "end_of_word_suffix": "" if byte_level else None, "fuse_unk": not byte_level,
            "byte_fallback": not byte_level, "ignore_merges": False, "vocab": vocab, "merges": merges,
        }  # fmt: skip
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added(vocab)),
            "normalizer": None,
            "pre_tokenizer": self._byte_level_split() if byte_level else _metaspace(self._prepended()),
            "post_processor": self._template(vocab),
            "decoder": _byte_level() if byte_level else _metaspace_decoder(self._prepended()),
            "model": model,
        }

    def settings(self) -> dict[str, Any]:
        """The content of `tokenizer_config.json`."""
        template = self._metadata.get("tokenizer.chat_template")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self._adds("bos"),
            "add_eos_token": self._adds("eos"),
            **self.special,
        }
        return settings | ({"chat_template": template} if isinstance(template, str) else {})

    # --- entries -----------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}")

    def _fault(self, name: str, text: str) -> FormatError:
        return FormatError(f"{self._path}: tokenizer.ggml.{name} is {shortened(self._entry(name))}; {text}")

    def _numbers(self, name: str) -> list[Any]:
        """A number for each token; an empty list where the file has none."""
        value = self._entry(name)
        if value is None:
            return []
        if isinstance(value, list | str) or not hasattr(value, "tolist") or len(value) != len(self._tokens):
            raise self._fault(name, f"expected a number for each of the {len(self._tokens)} tokens")
        return value.tolist()

    def _adds(self, which: str) -> bool:
        """Whether a beginning or an end is added; llama.cpp adds a beginning to SentencePiece's unless told."""
        value = self._entry(f"add_{which}_token")
        asked = self._kind == "llama" and which == "bos" if value is None else bool(value)
        return asked and f"{which}_token" in self.special

    def _prepended(self) -> bool:
        return self._entry("add_space_prefix") is not False

    # --- parts of tokenizer.json -------------------------------------------------------------------------------

    def _spelled(self, token: str) -> str:
        """A token of the byte level in its alphabet, in which some files do not write all."""
        if self._kind == "llama" or _ALPHABET.issuperset(token):
            return token
        return "".join(_BYTES[byte] for byte in token.encode())

    def _merges(self) -> list[list[str]]:
        given = self._entry("merges")
        if not isinstance(given, list):
            raise self._fault("merges", "expected a list of strings")
        merges = [merge.split(" ") for merge in given]
        for merge, pair in zip(given, merges, strict=True):
            if len(pair) != 2:
                raise FormatError(f"{self._path}: tokenizer.ggml.merges holds {merge!r}; expected two parts")
        return merges

    def _implied_merges(self) -> list[list[str]]:
        """SentencePiece's: every way to make a token of two others, that of the highest score first."""
        scores = self._numbers("scores")
        if not scores:
            raise self._fault("scores", "expected scores, or merges")
        places = {token: place for place, token in enumerate(self._tokens)}
        scored = dict(zip(self._tokens, scores, strict=True))
        found = []
        for token, score in scored.items():
            parts = ((token[:cut], token[cut:]) for cut in range(1, min(len(token), _LONGEST_TOKEN)))
            pairs = [(left, right) for left, right in parts if left in places and right in places]
            pairs.sort(key=lambda pair: (places[pair[0]], places[pair[1]]))
            found += [(score, len(left), len(right), left, right) for left, right in pairs]
        found.sort(key=lambda entry: entry[:3], reverse=True)
        return [[left, right] for *_, left, right in found]

    def _added(self, vocab: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Tokens that are found whole in a text: control and user-defined ones."""
        special = set(self.special.values())
        for place, token in enumerate(self._tokens):
            kind = self._types[place] if self._types else 0
            control = kind == _CONTROL and (self._kind == "llama" or _ALPHABET.issuperset(token))
            if vocab.get(token) == place and token and (control or kind == _USER_DEFINED or token in special):
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                yield {"id": place, "content": token, **flags, "special": control or token in special}

    def _byte_level_split(self) -> dict[str, Any]:
        name = self._entry("pre") or "default"
        if name not in SPLITS:
            raise self._fault("pre", f"the kinds that are known: {', '.join(SPLITS)}")
        if (expression := SPLITS[name]) is None:
            return _byte_level() | {"add_prefix_space": False}
        split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        byte_level = _byte_level() | {"add_prefix_space": False, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [split, byte_level]}

    def _template(self, vocab: dict[str, int]) -> dict[str, Any]:
        """What is put around a text, and around two."""

        def around(*names: str) -> list[dict[str, Any]]:
            parts: list[dict[str, Any]] = []
            for kind, name in enumerate(names):
                text = {"Sequence": {"id": name, "type_id": kind}}
                begin, end = (
                    [{"SpecialToken": {"id": self.special[f"{which}_token"], "type_id": kind}}]
                    if self._adds(which) else []
                    for which in ("bos", "eos")
                )  # fmt: skip
                parts += [*begin, text, *end]
            return parts

        used = {self.special[f"{which}_token"] for which in ("bos", "eos") if self._adds(which)}
        tokens = {t: {"id": t, "ids": [vocab[self._spelled(t)]], "tokens": [t]} for t in sorted(used)}
        return {
            "type": "TemplateProcessing",
            "single": around("A"),
            "pair": around("A", "B"),
            "special_tokens": tokens,
        }


_LONGEST_TOKEN = 1000
"""Characters of a token that are tried as parts: more would take a time that grows with their square."""


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def _metaspace(prepended: bool) -> dict[str, Any]:
    scheme = "first" if prepended else "never"
    return {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}


def _metaspace_decoder(prepended: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepended else []
    return {"type": "Sequence", "decoders": steps + strip}


def _byte_alphabet() -> Sequence[str]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, others for letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_BYTES = _byte_alphabet()
_ALPHABET = frozenset(_BYTES)
