"""`delta_lr="auto"`: how far the first steps move a layer's output, how rates fall, that finding them changes nothing,
and what a fault does."""

import math
import warnings

import numpy as np
import pytest

import nblora
from nblora.errors import NonFiniteError
from nblora.storage.checkpoint import read_checkpoint, write_checkpoint
from nblora.training import SGD, AdamW, Callback, CrossEntropy, EarlyStopping, MeanSquaredError, Schedule, calibration
from nblora.training.step import Step
from tests.models.test_tree import Twice

from . import support

pytestmark = pytest.mark.small


def fit(model, **settings):
    x, y = support.data()
    defaults = {"loss": "cross_entropy", "batch_size": 8, "seed": 11}
    return nblora.fit(model, x, y, **(defaults | settings))


def share(delta, model, weight, x=None):
    """By what part of its own norm a change of the delta has moved x W; without x the weight."""
    moved, own = (part if x is None else x @ part for part in (delta, weight))
    return model.delta_scaling * np.linalg.norm(moved) / np.linalg.norm(own)


def at_rest(model):
    """The model with velocities of zero: those that were never trained."""
    for name in model.parameter_names():
        if name.endswith("velocity"):
            model.set_parameter(name, np.zeros(model.parameter_shape(name)))
    return model


class Times(MeanSquaredError):
    def __init__(self, scale):
        self.scale = scale

    def value_and_gradient(self, output, target, backend=None):
        value, gradient = super().value_and_gradient(output, target, backend)
        return value * self.scale, gradient * self.scale


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("kind", [nblora.Dense, nblora.FullyConnected])
@pytest.mark.parametrize(("m", "c", "scale", "width"), [(0.0, 0.1, 1.0, 5), (0.95, 0.01, 1e6, 32), (0.5, 0.5, 1e-3, 9)])
def test_the_first_step_is_a_fixed_share(m, c, scale, width, kind, clip):
    """Of the output, once the velocity has grown; its first step is 1 - m of that."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 7)), rng.normal(size=(6, width))
    base = kind.random(7, width, dtype="float64", seed=1)
    model = nblora.DeltaLoRAAdapter(base, 2, delta_scaling=c, momentum_factor=m, seed=0)
    weight = model.get_parameter("base.weight")
    nblora.fit(model, x, y, loss=Times(scale), optimizer=SGD(0.0), epochs=1, clip_norm=clip)
    assert share(model.get_current_delta(), model, weight, x) == pytest.approx((1 - m) * calibration.SHARE, rel=1e-6)


def test_the_root_mean_square_of_the_first_batches_decides():
    x, y = support.data()
    model = nblora.DeltaLoRAAdapter(nblora.Dense.random(7, 3, dtype="float64", seed=0), 2, seed=0)
    moved, own = [], []
    twin = model.clone()
    for start in range(0, 24, 3):  # eight batches
        batch = x[start : start + 3]
        twin.backward(CrossEntropy().value_and_gradient(twin(batch), y[start : start + 3])[1])
        moved.append(np.sum((0.1 * batch @ twin.get_parameter_gradients()[-21:].reshape(7, 3)) ** 2))
        own.append(np.sum((batch @ twin.base_layer.weight) ** 2))
    expected = calibration.SHARE * math.sqrt(np.sum(own) / np.sum(moved))
    history = fit(model, epochs=1, batch_size=3, shuffle=False)
    assert history.delta_lr == {"delta": pytest.approx(expected, rel=1e-9)}


def test_deltas_that_move_together_share_the_change():
    """Two deltas move their layers' outputs by half as much each as one alone."""
    alone, together = at_rest(support.network()), at_rest(support.network(head=False))
    for name in ("middle.delta", "head.delta"):
        together.set_parameter(name, np.zeros(together.parameter_shape(name)))
    alone.set_parameter("middle.delta", np.zeros(alone.parameter_shape("middle.delta")))
    together.set_parameter("head.lora_B", np.zeros(together.parameter_shape("head.lora_B")))
    rates = [fit(model, epochs=1, batch_size=64).delta_lr["middle.delta"] for model in (alone, together)]
    assert rates[0] == pytest.approx(2 * rates[1], rel=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_finding_a_rate_changes_nothing(clip):
    """A run with the number that was found is the same bit for bit: order and dropout masks too."""
    found, given = (at_rest(support.network(dropout=0.4)) for _ in range(2))
    history = fit(found, epochs=3, optimizer=AdamW(0.01), clip_norm=clip, delta_lr="auto")
    (rate,) = history.delta_lr.values()
    again = fit(given, epochs=3, optimizer=AdamW(0.01), clip_norm=clip, delta_lr=rate)
    support.assert_same_state(support.state(given), support.state(found))
    assert support.without_times(again) == support.without_times(history)
    assert again.delta_lr == history.delta_lr == {"middle.delta": rate}


def test_every_layer_has_its_own_rate():
    model = support.network(head=False)
    model["head"].base_layer.weight[...] *= 1e3
    rates = fit(model, epochs=1).delta_lr
    assert set(rates) == {"middle.delta", "head.delta"}
    assert rates["head.delta"] > 1e3 * rates["middle.delta"]


def test_a_schedule_scales_the_rates_found():
    class Fifth(Schedule):
        def factor(self, step, total_steps):
            return 0.2

    models = at_rest(support.network()), at_rest(support.network())
    rates = [
        fit(m, epochs=1, batch_size=64, optimizer=SGD(0.0), schedule=s).delta_lr
        for m, s in zip(models, (None, Fifth()), strict=True)
    ]
    assert rates[0] == rates[1]
    before = support.network().get_parameter("middle.delta")
    moves = [np.linalg.norm(m.get_parameter("middle.delta") - before) for m in models]
    assert moves[1] == pytest.approx(0.2 * moves[0])


@pytest.mark.parametrize("around", ["zero weight", "model"])
def test_what_has_no_weight_takes_that_of_a_new_layer(around):
    x, y = support.data()
    base = nblora.Dense(np.zeros((7, 3)))
    if around == "model":
        base = nblora.Sequential(
            nblora.Dense.random(7, 5, dtype="float64", seed=0), nblora.Dense.random(5, 3, dtype="float64", seed=1)
        )
    model = nblora.DeltaLoRAAdapter(base, 2, momentum_factor=0.0, seed=0)
    nblora.fit(model, x, y, loss="cross_entropy", optimizer=SGD(0.0), epochs=1, batch_size=64)
    usual = np.full((7, 3), 1 / math.sqrt(3 * 7))  # the root mean square of what is uniform in ±1/√7
    assert share(model.get_current_delta(), model, usual) == pytest.approx(calibration.SHARE)


def test_a_layer_that_runs_twice_counts_the_sum_of_its_gradients():
    x, _ = support.data(samples=8, features=3)
    shared = nblora.DeltaLoRAAdapter(nblora.Dense.random(3, 3, dtype="float64", seed=0), 2, momentum_factor=0.0, seed=0)
    twice = Twice(shared)
    weight = shared.base_layer.weight.copy()
    nblora.fit(twice, x, x, loss="mse", optimizer=SGD(0.0), epochs=1)
    hidden = np.concatenate([x, x @ weight + shared.base_layer.bias])
    assert share(shared.get_current_delta(), shared, weight, hidden) == pytest.approx(calibration.SHARE)


def test_convolutions_and_embeddings_have_rates_too():
    rng = np.random.default_rng(0)
    images, table = (
        nblora.Conv2d.random(2, 3, 2, bias=False, dtype="float64", seed=0),
        nblora.Embedding.random(9, 4, dtype="float64", seed=0),
    )
    inputs = rng.normal(size=(6, 2, 5, 5)), rng.integers(9, size=(6, 5))
    for base, x in zip((images, table), inputs, strict=True):
        model = nblora.DeltaLoRAAdapter(base, 2, momentum_factor=0.0, seed=0)
        before = model(x)
        nblora.fit(model, x, rng.normal(size=before.shape), loss="mse", optimizer=SGD(0.0), epochs=1)
        assert np.linalg.norm(model(x) - before) / np.linalg.norm(before) == pytest.approx(calibration.SHARE)


def test_a_delta_without_gradients_rests_until_it_has_some():
    """Behind a head of zeros nothing has a gradient until the head has moved."""
    model = support.network()
    model["head"].weight[...] = 0
    before = model.get_parameter("middle.delta"), model.get_parameter("middle.velocity")
    watch = support.Watch()
    history = fit(model, epochs=2, batch_size=64, callbacks=[watch])
    np.testing.assert_array_equal(watch.states[0][0]["middle.delta"], before[0])
    assert np.any(watch.states[1][0]["middle.delta"] != before[0])
    assert 0 < history.delta_lr["middle.delta"] < math.inf


# --- a pretrained network behind a new head --------------------------------------------------------------------------


def pretrained(depth=16, head=0.003, width=96):
    """Layers of usual size with adapters, a new head of small weights, and classes that inputs tell apart.

    Gradients are small until the head has grown, and then many times as large; a batch's have few directions.
    """
    rng = np.random.default_rng(0)

    def layer(outputs, size, activation):
        return nblora.Dense((size * rng.normal(size=(width, outputs))).astype(np.float32), activation=activation)

    layers = {f"layer{place}": layer(width, math.sqrt(2 / width), "relu") for place in range(depth)}
    model = nblora.Sequential({**layers, "head": layer(2, head, "identity")})
    y = rng.integers(2, size=256)
    x = (0.25 * rng.normal(size=(2, width))[y] + rng.normal(size=(256, width))).astype(np.float32)
    model.adapt([*layers], "delta", rank=4, modules_to_save="head", seed=0)
    return model, x, y


@pytest.mark.parametrize(("depth", "head"), [(16, 0.003), (12, 0.01)])
def test_the_default_learns_behind_a_new_head(depth, head):
    """More than LoRA alone, which the model is at a rate of zero; steps of 1 % of the weights' norm learn less."""
    left = []
    for rate in (0.0, "auto"):
        model, x, y = pretrained(depth, head)
        settings = {"loss": "cross_entropy", "optimizer": AdamW(1e-3), "epochs": 4, "batch_size": 16, "seed": 0}
        left.append(nblora.fit(model, x, y, delta_lr=rate, **settings)["loss"][-1])
    assert left[1] < 0.7 * left[0]


def test_no_step_promises_more_of_the_loss_than_the_first_or_a_tenth():
    """To first order Σ lr·|V|² is how far a step lowers the loss; rates that fell stay, and a step halves at most."""
    model, x, y = pretrained()
    batches = [(x[start : start + 16], y[start : start + 16]) for start in range(0, 256, 16)]
    step = Step(model, CrossEntropy(), AdamW(1e-3), "auto", None)
    step.calibrate(batches[:8])
    first, lowest = step.delta_rates, step.delta_rates
    most = max(0.1, step.delta_bound.share)
    mean = step.delta_bound.loss
    velocities = {name: name.replace("delta", "velocity") for name in first}
    for batch in 3 * batches:
        mean = 0.9 * mean + 0.1 * step([batch], 1.0).figures["loss"]
        rates = step.delta_rates
        promised = sum(rates[name] * np.sum(model.get_parameter(v) ** 2.0) for name, v in velocities.items())
        halved = all(rates[name] == lowest[name] / 2 for name in first)
        assert halved or promised <= most * mean * (1 + 1e-5)
        assert all(rates[name] <= lowest[name] for name in first)
        lowest = rates
    assert all(lowest[name] < 0.2 * first[name] for name in first)


def test_a_loss_that_is_not_positive_bounds_nothing():
    assert calibration.Bound(-1.0, 0.0).factor(5.0) == 1.0
    assert calibration.Bound(0.0, 0.0).factor(5.0) == 1.0
    assert calibration.Bound(1.0, 0.0).factor(0.16) == pytest.approx(0.625)
    assert calibration.Bound(1.0, 0.5).factor(0.8) == pytest.approx(0.625)
    assert calibration.Bound(1.0, 0.5).factor(50.0) == 0.5
    assert calibration.Bound(1.0, 0.5).factor(0.4) == 1.0
    assert calibration.Bound(1.0, 0.5).factor(math.inf) == 1.0


def test_no_first_step_promises_more_than_the_whole_loss():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 64))
    base = nblora.Dense.random(64, 64, dtype="float64", seed=0)
    y = 0.999 * base(x)  # a small change is enough
    model = nblora.DeltaLoRAAdapter(base, 2, seed=0)
    step = Step(model, MeanSquaredError(), SGD(0.0), "auto", None)
    step.calibrate([(x, y)])
    assert step.delta_bound.share == pytest.approx(1.0)
    gradient = MeanSquaredError().value_and_gradient(model(x), y)[1]
    model.backward(gradient)
    dD = model.get_parameter_gradients()[-64 * 64 :]
    assert step.delta_rates["delta"] * np.sum(dD**2) == pytest.approx(step.delta_bound.loss)


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_resumed_run_keeps_the_rates(clip, tmp_path):
    whole, half, rest = (support.network(dropout=0.3, head=False) for _ in range(3))
    reference = fit(whole, epochs=4, clip_norm=clip)
    fit(half, epochs=2, clip_norm=clip, checkpoint=tmp_path / "run")
    history = fit(rest, epochs=4, clip_norm=clip, resume=tmp_path / "run")
    support.assert_same_state(support.state(rest), support.state(whole))
    assert history.delta_lr == reference.delta_lr
    assert fit(rest, epochs=1, resume=tmp_path / "run").delta_lr == reference.delta_lr  # nothing left to train


