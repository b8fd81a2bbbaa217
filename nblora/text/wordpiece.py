"""A `tokenizer.json` for folders of BERT that have a `vocab.txt` alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.storage.bounded import read_bounded

NAMES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
"""What the tokens are called by default."""


def wordpiece(path: Path, settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Parameters
    ----------
    path : Path
        The `vocab.txt`: a token each line.
    settings : mapping
        `tokenizer_config.json`, of which `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` count.
    names : mapping
        What its special tokens are called: all of `NAMES`.
    """
    try:
        lines = read_bounded(path, MAX_JSON).decode().split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None
    vocab = {token.rstrip("\r"): place for place, token in enumerate(lines[:-1] if not lines[-1] else lines)}
    called = {name: names[name] for name in NAMES}
    for name in ("unk_token", "cls_token", "sep_token"):
        if called[name] not in vocab:
            raise FormatError(f"{path}: holds no {called[name]}, which is the {name}")
    added = [
        {"id": vocab[token], "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in called.values()
        if token in vocab
    ]
    begin, end = ({"SpecialToken": {"id": called[name], "type_id": 0}} for name in ("cls_token", "sep_token"))
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB"))
    last = {"SpecialToken": {"id": called["sep_token"], "type_id": 1}}
    used = (called["cls_token"], called["sep_token"])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": settings.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first, end],
            "pair": [begin, first, end, second, last],
            "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in used},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": called["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }
