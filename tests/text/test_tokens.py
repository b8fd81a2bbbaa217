"""Tokenizers: the ids of transformers, texts back, and what is refused."""

import json
import random
import sys

import numpy as np
import pytest

import nblora
from nblora.errors import FormatError, MissingExtraError
from tests.fuzz import mutation
from tests.text.support import held

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from nblora.pretrained.gguf_tokenizer import write_tokenizer  # noqa: E402
from tests.text.vocabularies import KINDS, write_vocabulary  # noqa: E402

HELD = held()
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefgh",
    "##a",
    "##b",
    "##c",
    "the",
    "bad",
    "东",
    ".",
    "<c>",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A GGUF file of each kind of vocabulary."""
    folder = tmp_path_factory.mktemp("vocabularies")
    return {kind: write_vocabulary(folder / f"{kind}.gguf", kind, HELD) for kind in KINDS}


@pytest.fixture
def bert(tmp_path):
    """A folder with a vocabulary alone."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path


# --- ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_gguf_file_are_those_of_transformers(files, kind):
    tokenizer = nblora.load_tokenizer(files[kind])
    *wanted, pair = HELD["ids"][kind]
    found = tokenizer.encode(HELD["texts"])
    for text, ids, theirs in zip(HELD["texts"], found.ids, wanted, strict=True):
        assert ids.tolist() == theirs, repr(text)
    assert all(len(ids) == len(kinds) for ids, kinds in zip(*found, strict=True))
    both = tokenizer.encode(HELD["texts"][9:10], HELD["texts"][10:11])
    assert both.ids[0].tolist() == pair
    assert set(both.kinds[0]) == {0, 1}


@pytest.mark.parametrize("kind", ["smollm", "sentencepiece"])
def test_what_is_saved_makes_the_same_ids(files, kind, tmp_path):
    write_tokenizer(files[kind], tmp_path)
    whole, read = nblora.load_tokenizer(files[kind]), nblora.load_tokenizer(tmp_path)
    assert read.special_tokens == whole.special_tokens
    assert len(read) == len(whole)
    for ids, theirs in zip(read.encode(HELD["texts"]).ids, whole.encode(HELD["texts"]).ids, strict=True):
        assert ids.tolist() == theirs.tolist()


def test_texts_come_back(files):
    tokenizer = nblora.load_tokenizer(files["smollm"])
    for text in HELD["texts"]:
        (ids,) = tokenizer.encode([text]).ids
        assert tokenizer.decode(ids, special=True) == text
    assert tokenizer.decode([1, *tokenizer.encode(["a b"]).ids[0]]) == "a b"
    assert nblora.load_tokenizer(files["sentencepiece"]).decode([1, *map(ord, "\x06\x07")]) != ""


def test_special_tokens_are_named(files):
    tokenizer = nblora.load_tokenizer(files["sentencepiece"])
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (tokenizer.token_id("eos_token"), tokenizer.token_id("</s>"), tokenizer.token_id("none")) == (2, 2, None)
    assert tokenizer.token_id("pad_token") is None
    assert "sentencepiece.gguf" in repr(tokenizer)


def test_a_vocabulary_of_word_pieces(bert):
    tokenizer = nblora.load_tokenizer(bert)
    ids, kinds = tokenizer.encode(["The BÁD.", "aab东", "x", ""], None)
    names = [[VOCABULARY[place] for place in each] for each in ids]
    assert names == [
        ["[CLS]", "the", "bad", ".", "[SEP]"],
        ["[CLS]", "a", "##a", "##b", "东", "[SEP]"],
        ["[CLS]", "[UNK]", "[SEP]"],
        ["[CLS]", "[SEP]"],
    ]
    assert all(not each.any() for each in kinds)
    ids, kinds = tokenizer.encode(["a b"], ["c"])
    assert [VOCABULARY[place] for place in ids[0]] == ["[CLS]", "a", "b", "[SEP]", "c", "[SEP]"]
    assert kinds[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert tokenizer.special_tokens["cls_token"] == "[CLS]"


def test_the_settings_of_word_pieces_count(bert):
    (bert / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "cls_token": {"content": "<c>"}}))
    (ids,) = nblora.load_tokenizer(bert).encode(["The bad"]).ids
    assert [VOCABULARY[place] for place in ids] == ["<c>", "[UNK]", "bad", "[SEP]"]
    (bert / "tokenizer_config.json").write_text(json.dumps({"cls_token": "none"}))
    with pytest.raises(FormatError, match=r"vocab.txt: holds no none, which is the cls_token"):
        nblora.load_tokenizer(bert)


