"""`fit`: what it computes, which path each layer takes, modes, data of every kind."""

import numpy as np
import pytest

import nblora
from nblora.backends import resolve
from nblora.layers import tree
from nblora.layers.sinks import descend
from nblora.training import SGD, AdamW, Callback, CrossEntropy, Schedule, evaluate

from . import support

pytestmark = pytest.mark.small

# Fused and unfused sums run in another order; a few dozen steps let rounding grow.
RUN_TOLERANCE = 1e-9


def assert_close_state(computed, reference):
    for name, array in reference[0].items():
        assert support.relative_error(computed[0][name], array) < RUN_TOLERANCE, name


def fit(model, **settings):
    x, y = support.data()
    defaults = {"loss": "cross_entropy", "epochs": 3, "batch_size": 8, "seed": 11}
    return nblora.fit(model, x, y, **(defaults | settings))


def by_hand(model, x, y, epochs, batch_size, lr):
    """The same training by the public calls, unfused, in order."""
    loss = CrossEntropy()
    for _ in range(epochs):
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            _, gradient = loss.value_and_gradient(model(x[part]), y[part])
            model.backward(gradient)
            model.update_parameters(lr)


@pytest.mark.parametrize("adapter", ["lora", "delta"])
def test_plain_descent_equals_the_public_calls(adapter):
    x, y = support.data()
    model, twin = support.network(adapter=adapter), support.network(adapter=adapter)
    fit(model, optimizer=SGD(0.3), delta_lr=None, shuffle=False)
    by_hand(twin, x, y, 3, 8, 0.3)
    assert_close_state(support.state(model), support.state(twin))


def test_a_learning_rate_beside_a_name():
    model, twin = support.network(), support.network()
    fit(model, optimizer="sgd", lr=0.3)
    fit(twin, optimizer=SGD(0.3))
    assert_close_state(support.state(model), support.state(twin))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("optimizer", [SGD(0.2), SGD(0.2, 0.8), AdamW(0.01)], ids=repr)
def test_fused_equals_unfused(optimizer, frozen):
    results = []
    for clip in (None, 1e30):
        base = nblora.FullyConnected.random(7, 3, activation="tanh", dtype="float64", seed=0)
        model = support.randomise(nblora.DeltaLoRAAdapter(base, 2, freeze_base_layer=frozen, seed=0))
        fit(model, optimizer=optimizer, clip_norm=clip)
        results.append(support.state(model))
    assert_close_state(*results)


def test_each_layer_takes_the_cheapest_path(monkeypatch):
    """The sweep where the optimiser allows it; and of the first trained layer's input no gradient is computed."""
    taken = []
    for way in ("backward_update", "backward"):
        original = getattr(type(resolve("cpu")), way)

        def spy(self, grad, saved, operands, *rates, input_gradient, _original=original, _way=way):
            kind = "Dense" if operands.delta is None else "DeltaLoRAAdapter"
            found = _original(self, grad, saved, operands, *rates, input_gradient=input_gradient)
            assert (found.x is not None) == input_gradient == (kind == "Dense")
            taken.append((kind, _way))
            return found

        monkeypatch.setattr(type(resolve("cpu")), way, spy)

    def paths(**settings):
        taken.clear()
        fit(support.network(), epochs=1, batch_size=64, delta_lr=0.1, **settings)
        return taken.copy()

    # The frozen first layer never appears.
    assert paths(optimizer=SGD(0.1)) == [("Dense", "backward_update"), ("DeltaLoRAAdapter", "backward_update")]
    assert paths(optimizer=AdamW()) == [("Dense", "backward"), ("DeltaLoRAAdapter", "backward_update")]
    assert paths(optimizer=SGD(0.1, 0.9)) == [("Dense", "backward"), ("DeltaLoRAAdapter", "backward_update")]
    assert paths(clip_norm=1.0) == [("Dense", "backward"), ("DeltaLoRAAdapter", "backward")]


def test_delta_has_its_own_rate_and_rule():
    x, y = support.data(samples=5)
    model = nblora.DeltaLoRAAdapter(nblora.Dense.random(7, 3, dtype="float64", seed=0), 2, momentum_factor=0.6, seed=0)
    twin = model.clone()
    nblora.fit(model, x, y, loss="cross_entropy", optimizer=AdamW(0.01), delta_lr=3.0, epochs=1, shuffle=False)
    _, gradient = CrossEntropy().value_and_gradient(twin(x), y)
    twin.backward(gradient)
    dD = twin.get_parameter_gradients()[-21:].reshape(7, 3)
    dA = twin.get_parameter_gradients()[:14].reshape(7, 2)
    np.testing.assert_allclose(model.velocity, 0.4 * dD, rtol=1e-12)
    np.testing.assert_allclose(model.delta, -3.0 * 0.4 * dD, rtol=1e-12)
    reference = support.adamw(twin.get_parameter("lora_A"), [dA], 0.01)
    np.testing.assert_allclose(model.get_parameter("lora_A"), reference, rtol=1e-12)