def test_a_number_given_at_resuming_is_taken(tmp_path):
    fit(support.network(), epochs=1, checkpoint=tmp_path / "run")
    history = fit(support.network(), epochs=2, delta_lr=0.5, resume=tmp_path / "run")
    assert history.delta_lr == {"middle.delta": 0.5}


def test_a_file_of_before_has_no_rates(tmp_path):
    whole, rest = support.network(), support.network()
    fit(whole, epochs=3, delta_lr=0.7)
    fit(support.network(), epochs=2, delta_lr=0.7, checkpoint=tmp_path / "run")

    def older(kind, config, tensors):
        del config["fit"]["delta_lr"]
        return kind, config, dict(tensors)

    write_checkpoint(tmp_path / "run", *read_checkpoint(tmp_path / "run", older))
    fit(rest, epochs=3, delta_lr=0.7, resume=tmp_path / "run")
    support.assert_same_state(support.state(rest), support.state(whole))
    assert fit(support.network(), epochs=3, resume=tmp_path / "run").delta_lr["middle.delta"] > 0


# --- faults ----------------------------------------------------------------------------------------------------------


class Fragile(CrossEntropy):
    """Infinite where an output is large."""

    def value_and_gradient(self, output, target, backend=None):
        value, gradient = super().value_and_gradient(output, target, backend)
        return (value if np.abs(output).max() < 30 else math.inf), gradient


