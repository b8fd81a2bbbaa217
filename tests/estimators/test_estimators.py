"""The estimators inside scikit-learn's tools, and what they promise beyond its checks."""

import importlib
import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, make_regression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import nblora
from nblora.estimators import LoRAClassifier, LoRARegressor

FEATURES, CLASSES = 6, 3


@pytest.fixture
def blobs(rng):
    centres = 4 * rng.normal(size=(CLASSES, FEATURES))
    y = rng.integers(CLASSES, size=120)
    return (centres[y] + rng.normal(size=(120, FEATURES))).astype(np.float32), y


@pytest.fixture
def base(rng):
    layers = {
        "hidden": nblora.FullyConnected.random(FEATURES, 8, activation="tanh", seed=1),
        "head": nblora.Dense.random(8, CLASSES, seed=2),
    }
    return nblora.Sequential(layers)


def parameters(model):
    return {name: model.get_parameter(name) for name in model.parameter_names()}


def assert_same_parameters(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_grid_search_over_rank_and_delta_scaling_in_a_pipeline():
    X, y = load_digits(return_X_y=True)
    X, y = X[:500], y[:500]
    pipeline = Pipeline([("scale", StandardScaler()), ("adapt", LoRAClassifier(max_iter=15, random_state=0))])
    search = GridSearchCV(pipeline, {"adapt__rank": [2, 8], "adapt__delta_scaling": [0.1, 0.5]}, cv=3)
    search.fit(X, y)
    assert search.best_score_ > 0.85
    assert set(search.best_params_) == {"adapt__rank", "adapt__delta_scaling"}
    assert len(set(search.cv_results_["mean_test_score"])) > 1  # the settings do something


def test_cross_validation_and_calibration(blobs):
    X, y = blobs
    classifier = make_pipeline(StandardScaler(), LoRAClassifier(max_iter=20, random_state=0))
    assert cross_val_score(classifier, X, y, cv=3).mean() > 0.9
    probabilities = CalibratedClassifierCV(classifier, cv=3).fit(X, y).predict_proba(X)
    assert probabilities.shape == (len(X), CLASSES)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


@pytest.mark.parametrize("labels", [["b", "a", "c"], [7, -1, 3], [2.0, 0.0, 5.0]])
def test_labels_of_any_type(blobs, labels):
    X, numbers = blobs
    y = np.array(labels, dtype=object if isinstance(labels[0], str) else None)[numbers]
    classifier = LoRAClassifier(max_iter=30, random_state=0).fit(X, y)
    assert list(classifier.classes_) == sorted(labels)
    assert classifier.score(X, y) > 0.9
    assert classifier.predict(X).dtype == y.dtype


def test_base_is_copied_and_frozen(blobs, base):
    X, y = blobs
    before = parameters(base)
    classifier = LoRAClassifier(base, method="delta", rank=2, max_iter=5, random_state=0).fit(X, y)
    assert_same_parameters(parameters(base), before)
    np.testing.assert_array_equal(classifier.model_.get_parameter("hidden.base.weight"), before["hidden.weight"])
    assert np.any(classifier.model_.get_parameter("hidden.delta"))
    merged = classifier.model_.merge().forward(X)
    np.testing.assert_allclose(merged, classifier.model_.forward(X), rtol=0, atol=1e-4)


def test_base_from_a_file_equals_the_object(tmp_path, blobs, base):
    X, y = blobs
    path = tmp_path / "base.safetensors"
    base.save(path)
    settings = {"method": "lora", "max_iter": 3, "random_state": 0}
    first, second = (LoRAClassifier(given, **settings).fit(X, y) for given in (base, str(path)))
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))


def test_adapters_of_the_base_are_merged(blobs, base):
    X, y = blobs
    base.adapt("hidden", "lora", rank=2, seed=3)
    base["hidden"].set_parameter("lora_B", np.random.default_rng(0).normal(size=(2, 8)))
    expected = base.merge().get_parameter("hidden.weight")
    classifier = LoRAClassifier(base, max_iter=1, random_state=0).fit(X, y)
    np.testing.assert_array_equal(classifier.model_.get_parameter("hidden.base.weight"), expected)


