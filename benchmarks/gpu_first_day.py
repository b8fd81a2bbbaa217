"""The first day on a GPU: what must be known, the most valuable first, in 22 minutes at most.

    python benchmarks/gpu_first_day.py                       # every part that has no result yet
    python benchmarks/gpu_first_day.py --part step --part fit
    python benchmarks/gpu_first_day.py --again               # all of them anew

Each part runs in a process of its own with a limit of its own, so that none can take another down. Results go to one
JSON file after every part, and from there into one Markdown page; a run that was cut off goes on where it was.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SHAPES = ((64, 768, 768), (256, 4096, 4096), (2048, 4096, 4096))
RANK = 8


# --- helpers of the parts ----------------------------------------------------------------------------------------


def adapter_of(shape, kind="delta", precision="float32", device="cuda"):
    import nblora

    _, inputs, outputs = shape
    cls = nblora.DeltaLoRAAdapter if kind == "delta" else nblora.LoRAAdapter
    adapter = cls(nblora.Dense.random(inputs, outputs, seed=0), RANK, seed=0)
    adapter.set_parameter("lora_B", np.random.default_rng(1).normal(size=(RANK, outputs)) * 0.01)
    return adapter if device == "cpu" else adapter.to(device, precision=precision)


def problem(shape, precision="float32", kind="delta"):
    """A step on device arrays, and the adapter."""
    rng = np.random.default_rng(0)
    adapter = adapter_of(shape, kind, precision)
    N, inputs, outputs = shape
    bring = adapter._backend.from_host
    x, grad = (bring(rng.normal(size=(N, size)).astype(np.float32)) for size in (inputs, outputs))

    def step():
        y = adapter.forward(x)
        return y, adapter.backward_update(grad, 1e-4)

    return step, adapter


class Events:
    """Times between pairs of CUDA events on the library's stream."""

    def __init__(self):
        from cuda.bindings import driver

        from nblora.backends.gpu import STREAM, check

        self.driver, self.stream, self.check = driver, STREAM, check
        self.pairs = []

    def begin(self):
        pair = [self.check(self.driver.cuEventCreate(0), "an event") for _ in range(2)]
        self.check(self.driver.cuEventRecord(pair[0], self.stream), "an event")
        self.pairs.append(pair)

    def end(self):
        self.check(self.driver.cuEventRecord(self.pairs[-1][1], self.stream), "an event")

    def microseconds(self):
        found = []
        for begin, end in self.pairs:
            self.check(self.driver.cuEventSynchronize(end), "waiting")
            found.append(1e3 * self.check(self.driver.cuEventElapsedTime(begin, end), "a time"))
            for event in (begin, end):
                self.driver.cuEventDestroy(event)
        self.pairs = []
        return found


def timed(step, adapter, rounds=30):
    """Least host and event times of a step in µs; the queue is short, so that the host never waits for the GPU."""
    device = adapter._backend._device
    for _ in range(5):
        step()
    device.synchronize()
    events, host = Events(), []
    for _ in range(rounds):
        device.synchronize()
        events.begin()
        before = time.perf_counter()
        step()
        host.append(1e6 * (time.perf_counter() - before))
        events.end()
    return {"host_us": min(host), "event_us": min(events.microseconds()), "rounds": rounds}


