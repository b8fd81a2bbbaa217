"""A resumed run equals the uninterrupted one bit for bit; a checkpoint that does not fit changes nothing."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

import nblora
from nblora.errors import FormatError
from nblora.storage.checkpoint import read_checkpoint, write_checkpoint
from nblora.training import SGD, AdamW, EarlyStopping, WarmupCosine

from . import support

pytestmark = pytest.mark.small

OPTIMIZERS = (SGD(0.2), SGD(0.1, 0.9), AdamW(0.02, lora_plus_ratio=4.0))


def fit(model, **settings):
    x, y = support.data()
    defaults = {"loss": "cross_entropy", "batch_size": 8, "seed": 11}
    return nblora.fit(model, x, y, **(defaults | settings))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_resumed_equals_uninterrupted(optimizer, clip, dropout, tmp_path):
    path = tmp_path / "run"
    settings = {
        "optimizer": optimizer,
        "clip_norm": clip,
        "delta_lr": 0.7,
        "schedule": WarmupCosine(warmup=3, total_steps=20),
        "validation": support.data(seed=8),
    }
    whole, half = support.network(dropout=dropout), support.network(dropout=dropout)
    reference = fit(whole, epochs=4, **settings)
    fit(half, epochs=2, checkpoint=path, **settings)
    other = support.network(dropout=dropout)  # a new process starts from the same base with other random states
    other["middle"]._rng.random(5)
    history = fit(other, epochs=4, resume=path, **(settings | {"seed": 99}))
    support.assert_same_state(support.state(other), support.state(whole))
    assert support.without_times(history) == support.without_times(reference)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_an_interrupted_run_goes_on(optimizer, tmp_path):
    path = tmp_path / "run"
    settings = {"optimizer": optimizer, "schedule": "cosine", "epochs": 4}
    whole, broken = support.network(dropout=0.3), support.network(dropout=0.3)
    fit(whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, checkpoint=path, callbacks=[support.Interrupt(13)], **settings)
    support.assert_same_state(support.state(broken), support.state(nblora.load(path, base=whole)))
    for model in (broken, support.network(dropout=0.3)):
        fit(model, resume=path, **settings)
        support.assert_same_state(support.state(model), support.state(whole))


@pytest.mark.parametrize("restore_best", [True, False])
@pytest.mark.parametrize("cut", [1, 3, 5, 7])
def test_early_stopping_goes_on(cut, restore_best, tmp_path):
    path = tmp_path / "run"
    x, y = support.data()

    def settings():
        stopping = EarlyStopping(patience=3, restore_best=restore_best)
        # Wrong labels, so that the loss soon grows.
        return {"optimizer": SGD(0.4), "validation": (x, (y + 1) % 3), "callbacks": [support.Watch(), stopping]}

    whole, half, rest = support.network(), support.network(), support.network()
    reference, first, second = settings(), settings(), settings()
    rows = fit(whole, epochs=30, **reference)
    assert 3 < len(rows) < 30
    fit(half, epochs=cut, checkpoint=path, **first)
    resumed = fit(rest, epochs=30, resume=path, **second)
    support.assert_same_state(support.state(rest), support.state(whole))
    assert support.without_times(resumed) == support.without_times(rows)
    for name in ("best", "best_epoch", "waited", "stop"):
        assert getattr(second["callbacks"][1], name) == getattr(reference["callbacks"][1], name)


@pytest.mark.parametrize("rate", ["auto", 0.7])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("killed", [1, 2, 3, 5, 6, 7, 10, 11])
def test_a_run_goes_on_within_an_epoch(killed, accumulate, rate, tmp_path):
    """Saved every two updates, evaluated every three, of epochs of five (three): rows span epochs and files."""
    path = tmp_path / "run"

    def settings(*more):
        best = EarlyStopping("val_loss", patience=None, restore_best=True)
        return {
            "optimizer": AdamW(0.05), "delta_lr": rate, "validation": support.data(seed=8), "schedule": "cosine",
            "steps": 11, "accumulate": accumulate, "eval_every": 3, "save_every": 2, "callbacks": [best, *more],
        }  # fmt: skip

    whole, broken = support.network(dropout=0.3), support.network(dropout=0.3)
    reference = fit(whole, **settings())
    assert [row["step"] for row in reference] == [3, 6, 9, 11]
    with pytest.raises(KeyboardInterrupt):
        fit(broken, checkpoint=path, **settings(support.Interrupt(killed)))
    assert path.exists() == (killed > (2 if rate != "auto" else 5 if accumulate == 1 else 3))
    rest = support.network(dropout=0.3)
    resumed = fit(rest, resume=path if path.exists() else None, checkpoint=path, **settings())
    support.assert_same_state(support.state(rest), support.state(whole))
    assert support.without_times(resumed) == support.without_times(reference)
    assert resumed.columns == reference.columns
    assert reference.delta_lr == resumed.delta_lr


def test_a_run_does_not_go_on_within_an_epoch_of_other_data(tmp_path):
    fit(support.network(), steps=9, save_every=4, checkpoint=tmp_path / "run")
    with pytest.raises(FormatError, match="4 updates of an epoch, and here it has 2"):
        fit(support.network(), steps=20, batch_size=20, resume=tmp_path / "run")


def test_without_shuffling(tmp_path):
    whole, half = support.network(), support.network()
    fit(whole, epochs=3, shuffle=False)
    fit(half, epochs=1, shuffle=False, checkpoint=tmp_path / "run")
    fit(half, epochs=3, shuffle=False, resume=tmp_path / "run")
    support.assert_same_state(support.state(half), support.state(whole))
    fit(half, epochs=4, shuffle=True, resume=tmp_path / "run")


def test_a_finished_run_trains_nothing_more(tmp_path):
    model, late = support.network(), support.network()
    fit(model, epochs=3, checkpoint=tmp_path / "run")
    history = fit(late, epochs=2, resume=tmp_path / "run")
    assert len(history) == 3
    support.assert_same_state(support.state(late), support.state(model))


@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_around_a_model(frozen, tmp_path):
    def model():
        return support.randomise(
            nblora.DeltaLoRAAdapter(support.network(dropout=0.3), 2, freeze_base_layer=frozen, lora_dropout=0.2, seed=3)
        )

    whole, half, rest = model(), model(), model()
    fit(whole, epochs=3)
    fit(half, epochs=1, checkpoint=tmp_path / "run")
    fit(rest, epochs=3, resume=tmp_path / "run")
    support.assert_same_state(support.state(rest), support.state(whole))


def test_load_takes_the_frozen_base_from_a_model_or_a_file(tmp_path):
    """That was trained, or that it was made from; the file holds what was trained alone."""
    plain = support.network()
    plain = nblora.Sequential({name: getattr(layer, "base_layer", layer) for name, layer in plain.named_layers()})
    plain.save(tmp_path / "plain")
    model = support.network(dropout=0.2)
    fit(model, epochs=1, checkpoint=tmp_path / "run")
    expected = support.state(model)
    for base in (model, plain, tmp_path / "plain"):
        loaded = nblora.load(tmp_path / "run", base=base)
        support.assert_same_state(support.state(loaded), expected)
        assert not np.shares_memory(loaded["first"].weight, model["first"].weight)
    support.assert_same_state(support.state(nblora.Sequential.load(tmp_path / "run", base=plain)), expected)
    with safe_open(tmp_path / "run", framework="numpy") as file:
        names = {name for name in file.keys() if not name.startswith("fit.")}  # noqa: SIM118 - not a mapping
    changed = {"middle.lora_A", "middle.lora_B", "middle.delta", "middle.velocity", "head.weight", "head.bias"}
    assert names == changed


def test_load_without_the_base_or_with_another(tmp_path):
    model = support.network()
    fit(model, epochs=1, checkpoint=tmp_path / "run")
    with pytest.raises(FormatError, match=r"frozen base .* nblora.load\(file, base=...\)"):
        nblora.load(tmp_path / "run")
    other = model.clone()
    other.set_parameter("first.bias", other.get_parameter("first.bias") + 1)
    with pytest.raises(FormatError, match=r"'first.bias' has other values than the base's"):
        nblora.load(tmp_path / "run", base=other)
    with pytest.raises(FormatError, match=r"base lacks the frozen parameter 'first.bias'"):
        nblora.load(tmp_path / "run", base=nblora.Dense.random(3, 3))
    with pytest.raises(FormatError, match=r"frozen parameter 'first.bias' has other values than the model's"):
        fit(other, epochs=2, resume=tmp_path / "run")


SCRIPT = """
import sys, nblora
from tests.training import support
x, y = support.data()
class Pause(nblora.training.Callback):
    def on_epoch_end(self, epoch, logs):
        print(epoch, flush=True)
