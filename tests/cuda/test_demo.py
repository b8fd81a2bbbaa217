"""`nblora demo --device cuda --tiny` on Numba's simulator, beside the same on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn (extra demo)")
resource = pytest.importorskip("resource", reason="needs a system that counts its processes' time")

ROOT = Path(__file__).parents[2]
LOSSES = 1e-4
SECONDS = 300

# The command as it is typed, and then which kernels it launched.
DEMO = """
import json, sys
from collections import Counter
from nblora.cli import main

launched = Counter()
if sys.argv[2] == "cuda":
    from nblora.backends.device import SIMULATED, SimulatedDevice

    assert SIMULATED
    launch = SimulatedDevice.launch

    def counted(self, kernel, grid, threads, *arguments):
        launched[kernel.py_func.__name__] += 1
        assert threads == 32
        launch(self, kernel, grid, threads, *arguments)

    SimulatedDevice.launch = counted
main(["demo", "--tiny", "--device", sys.argv[2], "--output", sys.argv[1]], standalone_mode=False)
print(json.dumps(launched))
"""


def demo(folder, device):
    """What the demo wrote, what it printed, and its launches."""
    variables = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    if device == "cuda":
        variables["NUMBA_ENABLE_CUDASIM"] = "1"
    command = [sys.executable, "-c", DEMO, str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    assert done.returncode == 0, done.stderr
    *printed, launched = done.stdout.splitlines()
    return json.loads((folder / "results.json").read_text()), printed, json.loads(launched)


@pytest.mark.slow
def test_the_tiny_demo_on_the_simulator_loses_what_it_loses_on_the_cpu(tmp_path):
    reference, *_ = demo(tmp_path / "cpu", "cpu")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed, printed, launched = demo(tmp_path / "cuda", "cuda")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS

    assert [row["method"] for row in computed["methods"]] == ["LoRA", "Delta-LoRA"]
    for name in ("Not adapted", "LoRA", "Delta-LoRA"):
        assert any(line.startswith(name) for line in printed)
    for row, expected in zip(computed["methods"], reference["methods"], strict=True):
        (curve,), (other,) = row["curves"], expected["curves"]
        assert len(curve) == len(other) == 1
        for step, right in zip(curve, other, strict=True):
            for loss in ("loss", "val_loss"):
                np.testing.assert_allclose(step[loss], right[loss], rtol=LOSSES, atol=LOSSES)
        assert row["merge_relative_difference"] <= 2e-5

    # Three methods' three steps, pretraining included: every product, loss and update came from the simulated device.
    steps = 3 * 3
    assert launched["softmax_cross_entropy"] >= steps
    assert launched["dense_update"] == 2 * 3  # the two deltas
    assert launched["forward"] >= 3 * steps
    assert launched["input_gradient"] >= 2 * steps
    assert launched["adamw"] >= steps
    assert launched["merge"] == 4
