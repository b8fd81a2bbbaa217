"""SIGKILL at random moments of save, fit and merge: what was there is whole, and the next run leaves no litter."""

import os

import pytest

from tests.processes import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed")

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
import nblora
from nblora.formats import save_peft
from nblora.storage.safetensors_writer import write_safetensors
from nblora.weights import merge

what, count, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
rng = random.Random(seed)
target = folder / "target"

def adapter(turn=0.0):
    made = nblora.DeltaLoRAAdapter(nblora.Dense(np.zeros((200, 300))), 4, seed=0)
    made.set_parameter("delta", np.full((200, 300), turn))
    made.set_parameter("velocity", np.full((200, 300), turn))
    return made

def save(turn):
    adapter(float(turn)).save(target)

def fit(turn):
    x = np.ones((32, 200))
    nblora.fit(adapter(), x, x[:, :1] * np.ones(300), loss="mse", optimizer="sgd", epochs=3, delta_lr=1e-3,
               batch_size=16, checkpoint=target, progress=False)

def run_merge(turn):
    merge(folder / "base", folder / "adapter", target, keep_original=True, force=True)

def prepare():
    os.mkdir(folder / "base")
    rows = np.random.default_rng(0).normal(size=(400, 300)).astype("float32")
    write_safetensors(folder / "base" / "model.safetensors", {"q.weight": rows})
    made = nblora.LoRAAdapter(nblora.Dense.random(300, 400, seed=0), 4, seed=1)
    made.set_parameter("lora_B", np.ones((4, 400)))
    save_peft({"q": made}, folder / "adapter")

def check():
    "What is in place is whole."
    if what == "save":
        loaded = nblora.load(target)
        assert np.unique([loaded.get_parameter("delta"), loaded.get_parameter("velocity")]).size == 1
    elif what == "fit":
        x = np.ones((32, 200))
        nblora.fit(adapter(), x, x[:, :1] * np.ones(300), loss="mse", optimizer="sgd", epochs=3, delta_lr=1e-3,
                   batch_size=16, resume=target, progress=False)
    else:
        assert {path.name for path in target.iterdir()} == whole
        nblora.weights.verify(target, folder / "adapter", base=folder / "base")

act = {"save": save, "fit": fit, "merge": run_merge}[what]

def child(work):
    "Run `work` in a child of this process, which has started no thread; return its number."
    number = os.fork()
    if number:
        return number
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def ended(number):
    return os.waitpid(number, 0)[1]

def for_ever():
    for turn in range(1, 100000):
        act(turn)

def whole_run():
    act(1)

assert ended(child(prepare)) == 0
started = time.perf_counter()
assert ended(child(whole_run)) == 0  # compiles, where need be
started = time.perf_counter()
assert ended(child(whole_run)) == 0
duration = time.perf_counter() - started
whole = {path.name for path in target.iterdir()} if target.is_dir() else None
expected = set(os.listdir(folder))
littered = 0
for trial in range(count):
    number = child(for_ever)
    time.sleep(rng.uniform(0.3, 3) * duration)
    os.kill(number, signal.SIGKILL)
    assert ended(number) == signal.SIGKILL
    littered += set(os.listdir(folder)) != expected
    if target.exists():
        assert ended(child(check)) == 0, trial
    assert ended(child(whole_run)) == 0, trial
    assert set(os.listdir(folder)) == expected, (trial, os.listdir(folder))
print(littered)
"""


@pytest.mark.parametrize("what", ["save", "fit", "merge"])
@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_what_a_killed_run_left_is_gone_after_the_next(what, count, tmp_path):
    littered = int(run(KILLS, what, count, 7, tmp_path, timeout=1500).stdout)
    assert littered <= count
    if count > 50:
        assert littered, "no kill came while something was written"