def test_head_is_replaced_where_the_classes_differ(blobs, base):
    X, y = blobs
    classifier = LoRAClassifier(base, max_iter=30, random_state=0).fit(X, y % 2)
    assert classifier.model_.out_features == 2
    assert type(classifier.model_["head"]) is nblora.Dense
    assert classifier.score(X, y % 2) > 0.85
    with pytest.raises(ValueError, match="3 outputs, but y needs 2"):
        LoRAClassifier(base, head="keep").fit(X, y % 2)
    kept = LoRAClassifier(base, max_iter=1).fit(X, y).model_
    assert type(kept["head"]) is nblora.LoRAAdapter
    new = LoRAClassifier(base, head="new", max_iter=1).fit(X, y).model_
    assert type(new["head"]) is nblora.Dense


def test_bad_bases(blobs, base):
    X, y = blobs
    with pytest.raises(ValueError, match="base takes 6 features"):
        LoRAClassifier(base).fit(X[:, :4], y)
    with pytest.raises(TypeError, match="model must be a layer"):
        LoRAClassifier(3).fit(X, y)


def test_clone_and_pickle_keep_everything(blobs, base):
    X, y = blobs
    classifier = LoRAClassifier(base, lora_dropout=0.2, random_state=0)
    twin = clone(classifier)
    assert twin.base is not base
    classifier.partial_fit(X, y, classes=[0, 1, 2])
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))
    for estimator in (classifier, again):  # shuffling, dropout and the optimiser's moments go on alike
        estimator.partial_fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))
    assert_same_parameters(parameters(again.model_), parameters(classifier.model_))


def test_same_seed_same_model(blobs):
    X, y = blobs
    first, second, other = (LoRAClassifier(max_iter=3, random_state=seed).fit(X, y) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    assert np.any(first.predict_proba(X) != other.predict_proba(X))


def test_partial_fit_keeps_the_optimizer_going(blobs):
    """Without shuffling to tell them apart (one batch), n passes equal one fit of n epochs, bit for bit."""
    X, y = blobs
    settings = {"batch_size": len(X), "random_state": 0, "n_iter_no_change": 100}
    whole = LoRAClassifier(max_iter=6, **settings).fit(X[:1].repeat(40, 0), np.r_[0, 1, y[:38]])
    parts = LoRAClassifier(**settings)
    for _ in range(6):
        parts.partial_fit(X[:1].repeat(40, 0), np.r_[0, 1, y[:38]], classes=np.unique(np.r_[0, 1, y[:38]]))
    assert parts.t_ == whole.t_ == 6
    np.testing.assert_allclose(parts.predict_proba(X), whole.predict_proba(X), rtol=1e-4)


def test_partial_fit_goes_on_with_the_deltas_rates(blobs):
    """Found on the first samples, and kept: later ones, a hundred times smaller, find none. Larger ones lower them."""
    X, y = blobs
    classifier = LoRAClassifier(method="delta", random_state=0).partial_fit(X[:60], y[:60], classes=[0, 1, 2])
    found = dict(classifier._delta_rates)
    assert set(found) == {"hidden1.delta", "head.delta"}
    classifier.partial_fit(X[60:] / 100, y[60:])
    assert classifier._delta_rates == found
    classifier.partial_fit(100 * X[60:], y[60:])
    assert all(classifier._delta_rates[name] < rate for name, rate in found.items())


@pytest.mark.parametrize("scale", [1e-3, 2e5])
def test_a_regressor_with_a_delta_takes_targets_of_any_scale(scale):
    X, y = make_regression(200, 6, random_state=0)
    y = (scale * y / y.std()).astype("float32")
    losses = [
        LoRARegressor(method=method, max_iter=5, random_state=0).fit(X.astype("float32"), y).loss_curve_[-1]
        for method in ("lora", "delta")
    ]
    assert losses[1] <= losses[0]


def test_partial_fit_asks_for_the_same_classes(blobs):
    X, y = blobs
    classifier = LoRAClassifier().partial_fit(X[:10], y[:10], classes=[0, 1, 2])
    with pytest.raises(ValueError, match="classes must be those of the first call"):
        classifier.partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="labels among classes_"):
        classifier.partial_fit(X, y + 1)


def test_failing_pass_leaves_the_model_as_it_was(blobs):
    X, y = blobs
    classifier = LoRAClassifier(random_state=0).partial_fit(X, y, classes=[0, 1, 2])
    before = parameters(classifier.model_)
    classifier.set_params(learning_rate=1e30)
    with pytest.raises(nblora.errors.NonFiniteError):
        classifier.partial_fit(X, y)
    assert_same_parameters(parameters(classifier.model_), before)


