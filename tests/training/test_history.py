"""What a run records, and what it shows."""

import csv
import sys

import numpy as np
import pytest

import nblora
from nblora.training import SGD, AdamW, EarlyStopping, History

from . import support

pytestmark = pytest.mark.small


def fit(model=None, **settings):
    x, y = support.data()
    defaults = {"loss": "cross_entropy", "epochs": 3, "batch_size": 8, "seed": 11}
    return nblora.fit(support.network() if model is None else model, x, y, **(defaults | settings))


def test_rows():
    history = fit(validation=support.data(seed=3), clip_norm=5.0, optimizer=AdamW(0.01))
    assert len(history) == 3
    assert history["epoch"] == [1, 2, 3]
    assert history["step"] == [5, 10, 15]
    assert history["lr"] == [0.01] * 3
    figures = ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert history.columns == ["epoch", "step", *figures, "lr", "grad_norm", "seconds", "samples_per_second"]
    assert [row["loss"] for row in history] == history["loss"] == history.to_dict()["loss"]
    assert history[-1]["samples_per_second"] == pytest.approx(37 / history[-1]["seconds"])
    assert "loss" in history
    assert "f1" not in history
    assert "epoch=3" in repr(history)
    with pytest.raises(KeyError, match="no column 'f1'; there are epoch"):
        history["f1"]


def test_loss_is_the_mean_over_samples():
    x, y = support.data()
    history = nblora.fit(
        support.network(), x, y, loss="cross_entropy", optimizer=SGD(0.0), epochs=1, batch_size=8, delta_lr=None
    )
    figures = nblora.training.evaluate(support.network(), x, y, loss="cross_entropy")
    assert history[0]["loss"] == pytest.approx(figures["loss"], rel=1e-12)
    assert history[0]["accuracy"] == pytest.approx(figures["accuracy"], rel=1e-12)


def test_csv_holds_every_digit(tmp_path):
    history = fit()
    path = tmp_path / "history.csv"
    path.write_text("old")
    history.to_csv(path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == history.rows
    assert path.read_text().startswith("epoch,step,loss,accuracy,lr,seconds,samples_per_second\n1,5,")


def test_an_empty_history(tmp_path):
    history = History()
    assert repr(history) == "History(no epochs)"
    assert history.to_dict() == {}
    with pytest.raises(KeyError, match="no epoch has ended"):
        history["loss"]


def test_rows_may_differ():
    history = History([{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "grad_norm": 3.0}])
    assert history["grad_norm"] == [None, 3.0]


def test_silent_where_nobody_looks(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fit()
    fit(progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("way", ["asked for", "terminal"])
def test_the_bar_shows_loss_and_rate(way, capsys, monkeypatch):
    if way == "terminal":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(progress=True if way == "asked for" else None)
    shown = capsys.readouterr().err
    assert "epoch 3/3" in shown
    assert "loss=" in shown
    assert "samples/s" in shown
    assert "111/111" in shown


def test_early_stopping_waits_and_restores():
    x, y = support.data()
    watch, stopping = support.Watch(), EarlyStopping(patience=3, restore_best=True)
    model = support.network()
    # The validation labels are wrong on purpose, so that the loss soon grows.
    history = fit(
        model, epochs=60, optimizer=SGD(0.5), validation=(x, (y + 1) % 3), callbacks=[watch, stopping], shuffle=False
    )
    best = int(np.argmin(history["val_loss"]))
    assert len(history) == best + 1 + 3 < 60
    assert (stopping.best_epoch, stopping.best) == (best + 1, history["val_loss"][best])
    for name, array in watch.states[best][0].items():
        np.testing.assert_array_equal(model.get_parameter(name), array)
    assert np.any(watch.states[-1][0]["head.weight"] != model.get_parameter("head.weight"))


@pytest.mark.parametrize(
    ("values", "settings", "stopped"),
    [
        ([3, 2, 1, 1, 1], {"patience": 2}, 5),
        ([3, 2, 2.5, 1, 2, 2], {"patience": 2}, 6),
        ([3, 2, 1.5, 1.45], {"patience": 2, "min_delta": 0.6}, 4),
        ([1, 2, 3, 3], {"patience": 1, "mode": "max"}, 4),
        ([1, 2, 1], {"patience": 1, "monitor": "val_accuracy"}, 3),
        ([1, 2], {"patience": 1, "monitor": "val_accuracy", "mode": "min"}, 2),
    ],
)
def test_when_early_stopping_stops(values, settings, stopped):
    callback = EarlyStopping(**settings)
    callback.on_train_begin()
    epochs = []
    for epoch, value in enumerate(values, 1):
        epochs.append(epoch)
        callback.on_epoch_end(epoch, {callback.monitor: float(value)})
        if callback.stop:
            break
    assert epochs[-1] == stopped
    assert callback.stop


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"patience": 0}, ValueError),
        ({"patience": 1.5}, TypeError),
        ({"monitor": 3}, TypeError),
        ({"min_delta": -1}, ValueError),
        ({"mode": "up"}, ValueError),
        ({"restore_best": 1}, TypeError),
    ],
)
def test_wrong_settings_of_early_stopping(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        EarlyStopping(**settings)
