"""Tiny models with a tokenizer, for tests of text and of the pages."""

import json
import shutil

from nblora.storage.safetensors_reader import SafetensorsFile
from nblora.storage.safetensors_writer import write_safetensors
from tests.pretrained.support import FIXTURES

BERT = FIXTURES / "bert_embedding_all" / "base"
LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS = [*LETTERS, *(f"##{letter}" for letter in LETTERS[5:]), "cat", "mat", "the", "has", "sat", "on", "law", "tax"]


def sentence_folder(folder, words=WORDS, modules=("Transformer", "Pooling", "Normalize")):
    """The fixture without its head, as sentence-transformers saves a model."""
    shutil.copytree(BERT, folder, dirs_exist_ok=True)
    with SafetensorsFile(BERT / "model.safetensors") as file:
        held = {name: file.array(name) for name in file.tensors if not name.startswith("classifier")}
    write_safetensors(folder / "model.safetensors", held, {"format": "pt"})
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    entries = [{"type": f"sentence_transformers.models.{name}", "path": paths[name]} for name in modules]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def chat_file(path):
    """A Llama of random numbers with a vocabulary and a chat template, as a GGUF file."""
    from tests.pretrained.gguf_files import random_llama, sentencepiece, write_gguf

    folder = random_llama(path.parent / "numbers", vocabulary=300)
    write_gguf(path, folder, "Q8_0", more=lambda writer: sentencepiece(writer, 300))
    shutil.rmtree(folder)
    return path
