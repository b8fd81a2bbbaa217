"""Memory is bounded by `--max-memory`, never by the model, a shard or a tensor."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from tests.weights.support import exact_change, linear_factors, write_adapter

RUN = """
import atexit, sys
from pathlib import Path
status = Path(sys.argv.pop())
atexit.register(lambda: status.write_text(Path("/proc/self/status").read_text()))
from nblora.cli import main
main()
"""


def write_sharded(folder, shards, shape, rng):
    """A bfloat16 checkpoint of one tensor a shard; a few random rows are repeated, so that it is soon written."""
    folder.mkdir()
    rows = (rng.standard_normal((64, shape[1])).astype(np.float32) * 0.02).view(np.uint32) >> 16
    rows = rows.astype(np.uint16)
    weight_map = {}
    for at in range(shards):
        name, file = f"layers.{at}.weight", f"model-{at + 1:05d}-of-{shards:05d}.safetensors"
        size = 2 * shape[0] * shape[1]
        header = json.dumps({name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}}).encode()
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for _ in range(shape[0] // 64):
                out.write(rows.tobytes())
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def merge_under(limit, base, adapter, out, *options):
    """Run the command with that much address space; return its peak resident MiB."""
    status = out.with_name("status")
    arguments = ["merge", base, "--adapter", adapter, "--output", out, *options, status]
    subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) if limit else None,
        check=True,
    )
    # Not `ru_maxrss`: that counts what the parent held when it started the child.
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024


def check_rows(base, adapter_tensors, out, shards, shape, rng):
    for at in range(shards):
        change = exact_change(adapter_tensors, f"layers.{at}", 2.0)
        with open(out / f"model-{at + 1:05d}-of-{shards:05d}.safetensors", "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for row in rng.integers(0, shape[0], 20):
                file.seek(start + int(row) * 2 * shape[1])
                bits = np.frombuffer(file.read(2 * shape[1]), np.uint16).astype(np.uint32) << 16
                exact = base[row % 64] + change[row]
                error = abs(bits.view(np.float32) - exact)
                assert (error <= 2.0 ** (np.floor(np.log2(abs(exact) + 1e-30)) - 8) * (1 + 1e-6)).all()


def run_large(tmp_path, rng, shards, shape, limit, *options):
    base = write_sharded(tmp_path / "base", shards, shape, rng)
    tensors = {}
    for at in range(shards):
        tensors |= linear_factors(rng, f"layers.{at}", *shape, scale=0.05)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    peak = merge_under(limit, tmp_path / "base", adapter, tmp_path / "out", *options)
    check_rows(base, tensors, tmp_path / "out", shards, shape, rng)
    return peak


def test_memory_stays_far_below_the_model(tmp_path, rng):
    # One tensor of 256 MiB. A run that has to compile the kernels takes 100 MiB more, so they are compiled before.
    (tmp_path / "small").mkdir()
    run_large(tmp_path / "small", rng, 1, (64, 64), None)
    peak = run_large(tmp_path, rng, 1, (65536, 2048), None, "--max-memory", "16MiB")
    assert peak < 230


@pytest.mark.slow
def test_eight_gigabytes_merge_in_two_of_address_space(tmp_path, rng):
    shape = (1 << 16, 1 << 14)
    try:
        peak = run_large(tmp_path, rng, 4, shape, 2_000_000 * 1024)
        assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) >= 8e9
        assert peak < 400
    finally:
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