def deviation(found, expected):
    """Largest difference by the largest expected value."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


# --- the parts ---------------------------------------------------------------------------------------------------


def info():
    """What is here."""
    import nblora
    from nblora.backends import describe

    found = {"devices": nblora.devices(), "python": sys.version.split()[0], "numpy": np.__version__}
    found["gpu"] = describe("cuda")
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False) if _which("nvidia-smi") else None
    found["nvidia_smi"] = smi.stdout.splitlines()[:20] if smi else "not here"
    return found


def step():
    """One step against the CPU."""
    found = {}
    for shape in ((5, 9, 6), (300, 1000, 997)):
        global RANK
        RANK = min(8, *shape[1:]) if shape[1] > 9 else 2
        rng = np.random.default_rng(0)
        x, grad = (rng.normal(size=(shape[0], size)).astype(np.float32) for size in shape[1:])
        host, device = adapter_of(shape, device="cpu"), adapter_of(shape)
        compared = {}
        for _ in range(2):
            compared["y"] = deviation(device.forward(x), host.forward(x))
            compared["gx"] = deviation(device.backward_update(grad, 0.01), host.backward_update(grad, 0.01))
        for name in host.parameter_names():
            compared[name] = deviation(device.get_parameter(name), host.get_parameter(name))
        found[str(shape)] = compared
    worst = max(value for compared in found.values() for value in compared.values())
    found["worst"], found["bound"] = worst, 1e-4
    if not worst <= 1e-4:
        raise PartFailed(f"values differ from the CPU's by {worst:.1e} of the largest", found)
    return found


def memory():
    """A thousand steps, watching memory."""
    once, adapter = problem((64, 768, 768))
    once()
    device, seen = adapter._backend._device, []
    for _ in range(10):
        for _ in range(100):
            once()
        device.synchronize()
        free, total = device.memory()
        seen.append((total - free) / 1e6)
    if seen[-1] > seen[0] + 1:
        raise PartFailed(f"memory grew from {seen[0]:.0f} to {seen[-1]:.0f} MB", {"used_mb": seen})
    return {"used_mb": seen}


def tests():
    """`pytest -m gpu`."""
    return _command([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/cuda", "-p", "no:cacheprovider"])


def sanitizer():
    """compute-sanitizer over a small step."""
    if not _which("compute-sanitizer"):
        return {"skipped": "compute-sanitizer is not here: it comes with the CUDA toolkit"}
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import gpu_first_day as g; once, a = g.problem((33, 70, 50)); "
        "once(); once(); a._backend._device.synchronize()"
    )
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
        found[tool] = _command(command)
    return found


def kernels():
    """Host and event time at three shapes, and of each kernel."""
    found = {}
    for shape in SHAPES:
        once, adapter = problem(shape)
        row = timed(once, adapter)
        device, launch, events, names, host = adapter._backend._device, None, Events(), [], []
        launch = device.launch

        def watched(kernel, *rest, launch=launch, events=events, names=names, host=host):
            events.begin()
            before = time.perf_counter()
            launch(kernel, *rest)
            host.append(1e6 * (time.perf_counter() - before))
            events.end()
            names.append(kernel.py_func.__name__)

        device.launch = watched
        for _ in range(10):
            once()
        device.synchronize()
        del device.launch
        each = defaultdict(list)
        for name, on_host, on_device in zip(names, host, events.microseconds(), strict=True):
            each[name].append((on_host, on_device))
        row["kernels"] = {
            name: {"a_step": len(times) / 10, "host_us": min(a for a, _ in times), "event_us": min(b for _, b in times)}
            for name, times in each.items()
        }
        found[str(shape)] = row
    return found


def sweep():
    """Tiles and splits."""
    from dataclasses import replace

    from nblora.kernels.linear.cuda.tiles import Tile

    found = {}
    for shape in SHAPES[:2]:
        once, adapter = problem(shape)
        backend = adapter._backend
        before = backend._shapes
        given = before["float32"]
        for name, change in {
            "as it is": {},
            "split 128": {"split": 128},
            "split 512": {"split": 512},
            "wide 64x64": {"wide": Tile(64, 64, 8)},
            "wide 128x64": {"wide": Tile(128, 64, 8)},
            "flat 64x64": {"flat": Tile(64, 64, 8)},
            "narrow 32x32": {"narrow": Tile(32, 32, 8)},
            "narrow 128x32": {"narrow": Tile(128, 32, 8)},
            "narrow without groups": {"narrow": Tile(64, 32, 8)},
            "narrow 8 deep": {"narrow": Tile(64, 32, 8, groups=4)},
            "small as wide": {"small": given.wide},
            "small 2 groups": {"small": Tile(64, 64, 8, groups=2)},
        }.items():
            try:
                backend._shapes = {**before, "float32": replace(given, **change)}
                found[f"{shape} {name}"] = timed(once, adapter, 10)
            except Exception as error:  # one tile that does not compile leaves the others to be measured
                found[f"{shape} {name}"] = {"failed": f"{type(error).__name__}: {error}"[:200]}
        backend._shapes = before
    return found


def bench():
    """`nblora bench --device cuda` at three shapes."""
    cases = [item for shape in SHAPES for item in ("--case", ",".join(map(str, shape)))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from nblora.cli import main; main()", "bench", "--device", "cuda", *cases]
        command += ["--dtype", "float32", "--rounds", "5", "--output", folder]
        done = _command(command)
        return done | {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


def precision():
    """TF32 and bfloat16 bases: error against float64, and time."""
    found = {}
    for name in ("float32", "tf32", "bf16-base"):
        shape = SHAPES[1]
        once, adapter = problem(shape, name, "lora")
        reference = adapter_of(shape, "lora", device="cpu")
        x = np.random.default_rng(2).normal(size=(64, shape[1])).astype(np.float32)
        weight, A, B = (reference.get_parameter(p).astype(np.float64) for p in ("base.weight", "lora_A", "lora_B"))
        bias = reference.base_layer.bias
        expected = x @ weight + reference.scaling * (x @ A) @ B + (0 if bias is None else bias)
        found[name] = {"deviation": deviation(adapter.forward(x), expected), **timed(once, adapter, 10)}
    return found


def torch_interop():
    """Tensors of PyTorch, produced on a side stream."""
    try:
        import torch
    except ImportError:
        return {"skipped": "PyTorch is not installed"}
    if not torch.cuda.is_available():
        return {"skipped": "this PyTorch finds no GPU"}
    adapter = adapter_of((256, 1024, 1024), "lora")
    rng, worst = np.random.default_rng(3), 0.0
    side = torch.cuda.Stream()
    for _ in range(20):
        x = rng.normal(size=(256, 1024)).astype(np.float32)
        with torch.cuda.stream(side):
            tensor = torch.from_numpy(x).pin_memory().cuda(non_blocking=True)
            for _ in range(50):
                tensor = tensor * 1.0
            y = adapter.forward(tensor)
        worst = max(worst, deviation(np.asarray(y), adapter.forward(x)))
        side.synchronize()
    if worst > 1e-6:
        raise PartFailed(f"a tensor of a side stream was read before it was there: {worst:.1e}", {"worst": worst})
    return {"worst": worst}


def fit():
    """`fit` of four layers: time a step, losses beside the CPU's."""
    import nblora

    rng = np.random.default_rng(4)
    sizes, found = [64, 256, 256, 256, 10], {}
    x, y = rng.normal(size=(6400, 64)).astype(np.float32), rng.normal(size=(6400, 10)).astype(np.float32)
    for device in ("cuda", "cpu"):
        layers = [nblora.Dense.random(a, b, activation="relu", seed=b) for a, b in itertools.pairwise(sizes)]
        model = nblora.Sequential(*layers)
        model.adapt([str(place) for place in range(4)], "lora", rank=8, seed=0)
        model.to(device)
        history = nblora.fit(model, x, y, loss="mse", epochs=3, batch_size=64, seed=0)
        found[device] = {"loss": list(history["loss"]), "step_us": 1e6 * min(history["seconds"]) / 100}
    worst = deviation(found["cuda"]["loss"], np.array(found["cpu"]["loss"]))
    if not worst <= 1e-3:
        raise PartFailed(f"losses differ from the CPU's by {worst:.1e}", found)
    return found


