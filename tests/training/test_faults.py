"""Training that goes wrong names layer and step, and leaves the model at its last whole epoch."""

import numpy as np
import pytest

import nblora
from nblora.errors import NonFiniteError
from nblora.training import SGD, AdamW, Callback, CrossEntropy, Schedule

from . import support

pytestmark = pytest.mark.small


def fit(model, **settings):
    x, y = support.data(dtype="float32")
    defaults = {"loss": "cross_entropy", "epochs": 4, "batch_size": 8, "seed": 11, "delta_lr": None}
    return nblora.fit(model, x, y, **(defaults | settings))


class Explosive(Schedule):
    """Harmless for ten steps, two epochs, then enormous."""

    def factor(self, step, total_steps):
        return 1.0 if step < 11 else 1e37


def stopped(model, error=NonFiniteError, **settings):
    """Fit until `error`; return its message, once the model is known to be at the end of its last whole epoch."""
    start, watch = support.state(model), support.Watch()
    callbacks = [watch, *settings.pop("callbacks", [])]
    with pytest.raises(error) as caught:
        fit(model, callbacks=callbacks, **settings)
    support.assert_same_state(support.state(model), watch.states[-1] if watch.states else start)
    assert model.training
    return str(caught.value)


@pytest.mark.parametrize("clip", [None, 1e30])
@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, 0.9), AdamW(0.01)], ids=repr)
def test_divergence(optimizer, clip):
    model = support.network("float32", dropout=0.2)
    message = stopped(model, optimizer=optimizer, clip_norm=clip, schedule=Explosive())
    assert "step 1" in message
    assert "(epoch 3)" in message
    assert "back at the end of epoch 2" in message
    assert "layer 'head' (Dense)" in message or "layer 'middle' (DeltaLoRAAdapter)" in message
    assert "learning rate" in message
    fit(model, optimizer=optimizer)  # and it trains on


def test_a_checkpoint_keeps_the_last_good_epoch(tmp_path):
    model = support.network("float32")
    stopped(model, optimizer=SGD(0.1), schedule=Explosive(), checkpoint=tmp_path / "run")
    support.assert_same_state(support.state(nblora.load(tmp_path / "run", base=model)), support.state(model))


def test_a_model_that_begins_broken():
    model = support.network("float32")
    model["first"].weight[2, 3] = np.nan
    message = stopped(model)
    assert "loss is nan at step 1, first from layer 'first' (Dense), whose parameters are not finite" in message
    assert "where it was before training" in message


def test_an_output_that_overflows():
    model = nblora.Dense(np.full((7, 3), 3e38, "float32"))
    message = stopped(model)
    assert "the Dense, whose output is not finite" in message


class Faulty(CrossEntropy):
    """Spoils value or gradient from its n-th training call on."""

    def __init__(self, what, call):
        self.what, self.call, self.count = what, call, 0

    def value_and_gradient(self, output, target, backend=None):
        value, gradient = super().value_and_gradient(output, target, backend)
        self.count += 1
        if self.count >= self.call:
            if self.what == "gradient":
                gradient[0, 0] = np.inf
            else:
                value = np.inf
        return value, gradient


def test_a_loss_of_its_own_fault():
    message = stopped(support.network("float32"), loss=Faulty("value", 7))
    assert "loss is inf at step 7, first from the loss itself" in message


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("optimizer", [SGD(0.1), AdamW(0.01)], ids=repr)
def test_a_gradient_that_is_not_finite(optimizer, clip):
    message = stopped(support.network("float32"), loss=Faulty("gradient", 7), optimizer=optimizer, clip_norm=clip)
    assert "the gradient of" in message
    assert "layer 'head' (Dense) is not finite at step 7 (epoch 2)" in message


@pytest.mark.parametrize("where", ["all", "second"])
def test_a_validation_loss_that_is_not_finite(where):
    x, y = support.data(samples=300, dtype="float32")
    x *= 1e3
    model = nblora.Sequential(nblora.Dense(np.full((7, 3), 0.5, "float32")))
    if where == "all":
        message = stopped(model, loss=Faulty("value", 6), validation=(x, y))
        assert "validation loss is inf after step 5, first from the loss itself" in message
    else:
        x[270] = 3e38
        message = stopped(model, validation=(x, y))
        assert "validation loss is nan after step 5, first from layer '0' (Dense), whose output" in message


class Poison(SGD):
    """Leaves a NaN in the head at the last step of the second epoch."""

    def update(self, backend, parameter, gradient, slots, lr, step):
        super().update(backend, parameter, gradient, slots, lr, step)
        if step == 10 and parameter.shape == (3,):
            parameter[0] = np.nan


def test_parameters_are_looked_at_after_every_epoch():
    message = stopped(support.network("float32"), optimizer=Poison(0.1))
    assert "bias of layer 'head' (Dense) is not finite after step 10 (epoch 2)" in message


def test_large_values_are_not_infinite():
    model = nblora.Dense(np.full((7, 3), 1e200))
    x, y = support.data()
    nblora.fit(model, 1e-200 * x, y, loss="cross_entropy", epochs=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", [3, 13])
def test_an_interrupt_leaves_a_whole_model(step, error):
    model = support.network("float32", dropout=0.2)
    stopped(model, error, callbacks=[support.Interrupt(step, error)])
    assert np.isfinite(fit(model)[-1]["loss"])


def test_a_failing_callback_loses_no_epoch():
    class Failing(Callback):
        def on_epoch_end(self, epoch, logs):
            if epoch == 2:
                raise ZeroDivisionError

    stopped(support.network("float32"), ZeroDivisionError, callbacks=[Failing()])


def test_an_interrupted_evaluation_mode_comes_back():
    model = support.network("float32").eval()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[support.Interrupt(2)])
    assert not model.training