def test_the_files_own_padding_and_truncation_are_switched_off(bert, tmp_path):
    backend = tokenizers.Tokenizer.from_str(json.dumps(nblora.load_tokenizer(bert)._content))
    backend.enable_padding(length=9)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    (ids,) = nblora.load_tokenizer(tmp_path).encode(["a b c d e"]).ids
    assert len(ids) == 7
    (ids,) = nblora.load_tokenizer(tmp_path).encode(["a"]).ids
    assert len(ids) == 3


def test_texts_are_cut_and_special_tokens_stay(bert):
    tokenizer = nblora.load_tokenizer(bert)
    ids, _ = tokenizer.encode(["a b c d", "a"], max_length=4)
    assert [[VOCABULARY[place] for place in each] for each in ids] == [
        ["[CLS]", "a", "b", "[SEP]"],
        ["[CLS]", "a", "[SEP]"],
    ]
    assert [len(each) for each in tokenizer.encode(["a b c d"]).ids] == [6]  # the next call knows nothing of it
    both = tokenizer.encode(["a b c d"], ["e f"], max_length=7)
    assert [VOCABULARY[place] for place in both.ids[0]] == ["[CLS]", "a", "b", "[SEP]", "e", "f", "[SEP]"]
    assert [len(each) for each in tokenizer.encode(["a b c d"], special=False, max_length=1).ids] == [1]
    with pytest.raises(ValueError, match="max_length must be at least 3, got 2"):
        tokenizer.encode(["a"], max_length=2)


def test_a_model_learns_what_a_tokenizer_makes(files):
    """Arrays of integers, as models take them."""
    ids = nblora.load_tokenizer(files["default"]).encode(["a b", "", "cd"]).ids
    assert [each.dtype for each in ids] == [np.int64] * 3
    assert len(ids[1]) == 0
    assert nblora.load_tokenizer(files["default"]).encode([]) == ([], [])


# --- what is refused ---------------------------------------------------------------------------------------------


def test_texts_that_are_none(bert):
    tokenizer = nblora.load_tokenizer(bert)
    with pytest.raises(TypeError, match="texts must be a list of texts, got str: one text is a list of one"):
        tokenizer.encode("a")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a text, got int"):
        tokenizer.encode(["a", 1])
    with pytest.raises(ValueError, match=r"texts\[0\] holds half of a surrogate pair"):
        tokenizer.encode(["\ud800"])
    with pytest.raises(ValueError, match="pairs must hold as many texts as texts, 1, got 2"):
        tokenizer.encode(["a"], ["b", "c"])
    for ids in ([-1], [2**40]):
        with pytest.raises(IndexError, match="ids must hold tokens of the vocabulary"):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"got shape \(1, 2\)"):
        tokenizer.decode([[1, 2]])
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FormatError, match=r"holds no tokenizer.json; transformers writes one"):
        nblora.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError):
        nblora.load_tokenizer(tmp_path / "none.gguf")
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(FormatError, match=r"vocab.txt: not UTF-8 at byte 6"):
        nblora.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="the tokenizer fails"):
        nblora.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"tokenizer_config.json: expected a JSON object"):
        nblora.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_tokenizer_pre("deepseek-llm"), "pre is 'deepseek-llm'; the kinds that are known: default"),
        (lambda w: w.add_tokenizer_model("t5"), "model is 't5'; supported are 'gpt2'"),
        (lambda w: w.add_token_merges(["a"]), "merges holds 'a'; expected two parts"),
        (lambda w: w.add_token_merges(["a zzzz"]), "the tokenizer fails"),
        (lambda w: w.add_token_types([1]), "token_type is array.*expected a number for each of the"),
        (lambda w: w.add_uint32("tokenizer.ggml.tokens", 1), "tokens is 1; expected a list of strings"),
        (lambda w: w.add_uint32("tokenizer.ggml.merges", 1), "merges is 1; expected a list of strings"),
    ],
)
def test_vocabularies_that_are_none(tmp_path, change, message):
    def replace(writer):
        known = writer.kv_data[0]
        before = dict(known)
        known.clear()
        change(writer)
        writer.kv_data[0] = {**before, **known}

    path = write_vocabulary(tmp_path / "model.gguf", "default", HELD, more=replace)
    with pytest.raises(FormatError, match=message):
        nblora.load_tokenizer(path)