def models():
    """MiniLM's shape with random weights: steps of LoRA against the CPU's and PEFT's, tokens of a small Llama."""
    import models as bench

    import nblora

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench.write_base(folder / "MiniLM", bench.MINILM)
        bench.write_base(folder / "Llama", bench.LLAMA | {"num_hidden_layers": 2, "vocab_size": 4096})
        for case in ("MiniLM 32 x 64", "MiniLM 32 x 5 to 60"):
            found[case] = _against_peers(bench, case, folder)
        prompts, tokens = [[1, 2, 3], [7, 8]], {}
        for device in ("cpu", "cuda"):
            model = nblora.load_pretrained(folder / "Llama").to(device)
            nblora.generate(model, prompts, max_new_tokens=2, eos=[])
            begun = time.perf_counter()
            tokens[device] = [t.tolist() for t in nblora.generate(model, prompts, max_new_tokens=32, eos=[])]
            found[f"Llama of 2 layers, {device}: ms a token of 2 texts"] = 1e3 * (time.perf_counter() - begun) / 32
    found["same tokens"] = tokens["cpu"] == tokens["cuda"]
    worst = max(found[case]["deviation of losses"] for case in found if case.startswith("MiniLM"))
    if not (worst <= 1e-3 and found["same tokens"]):
        raise PartFailed(f"losses differ from the CPU's by {worst:.1e}, or tokens do", found)
    return found