def test_without_a_rate_the_delta_takes_the_optimizers():
    results = []
    for delta_lr in (None, 0.25):
        model = support.network()
        fit(model, optimizer=SGD(0.25), delta_lr=delta_lr)
        results.append(support.state(model))
    support.assert_same_state(*results)


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_lora_plus_multiplies_the_rate_of_B(optimizer):
    before = support.network()
    changes = []
    for ratio in (None, 16.0):
        model = before.clone()
        x, y = support.data(samples=4)
        settings = {"weight_decay": 0.0} if optimizer is AdamW else {}
        rates = optimizer(0.001, lora_plus_ratio=ratio, **settings)
        nblora.fit(model, x, y, loss="cross_entropy", optimizer=rates, epochs=1, shuffle=False)
        changes.append({n: model.get_parameter(n) - before.get_parameter(n) for n in model.parameter_names()})
    plain, plus = changes
    np.testing.assert_allclose(plus["middle.lora_B"], 16 * plain["middle.lora_B"], rtol=1e-9)
    for name in ("middle.lora_A", "middle.delta", "head.weight", "head.bias"):
        assert np.any(plain[name])
        np.testing.assert_array_equal(plus[name], plain[name])


def test_clipping_scales_every_gradient():
    x, y = support.data(samples=6)
    model = support.network()
    before = model.clone()
    twin = model.clone()
    _, gradient = CrossEntropy().value_and_gradient(twin(x), y)
    twin.backward(gradient)
    norm = np.linalg.norm(twin.get_parameter_gradients())
    settings = {"loss": "cross_entropy", "optimizer": SGD(0.5), "delta_lr": None, "epochs": 1, "shuffle": False}
    history = nblora.fit(model, x, y, clip_norm=norm / 4, **settings)
    assert history["grad_norm"] == [pytest.approx(norm, rel=1e-12)]
    for _, parameter, _ in tree.trainable(twin):
        parameter.gradient *= (norm / 4) / (norm + 1e-6)
    twin.update_parameters(0.5)
    assert_close_state(support.state(model), support.state(twin))
    loose = before.clone()
    history = nblora.fit(loose, x, y, clip_norm=2 * norm, **settings)
    assert history["grad_norm"] == [pytest.approx(norm, rel=1e-12)]
    assert np.any(loose.get_parameter("middle.delta") != model.get_parameter("middle.delta"))


def test_clipping_leaves_out_what_is_not_trained():
    x, y = support.data(samples=6)
    model = nblora.DeltaLoRAAdapter(nblora.Dense.random(7, 3, dtype="float64", seed=0), 2, seed=0)
    support.randomise(model).lora_layer.trainable = False
    before, twin = support.state(model)[0], model.clone()
    twin.lora_layer.trainable = False
    twin.backward(CrossEntropy().value_and_gradient(twin(x), y)[1])
    norm = np.linalg.norm(twin._delta.gradient)
    history = nblora.fit(model, x, y, loss="cross_entropy", clip_norm=1.0, epochs=1)
    assert history["grad_norm"] == [pytest.approx(norm, rel=1e-12)]
    np.testing.assert_array_equal(model.get_parameter("lora_B"), before["lora_B"])
    assert np.any(model.delta != before["delta"])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_adapter_around_a_model(frozen, clip):
    x, y = support.data()
    model = support.randomise(
        nblora.DeltaLoRAAdapter(support.network(dropout=0.2), 2, freeze_base_layer=frozen, seed=3)
    )
    before = support.state(model)[0]
    history = nblora.fit(model, x, y, loss="cross_entropy", optimizer=SGD(0.3), epochs=8, seed=0, clip_norm=clip)
    assert history["loss"][-1] < history["loss"][0]
    changed = {name for name, array in support.state(model)[0].items() if np.any(array != before[name])}
    own = {"lora_A", "lora_B", "delta", "velocity"}
    of_base = {f"base.middle.{n}" for n in own} | {"base.head.weight", "base.head.bias"}
    assert changed == (own if frozen else own | of_base)
    if not frozen and clip is None:
        twin = support.randomise(
            nblora.DeltaLoRAAdapter(support.network(dropout=0.2), 2, freeze_base_layer=False, seed=3)
        )
        nblora.fit(twin, x, y, loss="cross_entropy", optimizer=SGD(0.3), epochs=8, seed=0, clip_norm=1e30)
        assert_close_state(support.state(model), support.state(twin))