def fragile(monkeypatch, model, **settings):
    """A run whose rates are at first far too large: its history, its warnings, and by what the rates were divided."""
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "PROMISES", (math.inf, math.inf))  # what holds rates would heal it first
        first = 1024 * fit(model.clone(), epochs=1).delta_lr["middle.delta"]  # a power of two: halves exactly
        patch.setattr(calibration, "SHARE", 1024 * calibration.SHARE)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            history = fit(model, **({"loss": Fragile(), "epochs": 4} | settings))
    return history, told, first / history.delta_lr["middle.delta"]


@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, 0.9), AdamW(0.01)], ids=repr)
def test_rates_that_are_too_large_are_halved_and_the_epoch_starts_again(optimizer, monkeypatch):
    """As if the smaller rate had been given: parameters, optimiser, dropout, order and history."""
    model, twin, watch = support.network(dropout=0.2), support.network(dropout=0.2), support.Watch()
    history, told, divided = fragile(monkeypatch, model, optimizer=optimizer, callbacks=[watch], epochs=1)
    assert divided >= 2
    assert math.log2(divided).is_integer()
    (warning,) = told
    assert "the loss " in str(warning.message)
    assert f"divided by {divided:.0f}, to middle.delta" in str(warning.message)
    assert warning.category is RuntimeWarning
    reference = fit(twin, loss=Fragile(), epochs=1, optimizer=optimizer, delta_lr=history.delta_lr["middle.delta"])
    support.assert_same_state(support.state(model), support.state(twin))
    assert support.without_times(history) == support.without_times(reference)
    assert len(watch.states) == 1