nblora.fit(support.network(dropout=0.3), x, y, loss="cross_entropy", batch_size=8, seed=11, epochs=100000,
           checkpoint=sys.argv[1], callbacks=[Pause()])
"""


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "run"
    root = pathlib.Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, path], stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": paths}
    )
    for _ in range(3):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed, whole = support.network(dropout=0.3), support.network(dropout=0.3)
    epochs = len(fit(resumed, epochs=1, resume=path)) + 1
    fit(resumed, epochs=epochs, resume=path)
    fit(whole, epochs=epochs)
    support.assert_same_state(support.state(resumed), support.state(whole))


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    fit(support.network(dropout=0.2), epochs=2, checkpoint=tmp_path / "run")
    return tmp_path / "run"


def refused(path, message, model=None, **settings):
    model = support.network(dropout=0.2) if model is None else model
    before = support.state(model)
    with pytest.raises(FormatError, match=message):
        fit(model, resume=path, epochs=4, **settings)
    support.assert_same_state(support.state(model), before)


def test_another_model(run):
    refused(run, r"layers\[0\].name was 'first' and is '0'", nblora.Sequential(*support.network(dropout=0.2)))
    refused(run, "lora_dropout was 0.2 and is 0.0", support.network())
    refused(run, "kind was 'DeltaLoRAAdapter' and is 'LoRAAdapter'", support.network(adapter="lora", dropout=0.2))
    refused(run, "trained a Sequential, not a DeltaLoRAAdapter", nblora.DeltaLoRAAdapter(nblora.Dense.random(7, 3), 2))
    changed = support.network(dropout=0.2)
    changed["first"].weight[0, 0] += 1
    refused(run, "frozen parameter 'first.weight'", changed)


def test_another_optimizer(run):
    refused(run, "made with the optimizer AdamW, not SGD", optimizer=SGD(0.1))


def test_a_model_without_a_run(tmp_path):
    support.network(dropout=0.2).save(tmp_path / "model")
    refused(tmp_path / "model", "no state of a run")


def test_a_truncated_file(run):
    run.write_bytes(run.read_bytes()[:-10])
    refused(run, "run: ")


def rewritten(path, change):
    """Write the checkpoint again after `change(run, tensors)`."""
    kind, config, tensors = read_checkpoint(path, lambda *parts: parts)
    change(config["fit"], tensors)
    write_checkpoint(path, kind, json.loads(json.dumps(config)), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, tensors: run.pop("epoch"), "'epoch' is missing"),
        (lambda run, tensors: run.update(epoch=-1), "epoch must be at least 0"),
        (lambda run, tensors: run.update(step="x"), "step must be an integer"),
        (lambda run, tensors: run.update(rows=[{"loss": "low"}]), "loss must be a real number"),
        (lambda run, tensors: run.update(rows=3), "iterable"),
        (lambda run, tensors: run.update(rows=[3]), "items"),
        (lambda run, tensors: run.update(shuffle={"bit_generator": "MT19937"}), "PCG64"),
        (lambda run, tensors: run.update(random_states={}), "'middle' is missing"),
        (lambda run, tensors: run.update(callbacks=[{}]), "'kind' is missing"),
        (lambda run, tensors: tensors.pop("fit.:slot.first.head.weight"), "fit.:slot.first.head.weight"),
        (lambda run, tensors: tensors.pop("middle.velocity"), "middle.velocity"),
        (lambda run, tensors: tensors.update({"head.bias": np.zeros(4)}), r"head.bias.*\(3,\)"),
        (lambda run, tensors: tensors.update({"head.bias": np.zeros(3, "f")}), "float64"),
    ],
)
def test_a_spoiled_file(run, change, message):
    rewritten(run, change)
    refused(run, message, callbacks=[EarlyStopping("loss")])


@pytest.mark.parametrize(
    "change",
    [
        lambda held, tensors: held.pop("waited"),
        lambda held, tensors: held.update(waited=-1),
        lambda held, tensors: held.update(best="x"),
        lambda held, tensors: held.update(best=10**400),
        lambda held, tensors: tensors.pop("fit.:callback.0.best.head.bias"),
        lambda held, tensors: tensors.update({"fit.:callback.0.best.head.bias": np.zeros(7)}),
    ],
)
def test_a_spoiled_early_stopping(tmp_path, change):
    path = tmp_path / "run"
    settings = {"callbacks": [EarlyStopping("loss", restore_best=True)]}
    fit(support.network(dropout=0.2), epochs=2, checkpoint=path, **settings)
    rewritten(path, lambda run, tensors: change(run["callbacks"][0]["state"], tensors))
    refused(path, "run: ", **settings)


def test_callbacks_find_their_own_state(tmp_path):
    path = tmp_path / "run"
    first = EarlyStopping("loss", patience=9), support.Watch(), EarlyStopping("accuracy", patience=9)
    fit(support.network(), epochs=2, checkpoint=path, callbacks=first)
    again = EarlyStopping("loss", patience=9), EarlyStopping("accuracy", patience=9), EarlyStopping("loss", patience=9)
    fit(support.network(), epochs=2, resume=path, callbacks=again)
    assert [callback.best for callback in again] == [first[0].best, first[2].best, None]
