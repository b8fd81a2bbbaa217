"""Real models against PEFT: steps of LoRA on MiniLM's shape and on a small Llama's, one process a peer, in turn.

    python benchmarks/models.py [--case WORDS] [--rounds 5] [--update-docs docs/performance-models.md]

Needs torch, transformers and peft beside nblora. Weights are random, in folders of transformers' that both peers load;
both begin from one adapter. Before anything is timed, 20 steps of each are compared, losses and adapters.

The limit is the time that the frozen projections take forward and back by the input, and attention forward (two
products) and back (four), at the best rate that NumPy's or PyTorch's product reaches here. Padding is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from nblora.bench.machine import Watch, busy_with, describe_machine
from nblora.bench.report import replace_between_markers
from nblora.bench.tables import table
from nblora.storage.safetensors_writer import write_safetensors

MINILM = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 384,
    "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522,
    "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {"MiniLM": MINILM, "Llama": LLAMA}
ALL = {
    "MiniLM": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
CASES = {
    "MiniLM 32 x 64": ("MiniLM", [64] * 32, None),
    "MiniLM 32 x 128": ("MiniLM", [128] * 32, None),
    "MiniLM 8 x 32": ("MiniLM", [32] * 8, None),
    "MiniLM 1 x 128": ("MiniLM", [128], None),
    "MiniLM 32 x 5 to 60": ("MiniLM", [5 + 55 * i // 31 for i in range(32)], None),
    "MiniLM 32 x 64, query and value": ("MiniLM", [64] * 32, ["query", "value"]),
    "Llama 1 x 256": ("Llama", [256], None),
    "Llama 4 x 256": ("Llama", [256] * 4, None),
}
STEPS, RATE = {"MiniLM": 20, "Llama": 8}, 1e-3
TEXTS = 1000


# --- what both peers get -----------------------------------------------------------------------------------------


def write_base(folder, config):
    """A folder of random weights, as transformers' initialisation draws them."""
    import nblora.pretrained.families as families
    from nblora.pretrained.config import Config
    from nblora.pretrained.source import Source

    rng, tensors = np.random.default_rng(0), {}

    class Drawn(Source):
        def take(self, name, *shape):
            one = "norm" in name.lower() and name.endswith("weight")
            array = np.ones(shape, "f4") if one else 0.02 * rng.standard_normal(shape, "f4")
            tensors[name] = array * (0 if name.endswith("bias") else 1)
            return array

    family, source = families.FAMILIES[config["model_type"]], Drawn(np.dtype("f4"), {})
    family.body(Config(config, "config.json"), source, family.prefix)
    if "Sequence" in config["architectures"][0]:
        family.classifier(Config(config, "config.json"), source, 2)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def data(name):
    """Token ids and labels of a case."""
    model, lengths, _ = CASES[name]
    rng = np.random.default_rng(1)
    ids = [rng.integers(1000, 30000, length) for length in lengths]
    return ids, (np.arange(len(lengths)) % 2 if model == "MiniLM" else None)


def short_texts():
    """Token ids of many short texts, the shortest first, as both sort them."""
    rng = np.random.default_rng(2)
    return [rng.integers(1000, 30000, length) for length in np.sort(rng.integers(5, 61, TEXTS))]


def work(name):
    """Floating-point operations of the limit."""
    model, lengths, _ = CASES[name]
    c, tokens = MODELS[model], sum(lengths)
    h, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    keys = h * c.get("num_key_value_heads", c["num_attention_heads"]) // c["num_attention_heads"]
    weights = layers * (2 * h * h + 2 * h * keys + (2 if model == "MiniLM" else 3) * h * inner)
    causal = 0.5 if model == "Llama" else 1.0
    attention = layers * 4 * h * causal * sum(length * length for length in lengths)
    head = h * c["vocab_size"] if model == "Llama" else 0
    return 2 * 2 * tokens * (weights + head) + 3 * attention


# --- peers -------------------------------------------------------------------------------------------------------


def nblora_peer(folder, device="cpu"):
    """Answer requests: prepare a case, train some steps and tell seconds and losses, save the adapter."""
    import nblora
    from nblora.training import AdamW

    def prepare(name):
        task, _, target = CASES[name]
        model = nblora.load_pretrained(folder / task)
        model.adapt(target or ALL[task], rank=8, alpha=16, seed=0)
        model.save_adapter(folder / "adapter", force=True)
        return model.to(device), *data(name)

    def steps(held, count):
        model, ids, labels = held
        history = nblora.fit(
            model, ids, labels, epochs=count, batch_size=len(ids), shuffle=False, progress=False,
            optimizer=AdamW(RATE, weight_decay=0.0),
        )  # fmt: skip
        return history["seconds"], history["loss"]

    def embed(count):
        model, texts, seconds = nblora.load_pretrained(folder / "MiniLM", task="embedding"), short_texts(), []
        with model._backend.lending():  # as nblora.encode does
            for _ in range(count):
                begun = time.perf_counter()
                found = np.concatenate([model(texts[start : start + 32]) for start in range(0, TEXTS, 32)])
                seconds.append(time.perf_counter() - begun)
        return seconds, found[::50].tolist()

    return prepare, steps, lambda held, path: held[0].save_adapter(path, force=True), embed