def test_a_halved_run_goes_on(monkeypatch, tmp_path):
    whole, half, rest = (support.network(dropout=0.2) for _ in range(3))
    reference, told, _ = fragile(monkeypatch, whole)
    assert len(told) == 1  # however often it happened
    fragile(monkeypatch, half, epochs=1, checkpoint=tmp_path / "run")
    history, _, _ = fragile(monkeypatch, rest, resume=tmp_path / "run")
    support.assert_same_state(support.state(rest), support.state(whole))
    assert history.delta_lr == reference.delta_lr


def test_a_halved_run_that_is_evaluated_within_epochs_goes_on(monkeypatch, tmp_path):
    """The rows of an epoch that starts again are forgotten; files are those of whole epochs."""
    whole, broken, rest = (support.network(dropout=0.2) for _ in range(3))
    settings = {"steps": 13, "eval_every": 2, "save_every": 3}

    def watch(*more):
        return [EarlyStopping("loss", patience=None, restore_best=True), *more]

    reference, told, _ = fragile(monkeypatch, whole, callbacks=watch(), **settings)
    assert len(told) == 1
    assert [row["step"] for row in reference] == [2, 4, 6, 8, 10, 12, 13]
    with pytest.raises(KeyboardInterrupt):
        fragile(monkeypatch, broken, checkpoint=tmp_path / "run", callbacks=watch(support.Interrupt(9)), **settings)
    history, _, _ = fragile(monkeypatch, rest, resume=tmp_path / "run", callbacks=watch(), **settings)
    assert history.delta_lr == reference.delta_lr
    support.assert_same_state(support.state(rest), support.state(whole))
    assert support.without_times(history) == support.without_times(reference)