def _against_peers(bench, case, folder):
    """Losses of three steps beside the CPU's, and milliseconds of a step, nblora's and PEFT's."""
    losses, found = {}, {}
    for device, count in (("cpu", 3), ("cuda", 40)):
        prepare, steps, *_ = bench.nblora_peer(folder, device)
        held = prepare(case)
        losses[device] = steps(held, 3)[1]
        if device == "cuda":
            found["nblora, ms a step"] = 1e3 * float(np.median(steps(held, count)[0]))
    found["deviation of losses"] = deviation(losses["cuda"], np.array(losses["cpu"]))
    try:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("this PyTorch finds no GPU")
        for attention in ("sdpa", "eager"):
            prepare, steps, *_ = bench.peft_peer(folder, attention, "cuda")
            held = prepare(case)
            steps(held, 5)
            found[f"PEFT, {attention}, ms a step"] = 1e3 * float(np.median(steps(held, 40)[0]))
    except ImportError as error:
        found["PEFT"] = f"left out: {error}"
    return found


PARTS = {  # in the order of their worth, with their limits in seconds: 22 minutes in all, none above 8
    "info": (info, 40),
    "step": (step, 90),
    "memory": (memory, 60),
    "tests": (tests, 200),
    "sanitizer": (sanitizer, 120),
    "kernels": (kernels, 120),
    "models": (models, 140),
    "sweep": (sweep, 120),
    "bench": (bench, 200),
    "precision": (precision, 90),
    "torch": (torch_interop, 60),
    "fit": (fit, 80),
}


# --- running them ------------------------------------------------------------------------------------------------


class PartFailed(Exception):
    """A part that ran and found something wrong; its second argument is what it had measured."""


def _which(program):
    import shutil

    return shutil.which(program)


def _command(command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    found = {"command": " ".join(command[:8]), "status": done.returncode, "tail": done.stdout.splitlines()[-12:]}
    if done.returncode:
        raise PartFailed(f"it ended with status {done.returncode}", found | {"errors": done.stderr.splitlines()[-12:]})
    return found


def run_part(name):
    """Run a part in this process and write its result to standard output."""
    try:
        outcome = {"state": "done", "result": PARTS[name][0]()}
    except PartFailed as error:
        outcome = {"state": "failed", "why": error.args[0], "result": error.args[1]}
    except Exception as error:
        outcome = {"state": "failed", "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    print("\n" + json.dumps(outcome))


def outcome_of(name):
    """Run a part in a process of its own."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--inside", name]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=os.name == "posix"
    )
    try:
        output, errors = process.communicate(timeout=PARTS[name][1])
    except subprocess.TimeoutExpired:
        _end(process)
        outcome = {"state": "failed", "why": f"it took longer than its {PARTS[name][1]} seconds"}
    except BaseException:
        _end(process)
        raise
    else:
        try:
            outcome = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError):
            why = f"its process ended with status {process.returncode}"
            outcome = {"state": "failed", "why": why, "errors": errors.splitlines()[-12:]}
    return outcome | {"seconds": round(time.perf_counter() - begin, 1)}


def _end(process):
    """End a part with all that it has started."""
    if os.name == "posix":
        os.killpg(process.pid, 9)
    else:
        process.kill()
    process.communicate()


def markdown(results):
    lines = ["# The first day on a GPU", "", "| part | what | state | seconds |", "|---|---|---|---:|"]
    for name, (function, _) in PARTS.items():
        row = results.get(name, {"state": "not run", "seconds": ""})
        said = re.sub(r"[|\n]", " ", row["state"] + (f": {row['why']}" if "why" in row else ""))[:200]
        lines.append(f"| {name} | {function.__doc__.rstrip('.')} | {said} | {row['seconds']} |")
    for name, row in results.items():
        lines += ["", f"## {name}", "", "```json", json.dumps(row.get("result", row), indent=1)[:20_000], "```"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    parser.add_argument("--again", action="store_true", help="parts that have a result too")
    parser.add_argument("--output", type=Path, default=Path("gpu_first_day"), help="where .json and .md are written")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return run_part(options.inside)
    held = options.output.with_suffix(".json")
    results = json.loads(held.read_text()) if held.exists() else {}
    for name in options.part or PARTS:
        if results.get(name, {}).get("state") == "done" and not (options.again or options.part):
            continue
        print(f"{name}: ", end="", flush=True)
        results[name] = outcome_of(name)
        print(results[name]["state"], results[name].get("why", ""), f"({results[name]['seconds']} s)", flush=True)
        new = held.with_suffix(".json.new")
        new.write_text(json.dumps(results, indent=1))
        new.replace(held)
        options.output.with_suffix(".md").write_text(markdown(results))
    return None


if __name__ == "__main__":
    main()
