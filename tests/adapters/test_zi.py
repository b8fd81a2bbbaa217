"""Zi et al.'s Delta-LoRA against a plain loop of their algorithm 1."""

import numpy as np
import pytest

import nblora
from nblora.adapters import ZiAdapter
from nblora.errors import NonFiniteError
from nblora.formats import load_peft
from nblora.training import SGD, AdamW, EarlyStopping
from tests.adapters.support import base_of, taught
from tests.helpers import assert_close, relative_error
from tests.processes import run

pytestmark = pytest.mark.small
SIZES, RANK, ALPHA, RATIO, RATE, STEPS = (7, 5), 2, 6.0, 0.8, 0.05, 50


def task(rng, steps=STEPS):
    return rng.normal(size=(steps, 9, SIZES[0])), rng.normal(size=(steps, 9, SIZES[1]))


def adapter_of(rng, start, activation="identity"):
    weight, bias = rng.normal(size=SIZES), rng.normal(size=SIZES[1])
    base = nblora.Dense(weight, bias, activation=activation)
    return ZiAdapter(base, RANK, ALPHA, update_ratio=RATIO, start_step=start, seed=3)


class PaperLoop:
    """Algorithm 1: W held and moved; AdamW or plain descent on A and B; the mean squared error of a tanh layer."""

    def __init__(self, adapter, start):
        names = ("base.weight", "base.bias", "lora_A", "lora_B")
        self.W, self.b, self.A, self.B = (adapter.get_parameter(name) for name in names)
        self.start, self.step = start, 0
        self.moments = [np.zeros_like(array) for array in (self.A, self.A, self.B, self.B)]

    def forward(self, x):
        return np.tanh(x @ self.W + self.b + ALPHA / RANK * (x @ self.A) @ self.B)

    def train(self, x, target, adamw):
        s, y = ALPHA / RANK, self.forward(x)
        gz = 2 * (y - target) / y.size * (1 - y**2)
        gradients = s * x.T @ (gz @ self.B.T), s * (x @ self.A).T @ gz
        gx = gz @ self.W.T + s * gz @ self.B.T @ self.A.T
        self.step += 1
        before, moved = self.A @ self.B, []
        for place, (factor, gradient) in enumerate(zip((self.A, self.B), gradients, strict=True)):
            if not adamw:
                moved.append(factor - RATE * gradient)
                continue
            first = self.moments[2 * place] = 0.9 * self.moments[2 * place] + 0.1 * gradient
            second = self.moments[2 * place + 1] = 0.999 * self.moments[2 * place + 1] + 0.001 * gradient**2
            hats = first / (1 - 0.9**self.step), second / (1 - 0.999**self.step)
            moved.append((1 - RATE * 0.01) * factor - RATE * hats[0] / (np.sqrt(hats[1]) + 1e-8))
        self.A, self.B = moved
        if self.step > self.start:
            self.W = self.W + RATIO * s * (self.A @ self.B - before)
        return gx


@pytest.mark.parametrize("start", [0, 1, 20])
@pytest.mark.parametrize("way", ["two_calls", "one_sweep"])
def test_fifty_steps_of_descent(start, way, rng):
    adapter = adapter_of(rng, start, "tanh")
    loop, (xs, ys) = PaperLoop(adapter, start), task(rng)
    for x, target in zip(xs, ys, strict=True):
        y = adapter(x)
        assert relative_error(y, loop.forward(x)) <= 1e-12
        gradient = 2 * (y - target) / y.size
        if way == "one_sweep":
            gx = adapter.backward_update(gradient, RATE)
        else:
            gx = adapter.backward(gradient)
            adapter.update_parameters(RATE)
        assert relative_error(gx, loop.train(x, target, False)) <= 1e-12
    for name, wanted in (("lora_A", loop.A), ("lora_B", loop.B)):
        assert relative_error(adapter.get_parameter(name), wanted) <= 1e-12
    merged = loop.W + ALPHA / RANK * loop.A @ loop.B
    assert relative_error(adapter.merge_to_original_layer().weight, merged) <= 1e-12


@pytest.mark.parametrize("start", [0, 20])
def test_fifty_steps_of_adamw_by_fit(start, rng):
    adapter = adapter_of(rng, start, "tanh")
    loop, (xs, ys) = PaperLoop(adapter, start), task(rng)
    for x, target in zip(xs, ys, strict=True):
        loop.train(x, target, True)
    x, y = xs.reshape(-1, SIZES[0]), ys.reshape(-1, SIZES[1])
    optimizer = AdamW(RATE, weight_decay=0.01)
    nblora.fit(adapter, x, y, loss="mse", optimizer=optimizer, batch_size=9, shuffle=False, epochs=1, progress=False)
    assert adapter.steps == start
    merged = loop.W + ALPHA / RANK * loop.A @ loop.B
    assert relative_error(adapter.merge_to_original_layer().weight, merged) <= 1e-12