def test_frozen_parameters_stay():
    model = support.network()
    before = support.state(model)[0]
    fit(model)
    after = support.state(model)[0]
    for name in ("first.weight", "first.bias", "middle.base.weight", "middle.base.bias"):
        np.testing.assert_array_equal(after[name], before[name])


def test_modes_come_back_and_dropout_rests_in_evaluation():
    x, y = support.data()
    model = support.network(dropout=0.5).eval()
    model["middle"].train()
    first = evaluate(model, x, y, loss="cross_entropy", batch_size=5)
    assert first == pytest.approx(evaluate(model, x, y, loss="cross_entropy"), rel=1e-12)
    assert set(first) == {"loss", "accuracy"}
    assert [layer.training for layer in model] == [False, True, False]
    generators = support.state(model)[1]
    evaluate(model, x, y, loss="cross_entropy")
    assert support.state(model)[1] == generators
    fit(model, validation=(x, y))
    assert support.state(model)[1] != generators
    assert not model.training
    assert [layer.training for layer in model] == [False, True, False]
    with pytest.raises(RuntimeError):
        model.backward(np.zeros((37, 3)))


def test_validation_figures_are_those_of_evaluate():
    model, (x, y) = support.network(dropout=0.3), support.data(seed=9)
    history = fit(model, validation=(x, y))
    figures = evaluate(model, x, y, loss="cross_entropy")
    assert history[-1]["val_loss"] == figures["loss"]
    assert history[-1]["val_accuracy"] == figures["accuracy"]


def test_same_seed_same_run_and_the_seed_orders_the_batches():
    states = []
    for seed in (1, 1, 2, np.random.default_rng(5), np.random.default_rng(5)):
        model = support.network(dropout=0.2)
        fit(model, seed=seed)
        states.append(support.state(model))
    support.assert_same_state(states[0], states[1])
    support.assert_same_state(states[3], states[4])
    assert np.any(states[0][0]["head.weight"] != states[2][0]["head.weight"])


def test_without_shuffling_the_seed_does_nothing():
    states = []
    for seed in (1, 2):
        model = support.network()
        fit(model, seed=seed, shuffle=False)
        states.append(support.state(model))
    support.assert_same_state(*states)


@pytest.mark.parametrize("kind", ["float16", "int8", "bool", "list", "strided"])
def test_inputs_of_every_real_kind(kind):
    x, y = support.data(dtype="float32")
    x = np.round(x * 2)
    given = {
        "list": x.tolist(),
        "strided": np.repeat(x, 2, axis=0)[::2],
        "bool": x > 0,
    }.get(kind)
    given = x.astype(kind) if given is None else given
    exact = np.asarray(given, np.float32)
    models = support.network("float32"), support.network("float32")
    for model, inputs in zip(models, (given, exact), strict=True):
        nblora.fit(model, inputs, y.tolist(), loss="cross_entropy", epochs=2, batch_size=10, seed=0)
    support.assert_same_state(*map(support.state, models))


def test_more_axes_train_like_more_samples():
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(6, 4, 7)), rng.normal(size=(6, 4, 3))
    models = support.network(), support.network()
    nblora.fit(models[0], x, target, loss="mse", batch_size=2, epochs=2, shuffle=False)
    nblora.fit(models[1], x.reshape(24, 7), target.reshape(24, 3), loss="mse", batch_size=8, epochs=2, shuffle=False)
    support.assert_same_state(*map(support.state, models))


def test_inputs_are_not_written_to():
    x, y = support.data()
    x.flags.writeable = y.flags.writeable = False
    nblora.fit(support.network(), x, y, loss="cross_entropy", epochs=1)


def test_one_output():
    x, y = support.data()
    model = nblora.LoRAAdapter(nblora.Dense.random(7, 1, dtype="float64", seed=0), 1, seed=0)
    history = nblora.fit(
        model, x, y == 0, loss="binary_cross_entropy", optimizer=AdamW(0.1), epochs=20, batch_size=1, seed=0
    )
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    history = nblora.fit(model, x, y.astype(float), loss="mse", epochs=1)
    assert "accuracy" not in history


class Halving(Schedule):
    def factor(self, step, total_steps):
        assert total_steps == 15
        return 0.5**step


def test_schedules_scale_every_rate():
    model, twin = support.network(), support.network()
    x, y = support.data()
    history = fit(model, optimizer=SGD(0.4), delta_lr=0.8, schedule=Halving(), shuffle=False)
    assert history["lr"] == [0.4 * 0.5**4, 0.4 * 0.5**9, 0.4 * 0.5**14]
    for step in range(15):
        part = slice(step % 5 * 8, step % 5 * 8 + 8)
        _, gradient = CrossEntropy().value_and_gradient(twin(x[part]), y[part])
        twin.backward(gradient)
        for _, parameter, _ in tree.trainable(twin):
            rates = 0.4 * 0.5**step, 0.8 * 0.5**step
            descend(twin._backend, parameter, parameter.gradient, *rates)
    assert_close_state(support.state(model), support.state(twin))