def test_warm_start_goes_on(blobs):
    X, y = blobs
    classifier = LoRAClassifier(max_iter=3, warm_start=True, random_state=0).fit(X, y)
    model, loss = classifier.model_, classifier.loss_curve_[-1]
    classifier.fit(X, y)
    assert classifier.model_ is model
    assert classifier.loss_curve_[0] < loss
    with pytest.raises(ValueError, match="labels among classes_"):
        classifier.fit(X, y + 1)
    classifier.set_params(warm_start=False).fit(X, y + 1)
    assert list(classifier.classes_) == [1, 2, 3]


def test_stopping(blobs):
    X, y = blobs
    classifier = LoRAClassifier(max_iter=500, n_iter_no_change=2, tol=0.01, random_state=0).fit(X, y)
    assert classifier.n_iter_ == len(classifier.loss_curve_) < 500
    assert classifier.validation_loss_curve_ is None
    held_out = clone(classifier).set_params(early_stopping=True).fit(X, y)
    assert len(held_out.validation_loss_curve_) == held_out.n_iter_ < 500


def test_sample_weights_pull(blobs):
    X, y = blobs
    wrong = np.where(np.arange(len(y)) % 2, y, (y + 1) % CLASSES)
    weights = np.where(np.arange(len(y)) % 2, 1.0, 1e-3)
    classifier = LoRAClassifier(max_iter=40, random_state=0).fit(X, wrong, weights)
    assert classifier.score(X, y) > 0.9
    assert LoRAClassifier(max_iter=40, random_state=0).fit(X, wrong).score(X, y) < 0.85
    scaled = LoRAClassifier(max_iter=40, random_state=0).fit(X, wrong, 4 * weights)
    np.testing.assert_allclose(scaled.predict_proba(X), classifier.predict_proba(X), rtol=1e-3, atol=1e-6)


def test_regressor_with_several_outputs(rng):
    X, y = make_regression(200, 5, n_targets=2, random_state=0)
    y /= y.std(0)
    regressor = LoRARegressor(max_iter=60, early_stopping=True, random_state=0).fit(X, y)
    assert regressor.score(X, y) > 0.9
    assert regressor.predict(X).shape == y.shape
    flat = LoRARegressor(method="lora", optimizer="sgd", max_iter=60, random_state=0)
    assert flat.fit(X, y[:, 0], rng.uniform(0.5, 2, len(y))).predict(X).shape == (len(X),)
    with pytest.raises(ValueError, match="1 columns"):
        flat.partial_fit(X, y)


def test_feature_names(blobs):
    pandas = pytest.importorskip("pandas")
    X, y = blobs
    frame = pandas.DataFrame(X, columns=[f"pixel {place}" for place in range(FEATURES)])
    classifier = LoRAClassifier(max_iter=2, random_state=0).fit(frame, y)
    assert list(classifier.feature_names_in_) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(frame.iloc[:, ::-1])


def test_partial_fit_over_dask_blocks_equals_passes_over_their_rows(blobs):
    array = pytest.importorskip("dask.array")
    X, y = blobs
    lazy = array.from_array(X, chunks=(50, 4)), array.from_array(y, chunks=60)
    weights = np.linspace(0.5, 2, len(y))
    blockwise = LoRAClassifier(random_state=0).partial_fit(
        *lazy, classes=[0, 1, 2], sample_weight=array.from_array(weights, chunks=30)
    )
    rowwise = LoRAClassifier(random_state=0)
    for start in (0, 50, 100):
        rows = slice(start, start + 50)
        rowwise.partial_fit(X[rows], y[rows], classes=[0, 1, 2], sample_weight=weights[rows])
    assert blockwise.n_iter_ == 3
    np.testing.assert_array_equal(blockwise.predict_proba(X), rowwise.predict_proba(X))
    regressor = LoRARegressor(random_state=0).partial_fit(X, array.from_array(X[:, 0], chunks=40))
    assert regressor.n_iter_ == 1


def test_predictions_do_not_depend_on_how_rows_are_cut(blobs, monkeypatch):
    X, y = blobs
    classifier = LoRAClassifier(max_iter=2, random_state=0).fit(X, y)
    whole = classifier.predict_proba(X)
    monkeypatch.setattr("nblora.estimators.network._PREDICTION_ROWS", 50)
    np.testing.assert_allclose(classifier.predict_proba(X), whole, rtol=1e-5)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "nblora.estimators")
    with pytest.raises(nblora.errors.MissingExtraError, match=r"nblora\[sklearn\]"):
        importlib.import_module("nblora.estimators")