def test_no_blank_is_put_before_a_text_where_the_file_says_so(tmp_path):
    path = write_vocabulary(tmp_path / "m.gguf", "sentencepiece", HELD, more=lambda w: w.add_add_space_prefix(False))
    tokenizer, tokens = nblora.load_tokenizer(path), HELD["sentencepiece"]["tokens"]
    assert [tokens[place] for place in tokenizer.encode(["a"]).ids[0]] == ["<s>", "a"]
    assert tokenizer.decode(tokenizer.encode([" a"]).ids[0]) == " a"


def test_sentencepiece_needs_scores_or_merges(tmp_path):
    path = write_vocabulary(
        tmp_path / "m.gguf", "sentencepiece", HELD, more=lambda w: w.kv_data[0].pop("tokenizer.ggml.scores")
    )
    with pytest.raises(FormatError, match="scores is None; expected scores, or merges"):
        nblora.load_tokenizer(path)


def test_tokens_that_are_not_written_in_bytes_are(tmp_path):
    """Some files write tokens of the byte level as they read, a blank as a blank."""
    tokens = [t.replace("Ġ", " ") if t.strip("Ġ").isascii() else t for t in HELD["byte_level"]["tokens"]]
    assert " the" in tokens
    byte_level = {**HELD["byte_level"], "tokens": tokens}
    path = write_vocabulary(tmp_path / "model.gguf", "default", {**HELD, "byte_level": byte_level})
    found = nblora.load_tokenizer(path).encode(HELD["texts"])
    for ids, theirs in zip(found.ids, HELD["ids"]["default"], strict=False):
        assert ids.tolist() == theirs


def test_a_file_without_a_tokenizer(tmp_path):
    from tests.pretrained.gguf_files import write_gguf
    from tests.pretrained.support import FIXTURES

    with pytest.raises(FormatError, match="the file has no tokenizer"):
        nblora.load_tokenizer(write_gguf(tmp_path / "model.gguf", FIXTURES / "llama_clm_all" / "base"))


def test_without_the_package_the_message_names_the_extra(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nblora\[text\]'"):
        nblora.load_tokenizer(bert)


def test_damaged_tokenizers_are_refused_or_read(bert, tmp_path):
    whole = json.dumps(nblora.load_tokenizer(bert)._content).encode()
    outcomes = set()
    for number in range(300):
        damage = mutation.damage_json if number % 2 else mutation.damage
        (tmp_path / "tokenizer.json").write_bytes(damage(random.Random(number), whole))
        try:
            tokenizer = nblora.load_tokenizer(tmp_path)
            tokenizer.encode(["a bad [CLS] x"], ["the"])
            tokenizer.decode([5, 6])
            outcomes.add("read")
        except FormatError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