def test_a_schedule_must_give_rates():
    class Wrong(Schedule):
        def factor(self, step, total_steps):
            return float("nan")

    with pytest.raises(ValueError, match="schedule's factor"):
        fit(support.network(), schedule=Wrong())


class Steps(Callback):
    def __init__(self):
        self.seen, self.ended = [], 0

    def on_step_end(self, step, logs):
        self.seen.append(step)
        assert set(logs) == {"loss", "accuracy"}

    def on_epoch_end(self, epoch, logs):
        self.stop = epoch == 2

    def on_train_end(self):
        self.ended += 1


def test_callbacks_look_on_and_may_stop():
    callback = Steps()
    for _ in range(2):
        callback.seen.clear()
        history = fit(support.network(), epochs=5, callbacks=callback)
        assert callback.seen == list(range(1, 11))
        assert len(history) == 2
    assert callback.ended == 2
    assert Callback().state_dict() == {}
    assert Callback().monitored() == ()


def test_nothing_is_left_behind():
    model = support.network()
    fit(model)
    with pytest.raises(RuntimeError, match="no gradients"):
        model.get_parameter_gradients()
    with pytest.raises(RuntimeError, match="forward"):
        model.backward(np.zeros((1, 3)))


X, Y = support.data(samples=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, TypeError, "model must be a layer.*got None"),
        ({"model": len}, TypeError, "builtin_function"),
        ({"x": X[:, :5]}, ValueError, r"\(\.\.\., 7\), got \(4, 5\)"),
        ({"x": X[0]}, ValueError, "x must have shape"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "at least one sample"),
        ({"x": None}, TypeError, "x must be an array"),
        ({"x": X * 1j}, TypeError, "complex"),
        ({"y": Y[:2]}, ValueError, "y must have one entry for each of the 4"),
        ({"x": np.where(np.arange(4)[:, None] == 2, np.nan, X)}, ValueError, "x must be finite.*nan at sample 2"),
        ({"x": np.full_like(X, 1e300)}, ValueError, r"finite in float32, got 1e\+300 at sample 0"),
        ({"y": np.full((4, 3), np.inf), "loss": "mse"}, ValueError, "y must be finite"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"epochs": 2.0}, TypeError, "epochs must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"validation": X}, TypeError, "validation must be a pair"),
        ({"validation": (X, Y[:3])}, ValueError, "validation y must have one entry"),
        ({"validation": (X[:, :2], Y)}, ValueError, "validation x must have shape"),
        ({"callbacks": 3}, TypeError, "list of Callback"),
        ({"callbacks": [print]}, TypeError, "Callback objects"),
        ({"callbacks": [nblora.training.EarlyStopping()]}, ValueError, "monitors 'val_loss'.*validation"),
        ({"callbacks": [nblora.training.EarlyStopping("f1")]}, ValueError, "monitors 'f1', but this run records"),
        ({"clip_norm": 0}, ValueError, "clip_norm must be positive"),
        ({"delta_lr": -1.0}, ValueError, "delta_lr"),
        ({"shuffle": 1}, TypeError, "shuffle must be True or False"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"progress": "yes"}, TypeError, "progress"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path"),
        ({"checkpoint": "no/such/folder/run"}, FileNotFoundError, "does not exist"),
        ({"resume": 3}, TypeError, "resume must be a path"),
        ({"resume": "no-such-file"}, FileNotFoundError, "no-such-file"),
        ({"loss": "l1"}, ValueError, "loss must be one of"),
        ({"optimizer": 1e-3}, TypeError, "optimizer must be a name"),
    ],
)
def test_wrong_arguments_change_nothing(change, error, message):
    model = support.network("float32")
    before = support.state(model)
    settings = {"model": model, "x": X, "y": Y, "loss": "cross_entropy"} | change
    with pytest.raises(error, match=message):
        nblora.fit(settings.pop("model"), settings.pop("x"), settings.pop("y"), **settings)
    support.assert_same_state(support.state(model), before)


def test_models_that_cannot_train():
    frozen = nblora.Dense(np.ones((7, 3)))
    frozen.trainable = False
    with pytest.raises(ValueError, match="no trainable parameters"):
        fit(frozen)
    weight = np.ones((7, 3))
    weight.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        fit(nblora.Dense(weight))
    closed = support.network()
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        fit(closed)
