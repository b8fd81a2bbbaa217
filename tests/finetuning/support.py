"""Tiny models with tokenizers, and files of records, for fine-tuning."""

import json
import random

from tests.pretrained.gguf_files import random_llama
from tests.processes import ROOT
from tests.text.folders import sentence_folder

TOKENIZERS = json.loads((ROOT / "tests" / "data" / "finetuning" / "examples.json").read_text(encoding="utf-8"))
WORDS = {"pets": ["cat", "mat", "sat"], "tax": ["law", "tax", "has"]}


def encoder(folder):
    """A BERT of random numbers with a vocabulary of letters and some words."""
    return sentence_folder(folder)


def language_model(folder, name="phi"):
    """A Llama of random numbers with a byte-level tokenizer and a chat template."""
    random_llama(folder, vocabulary=330)
    for file, content in TOKENIZERS[name]["files"].items():
        (folder / file).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TOKENIZERS[name]["template"])
    return folder


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(count=40, seed=0, names=("pets", "tax")):
    """Texts of uneven lengths, of which words of one kind say the label."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        kind = list(WORDS)[number % 2]
        words = [rng.choice([*WORDS[kind], "the", "on", *"abc"]) for _ in range(rng.randint(1, 9))]
        rows.append({"text": " ".join([rng.choice(WORDS[kind]), *words]), "label": names[number % 2]})
    return rows


def completions(count=24, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": f"{rng.choice('abcd')} {rng.randint(0, 9)}:", "completion": " yes" * rng.randint(1, 4)}
        for _ in range(count)
    ]


def conversations(count=12):
    return [
        {"messages": [{"role": "user", "content": f"say {n % 3}"}, {"role": "assistant", "content": f"it is {n % 3}"}]}
        for n in range(count)
    ]


def without_times(text):
    """Lines of a history.csv without the columns of times."""
    rows = [line.split(",") for line in text.splitlines()]
    kept = [place for place, name in enumerate(rows[0]) if "second" not in name]
    return [[row[place] for place in kept] for row in rows]
