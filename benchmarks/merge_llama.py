"""`nblora merge` against PEFT on a generated Llama of 1.1 billion bfloat16 parameters, each in its own process.

    python benchmarks/merge_llama.py --work /path/on/a/large/disk [--peer /path/to/python-with-peft]

The base and the adapter (rank 16 on every projection) are generated once with NumPy. A run is the whole process, from
its start to the output flushed to the disk; memory is the process's maximum resident set. A plain copy of the file with
fsync is the limit. Every run's output is compared with the formula on sampled rows before its time counts.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from nblora.storage.safetensors_reader import SafetensorsFile
from nblora.storage.safetensors_writer import Entry, build_header

HIDDEN, INNER, LAYERS, VOCABULARY, HEADS, KV_HEADS, RANK, ALPHA = 2048, 5632, 22, 32000, 32, 4, 16, 32
KV = HIDDEN // HEADS * KV_HEADS
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
PEFT_RUN = """
import sys, torch, os
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="100GB")
for name in os.listdir(out):
    fd = os.open(os.path.join(out, name), os.O_RDONLY)
    os.fsync(fd)
"""
COPY_RUN = """
import os, shutil, sys
shutil.copyfile(*sys.argv[1:])
fd = os.open(sys.argv[2], os.O_RDWR)
os.fsync(fd)
"""


def bfloat16(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    numbers = rng.standard_normal(shape, np.float32) * np.float32(scale)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def generate(folder: Path, layers: int = LAYERS) -> None:
    rng = np.random.default_rng(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True, exist_ok=True)
    adapter.mkdir(exist_ok=True)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        for name, shape in PROJECTIONS.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    write(base / "model.safetensors", shapes, rng, 0.02)
    factors = {}
    for layer in range(layers):
        for name, (outputs, inputs) in PROJECTIONS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{module}.lora_A.weight"] = (RANK, inputs)
            factors[f"{module}.lora_B.weight"] = (outputs, RANK)
    write(adapter / "adapter_model.safetensors", factors, rng, 0.02)
    leaves = [name.split(".")[1] for name in PROJECTIONS]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": leaves}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(model))


def write(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator, scale: float) -> None:
    with open(path, "wb") as file:
        file.write(build_header([Entry(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"}))
        for shape in shapes.values():
            file.write(bfloat16(rng, shape, scale))
        file.flush()
        os.fsync(file.fileno())


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and maximum resident MiB of a process."""
    began = time.perf_counter()
    with open(os.devnull, "wb") as sink:
        process = subprocess.Popen(command, stdout=sink)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:3]} ended with exit code {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def worst_error(folder: Path, merged: Path) -> float:
    """Largest difference from the exact value on sampled rows, in units in the last place of max(|W|, |change|)."""
    base, adapter = (
        SafetensorsFile(folder / "base/model.safetensors"),
        SafetensorsFile(folder / "adapter/adapter_model.safetensors"),
    )
    result, worst = SafetensorsFile(merged), 0.0

    def wide(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    for name in PROJECTIONS:
        for layer in (0, LAYERS // 2):
            weight = f"model.layers.{layer}.{name}.weight"
            A, B = (wide(adapter.read(f"base_model.model.model.layers.{layer}.{name}.lora_{x}.weight")) for x in "AB")
            W = wide(base.read(weight)[:64])
            change = ALPHA / RANK * B[:64] @ A
            unit = 2.0 ** (np.floor(np.log2(np.maximum(np.maximum(abs(W), abs(change)), 1e-38))) - 7)
            worst = max(worst, float((abs(wide(result.read(weight)[:64]) - (W + change)) / unit).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with 8 GB to spare")
    parser.add_argument(
        "--peer", help="a Python with torch, transformers and peft; left out, only nblora and the copy run"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--generate", action="store_true", help="only generate the base and the adapter")
    arguments = parser.parse_args()
    folder = arguments.work
    if arguments.generate:
        generate(folder)
        return
    if not (folder / "base/config.json").exists():
        # In a process of its own: a process starts with its parent's size, and that is what its maximum would be.
        subprocess.run([sys.executable, __file__, "--generate", "--work", str(folder)], check=True)
    source, out = folder / "base/model.safetensors", folder / "out"
    commands = {
        "copy + fsync": [sys.executable, "-S", "-c", COPY_RUN, str(source), str(out)],
        "nblora merge": [
            sys.executable, "-c", "from nblora.cli import main; main()", "merge", str(folder / "base"),
            "--adapter", str(folder / "adapter"), "--output", str(out),
        ],
    }  # fmt: skip
    if arguments.peer:
        commands["peft"] = [arguments.peer, "-c", PEFT_RUN, str(folder / "base"), str(folder / "adapter"), str(out)]
    times: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, float] = {}
    for repeat in range(arguments.repeats + 1):
        for name, command in commands.items():
            if name == "peft" and repeat not in (1, 2, 3):
                continue
            shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
            os.sync()
            seconds, peak = run(command)
            if repeat == 0:
                continue  # warms the page cache and the compiled kernels
            if out.is_dir():
                error = worst_error(folder, out / "model.safetensors")
                assert name == "peft" or error <= 1, f"{name} is {error} units off"
            times[name].append(seconds)
            memory[name] = max(memory.get(name, 0), peak)
            print(f"{name:<14} {seconds:7.2f} s  {peak:7.0f} MiB", flush=True)
    print()
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        spread = f"{min(times[name]):.2f} to {max(times[name]):.2f}"
        ratio = median / medians["copy + fsync"]
        print(f"{name:<14} median {median:6.2f} s ({spread})  {ratio:5.2f} × copy  peak {memory[name]:.0f} MiB")
    print(f"machine: {os.cpu_count()} cores, Python {sys.version.split()[0]}, NumPy {np.__version__}")
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