def peft_peer(folder, attention, device="cpu"):
    """The same by PyTorch."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import peft
    import torch
    import transformers

    torch.set_num_threads(2)
    kinds = {"MiniLM": transformers.AutoModelForSequenceClassification, "Llama": transformers.AutoModelForCausalLM}

    def prepare(name):
        task, _, _ = CASES[name]
        base = kinds[task].from_pretrained(folder / task, attn_implementation=attention, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train().to(device)
        ids, labels = data(name)
        width = max(map(len, ids))
        batch = {"input_ids": np.zeros((len(ids), width), int), "attention_mask": np.zeros((len(ids), width), int)}
        for row, each in enumerate(ids):
            batch["input_ids"][row, : len(each)], batch["attention_mask"][row, : len(each)] = each, 1
        batch["labels"] = np.where(batch["attention_mask"] > 0, batch["input_ids"], -100) if labels is None else labels
        rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
        return model, rule, {key: torch.tensor(value, device=device) for key, value in batch.items()}

    def steps(held, count):
        model, rule, batch = held
        seconds, losses = [], []
        for _ in range(count):
            begun = time.perf_counter()
            rule.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            rule.step()
            losses.append(float(loss))
            seconds.append(time.perf_counter() - begun)
        return seconds, losses

    def embed(count):
        model = transformers.AutoModel.from_pretrained(folder / "MiniLM", attn_implementation=attention).eval()
        texts, seconds = short_texts(), []
        for _ in range(count):
            begun, found = time.perf_counter(), []
            with torch.inference_mode():
                for start in range(0, TEXTS, 32):
                    batch = texts[start : start + 32]
                    ids = torch.zeros((len(batch), max(map(len, batch))), dtype=torch.long)
                    for row, each in enumerate(batch):
                        ids[row, : len(each)] = torch.from_numpy(each)
                    mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(each)] for each in batch])).long()
                    rows = model(input_ids=ids, attention_mask=mask).last_hidden_state
                    mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                    found.append(mean.numpy())
            seconds.append(time.perf_counter() - begun)
        return seconds, np.concatenate(found)[::50].tolist()

    return prepare, steps, lambda held, path: held[0].save_pretrained(path), embed


def serve(peer, folder):
    """Read requests, one a line, and answer each."""
    prepare, steps, save, embed = (
        nblora_peer(folder) if peer == "nblora" else peft_peer(folder, peer.removeprefix("peft-"))
    )
    held = None
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        what, argument = json.loads(line)
        if what == "prepare":
            held = None
            held, answer = prepare(argument), None
        elif what == "steps":
            answer = steps(held, argument)
        elif what == "embed":
            answer = embed(argument)
        elif what == "save":
            answer = save(held, folder / argument) and None
        else:
            answer = peak()
        print(json.dumps(answer), file=out, flush=True)


def peak():
    """MiB of memory that the process has held at most."""
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1]) / 1024


class Peer:
    """A peer in its process."""

    def __init__(self, name, folder):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, "--folder", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, what, argument=None):
        """Send a request, and return its answer."""
        print(json.dumps([what, argument]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


# --- measuring ---------------------------------------------------------------------------------------------------


def product_rate():
    """The best rate of a product of float32 here, in operations a second, and whose it is."""
    import torch

    torch.set_num_threads(2)
    best, by = 0.0, ""
    for n, inner, out in ((2048, 384, 1536), (2048, 1536, 384), (1024, 1024, 1024), (2048, 2048, 2048)):
        a, b = np.random.default_rng(0).random((2, n * inner), "f4")[:, : n * inner]
        a, b = a.reshape(n, inner), np.resize(b, (inner, out))
        c, d, found = torch.tensor(a), torch.tensor(b), torch.empty(n, out)
        target = np.empty((n, out), "f4")
        products = {"NumPy": lambda: np.matmul(a, b, target), "PyTorch": lambda: torch.mm(c, d, out=found)}  # noqa: B023 - called in this round
        for who, run in products.items():
            for _ in range(20):
                begun = time.perf_counter()
                run()
                rate = 2 * n * inner * out / (time.perf_counter() - begun)
                if rate > best:
                    best, by = rate, who
    return best, by


def same(peers, folder, name):
    """How far the losses of 20 steps, and the adapters afterwards, lie apart, each as a share of the largest."""
    from nblora.storage.safetensors_reader import SafetensorsFile

    found, losses = [], []
    for peer in peers:
        peer.ask("prepare", name)
        losses.append(peer.ask("steps", STEPS[CASES[name][0]])[1])
        peer.ask("save", f"after-{peer.name}")
        with SafetensorsFile(folder / f"after-{peer.name}" / "adapter_model.safetensors") as file:
            found.append({key: file.read_wide(key) for key in file.tensors})
    apart = np.abs(np.subtract(*losses)).max() / max(losses[0])
    largest = max(np.abs(value).max() for value in found[0].values())
    return apart, max(np.abs(found[0][key] - found[1][key]).max() for key in found[0]) / largest, losses[0]


def measure(folder, name, rounds, rate):
    """A row of the table."""
    nblora_peer, sdpa, eager = (Peer(peer, folder) for peer in ("nblora", "peft-sdpa", "peft-eager"))
    try:
        loss_apart, adapter_apart, losses = same((nblora_peer, sdpa), folder, name)
        eager.ask("prepare", name)
        eager.ask("steps", 2)
        times = {peer.name: [] for peer in (nblora_peer, sdpa, eager)}
        for _ in range(rounds):
            for peer in (nblora_peer, sdpa, eager):
                times[peer.name] += peer.ask("steps", 3)[0][1:]
        medians = {peer: float(np.median(taken)) for peer, taken in times.items()}
        faster = min(("peft-sdpa", "peft-eager"), key=medians.get)
        memory = nblora_peer.ask("peak") / {"peft-sdpa": sdpa, "peft-eager": eager}[faster].ask("peak")
    finally:
        for peer in (nblora_peer, sdpa, eager):
            peer.close()
    own, tokens = medians["nblora"], sum(CASES[name][1])
    limit = work(name) / rate
    return [
        name, f"{1e3 * own:.0f}", f"{tokens / own:,.0f}", f"{medians[faster] / own:.2f}", faster.removeprefix("peft-"),
        f"{limit / own:.2f}", f"{limit / medians[faster]:.2f}", f"{memory:.2f}", f"{loss_apart:.0e}",
        f"{adapter_apart:.0e}", f"{losses[0]:.3f} to {losses[-1]:.3f}",
    ]  # fmt: skip


def measure_embeddings(folder, rounds):
    """Texts a second of nblora, how much longer PyTorch takes, and how far the rows lie apart."""
    peers = [Peer(peer, folder) for peer in ("nblora", "peft-sdpa", "peft-eager")]
    times, rows = {peer.name: [] for peer in peers}, {}
    try:
        for _ in range(rounds):
            for peer in peers:
                seconds, rows[peer.name] = peer.ask("embed", 2)
                times[peer.name].append(seconds[1])
    finally:
        for peer in peers:
            peer.close()
    own, *others = (float(np.median(taken)) for taken in times.values())
    apart = np.abs(np.subtract(rows["nblora"], rows["peft-sdpa"])).max() / np.abs(rows["nblora"]).max()
    return (
        f"Embeddings of {TEXTS:,} texts of 5 to 60 tokens by MiniLM, mean of the rows, batches of 32 of like length: "
        f"{TEXTS / own:,.0f} texts a second; transformers and PyTorch, the same batches padded, take "
        f"{min(others) / own:.2f} times as long. The rows lie {apart:.0e} apart."
    )


HEADER = [
    "LoRA, rank 8", "nblora, ms", "tokens/s", "PEFT takes", "attention", "of the limit", "PEFT's", "memory", "losses",
    "adapters", "loss",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case", action="append", help="words of its name; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--update-docs", type=Path, help="put the table into this page, from a quiet machine alone")
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.folder)
    about, watch = describe_machine(), Watch()
    chosen = [name for name in CASES if not options.case or any(words in name for words in options.case)]
    rate, by = product_rate()
    print(f"{about['processor']}; best product {rate / 1e9:.0f} GFLOP/s ({by})", file=sys.stderr)
    rows, embeddings = [], ""
    with tempfile.TemporaryDirectory() as name:
        for model in {CASES[case][0] for case in chosen}:
            write_base(Path(name) / model, MODELS[model])
        for case in chosen:
            rows.append(measure(Path(name), case, options.rounds, rate))
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        if (Path(name) / "MiniLM").exists():
            embeddings = measure_embeddings(Path(name), options.rounds)
            print(embeddings, file=sys.stderr, flush=True)
    busy = busy_with({**about, **watch.shares()})
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "numpy", "numba"))
    how = f"- {about['processor']}, {about['cores']} cores; {versions}; {options.rounds} rounds, peers in turn."
    limit = f"- The best product of float32 reached {rate / 1e9:.0f} GFLOP/s ({by})."
    text = f"### {about['processor']}\n\n{how}\n{limit}\n\n{table(HEADER, rows)}\n\n{embeddings}".strip()
    print(f"{text}\n\n{busy}" if busy else text)
    if options.update_docs and not busy:
        replace_between_markers(options.update_docs, about["processor"], text)
    return 1 if options.update_docs and busy else 0


if __name__ == "__main__":
    sys.exit(main())