def test_no_dense_state(rng):
    adapter = adapter_of(rng, 5)
    assert set(adapter.parameter_names()) == {
        "base.weight", "base.bias", "lora_A", "lora_B", "steps", "start_A", "start_B",
    }  # fmt: skip
    assert adapter.parameter_count == RANK * sum(SIZES)
    assert "start_A" not in adapter_of(rng, 0).parameter_names()
    before = adapter.base_layer.weight.copy()
    taught(adapter, rng.normal(size=(4, 7)), rng, 9)
    np.testing.assert_array_equal(adapter.base_layer.weight, before)


@pytest.mark.parametrize(("start", "rank"), [(0, RANK), (2, 2 * RANK), (90, RANK)])
@pytest.mark.parametrize("kind", ["fully_connected", "conv2d", "embedding"])
def test_a_file_of_pefts_holds_all_of_it(start, rank, kind, tmp_path, rng):
    base, x = base_of(kind)
    adapter = taught(ZiAdapter(base, RANK, ALPHA, start_step=start, use_rslora=True, seed=1), x, rng, 6)
    (report,) = nblora.save_peft({"layer": adapter}, tmp_path / "a", dtype="float64")
    assert (report.rank, report.delta_error) == (rank, 0.0)
    model = nblora.Sequential({"layer": base_of(kind)[0]})
    assert_close(load_peft(tmp_path / "a", model)(x), adapter(x))


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, rng):
    x, y = rng.normal(size=(40, 7)), rng.normal(size=(40, 5))
    options = {"loss": "mse", "optimizer": AdamW(0.02), "batch_size": 8, "seed": 1, "progress": False}
    whole, half = (adapter_of(np.random.default_rng(2), 7) for _ in range(2))
    nblora.fit(whole, x, y, epochs=4, **options)
    nblora.fit(half, x, y, epochs=1, checkpoint=tmp_path / "run.safetensors", **options)
    assert half.steps == 5
    again = adapter_of(np.random.default_rng(2), 7)
    nblora.fit(again, x, y, epochs=4, resume=tmp_path / "run.safetensors", **options)
    for name in whole.parameter_names():
        np.testing.assert_array_equal(again.get_parameter(name), whole.get_parameter(name))


def test_a_run_that_fails_leaves_the_steps_as_they_were(rng):
    adapter = adapter_of(rng, 3)
    x, y = rng.normal(size=(40, 7)), rng.normal(size=(40, 5))
    before = adapter.get_parameters()
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError):
        nblora.fit(adapter, x, 1e150 * y, loss="mse", optimizer=SGD(1e160), epochs=3, batch_size=8, progress=False)
    assert adapter.steps == 0
    np.testing.assert_array_equal(adapter.get_parameters(), before)


def test_the_best_epoch_brings_its_own_start_back(rng):
    """What early stopping restores includes A_K, B_K and the count."""
    adapter = adapter_of(rng, 2)
    x, y = rng.normal(size=(24, 7)), rng.normal(size=(24, 5))
    stop = EarlyStopping(patience=1, restore_best=True)
    history = nblora.fit(
        adapter, x, y, loss="mse", validation=(x[:8], -y[:8]), optimizer=SGD(0.1), epochs=20, batch_size=8,
        callbacks=[stop], progress=False,
    )  # fmt: skip
    best = min(history["val_loss"])
    assert nblora.training.evaluate(adapter, x[:8], -y[:8], loss="mse")["loss"] == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"update_ratio": 0.0}, "update_ratio"),
        ({"update_ratio": np.inf}, "update_ratio"),
        ({"start_step": -1}, "start"),
    ],
)
def test_ranges(settings, match):
    with pytest.raises(ValueError, match=match):
        ZiAdapter(nblora.Dense.random(4, 4, seed=1), 2, **settings)
    with pytest.raises(TypeError, match="lora_dropout"):
        ZiAdapter(nblora.Dense.random(4, 4, seed=1), 2, lora_dropout=0.1)


ON_A_GPU = """
import numpy as np, nblora
from nblora.adapters import ZiAdapter

rng = np.random.default_rng(0)
for start in (0, 2):
    base = nblora.FullyConnected.random(7, 5, activation="tanh", dtype="float64", seed=1)
    host = ZiAdapter(base, 2, 6.0, start_step=start, seed=2)
    there = host.clone().to("cuda")
    for step in range(4):
        x, g = rng.normal(size=(9, 7)), rng.normal(size=(9, 5))
        assert np.abs(host(x) - there(x)).max() < 1e-12
        assert np.abs(host.backward_update(g, 0.05) - there.backward_update(g, 0.05)).max() < 1e-12
    assert host.steps == there.steps == start
    print(np.abs(host.get_parameters() - there.get_parameters()).max() < 1e-12)
"""


def test_on_the_simulated_gpu():
    assert run(ON_A_GPU, NUMBA_ENABLE_CUDASIM="1").stdout == "True\nTrue\n"
