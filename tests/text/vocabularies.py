"""Vocabularies for tests: learnt from a text, and written into GGUF files of every kind that is known."""

from collections import Counter

import gguf
import numpy as np

KINDS = ("default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "sentencepiece", "sentencepiece-end")
_CONTROLS = ["<|end|>", "<|im_start|>", "<tool>"]


def learn(words, count):
    """The most frequent pairs of neighbours, joined one after the other."""
    parts, merges = {word: list(word) for word in words}, []
    for _ in range(count):
        pairs = Counter()
        for word, number in words.items():
            for pair in zip(parts[word], parts[word][1:], strict=False):
                pairs[pair] += number
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.get)
        merges.append(list(best))
        for word, each in parts.items():
            joined = []
            for part in each:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts[word] = joined
    return merges


def learn_byte_level(text, count):
    """Tokens, their types and merges, of GPT-2's kind."""
    import tokenizers

    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for word, _ in split.pre_tokenize_str(text))
    merges = learn(words, count)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_CONTROLS, *dict.fromkeys([*letters, *map("".join, merges)])]
    return {"tokens": tokens, "types": [3, 3, 4] + [1] * (len(tokens) - 3), "merges": [" ".join(m) for m in merges]}


def learn_sentencepiece(text, count):
    """Tokens, their types and scores, of SentencePiece's kind."""
    words = Counter(f"▁{word}" for word in text.split())
    merged = list(dict.fromkeys([*map("".join, learn(words, count)), "▁▁", "▁▁▁▁"]))
    letters = sorted({letter for word in words for letter in word if word.isprintable()})
    pieces = [*merged, *(letter for letter in letters if letter not in merged)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4]
    return {"tokens": tokens, "types": types, "scores": [0.0] * 259 + [-float(n) for n in range(len(pieces) + 1)]}


def write_vocabulary(path, kind, held, more=None):
    """Write a GGUF file of a model of nothing, with a vocabulary."""
    writer = gguf.GGUFWriter(path, "qwen2" if kind == "qwen2" else "llama")
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 8,
    }.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces = held["sentencepiece" if "sentence" in kind else "byte_level"]
    writer.add_tokenizer_model("llama" if "sentence" in kind else "gpt2")
    writer.add_token_list(pieces["tokens"])
    writer.add_token_types(pieces["types"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2 if "sentence" in kind else 0)
    if "sentence" in kind:
        writer.add_unk_token_id(0)
        writer.add_token_scores(pieces["scores"])
    else:
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges(pieces["merges"])
    if kind == "llama-bpe":
        writer.add_add_bos_token(True)
    if kind == "sentencepiece-end":
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)
    if more is not None:
        more(writer)
    writer.add_tensor("token_embd.weight", np.zeros((len(pieces["tokens"]), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