def test_a_validation_loss_starts_the_epoch_again_too(monkeypatch):
    x, y = support.data(seed=8)

    model = support.network(dropout=0.2)
    _, told, divided = fragile(monkeypatch, model, loss=Fragile(), validation=(10 * x, y))
    assert divided >= 2
    assert len(told) == 1
    assert all(layer.training for _, layer in model.named_layers())


class Counting(Callback):
    def on_train_begin(self):
        self.steps = 0

    def on_step_end(self, step, logs):
        self.steps += 1


def test_a_fault_before_the_first_update_is_raised_at_once():
    model, counting = support.network(), Counting()
    model["head"].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="step 1"):
        fit(model, epochs=2, callbacks=[counting])
    assert counting.steps == 0


def test_a_fault_that_halving_does_not_heal_is_raised():
    class Explosive(Schedule):
        def factor(self, step, total_steps):
            return 1.0 if step < 7 else 1e300

    model, watch = support.network(dropout=0.2), support.Watch()
    with pytest.raises(NonFiniteError, match="back at the end of epoch 1"):
        fit(model, epochs=3, schedule=Explosive(), callbacks=[watch])
    support.assert_same_state(support.state(model), watch.states[-1])


def test_a_given_rate_is_never_halved():
    model, counting = support.network("float32"), Counting()
    x, y = support.data(dtype="float32")
    with pytest.raises(NonFiniteError):
        nblora.fit(model, x, y, loss=Fragile(), delta_lr=1e5, batch_size=8, epochs=2, callbacks=[counting])
    assert counting.steps < 6


@pytest.mark.parametrize("value", ["atuo", "", "0.1"])
def test_another_word_is_refused(value):
    with pytest.raises(ValueError, match="delta_lr must be 'auto', a number, or None"):
        fit(support.network(), epochs=1, delta_lr=value)
