"""`TextClassifier`: inside scikit-learn's tools, by every method, and in files."""

import json
import pickle
from contextlib import nullcontext as nothing

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

import nblora
from nblora.estimators import TextClassifier
from nblora.pretrained.labels import labels_of
from nblora.text.labels import read_labels
from nblora.text.predicting import load_predictor
from tests.text.folders import sentence_folder

TEXTS = ["the cat sat on the mat", "the law has tax", "tax law on tax", "cat has mat", "law law tax", "mat cat sat"] * 4
LABELS = ["pet", "law", "law", "pet", "law", "pet"] * 4
QUICK = {"rank": 2, "epochs": 8, "lr": 5e-3, "batch_size": 4, "random_state": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(sentence_folder(tmp_path_factory.mktemp("models") / "minilm"))


@pytest.fixture(scope="module")
def fitted(folder):
    return TextClassifier(folder, **QUICK).fit(TEXTS, LABELS)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["head", "lora", "delta", "full"])
def test_each_method_trains_what_it_says_and_learns(folder, method):
    classifier = TextClassifier(folder, method=method, **QUICK | {"epochs": 16}).fit(TEXTS, LABELS)
    assert classifier.loss_curve_[-1] < 0.9 * classifier.loss_curve_[0]
    assert classifier.score(TEXTS, LABELS) > 0.8
    model, before = classifier.model_, nblora.load_pretrained(folder, task="sequence-classification")
    names = set(model.parameter_names())
    common = {name for name in names & set(before.parameter_names()) if not name.startswith("classifier")}
    moved = {name for name in common if np.any(model.get_parameter(name) != before.get_parameter(name))}
    assert len(common) > 5
    assert bool(moved) == (method == "full")
    assert any(name.endswith("lora_A") for name in names) == (method in ("lora", "delta"))
    assert any(name.endswith(".delta") for name in names) == (method == "delta")


@pytest.mark.parametrize("labels", [["b", "a", "c"], [7, -1, 3], [2.0, 0.0, 5.0], [True, False, True]])
@pytest.mark.parametrize("kind", [list, np.array])
def test_labels_and_texts_of_any_kind(folder, labels, kind):
    texts = ["the cat", "tax law", "on the mat"] * 8
    y = kind(labels * 8)
    classifier = TextClassifier(folder, **QUICK | {"epochs": 20}).fit(kind(texts), y)
    assert list(classifier.classes_) == sorted(set(labels))
    assert classifier.score(kind(texts), y) == 1
    assert classifier.predict(texts).dtype == np.array(labels).dtype
    count = len(set(labels))
    assert classifier.predict_proba(texts).shape == (24, count)
    np.testing.assert_allclose(classifier.predict_proba(texts).sum(1), 1)
    assert classifier.decision_function(texts).shape == ((24,) if count == 2 else (24, count))


def test_the_decision_is_that_of_the_largest_logit(fitted):
    decided = fitted.classes_[(fitted.decision_function(TEXTS) > 0).astype(int)]
    np.testing.assert_array_equal(decided, fitted.predict(TEXTS))
    np.testing.assert_array_equal(decided, fitted.classes_[fitted.predict_proba(TEXTS).argmax(1)])


def test_predictions_come_in_the_order_of_the_texts(fitted):
    whole = fitted.predict_proba(TEXTS)
    assert len({row.tobytes() for row in whole}) > 3
    alone = np.concatenate([fitted.predict_proba([text]) for text in TEXTS])
    np.testing.assert_allclose(whole, alone, rtol=1e-5)


def test_same_seed_same_model(folder):
    settings = QUICK | {"epochs": 2}
    first, second = (TextClassifier(folder, **settings).fit(TEXTS, LABELS) for _ in range(2))
    other = TextClassifier(folder, **settings | {"random_state": 1}).fit(TEXTS, LABELS)
    np.testing.assert_array_equal(first.predict_proba(TEXTS), second.predict_proba(TEXTS))
    assert np.any(first.predict_proba(TEXTS) != other.predict_proba(TEXTS))


def test_pairs_of_texts(folder):
    """Which is a matter of both: the first texts alone say nothing."""
    pairs = [("cat", "cat"), ("cat", "law"), ("law", "cat"), ("law", "law")] * 10
    y = [first == second for first, second in pairs]
    classifier = TextClassifier(folder, method="full", **QUICK | {"epochs": 40}).fit(pairs, y)
    assert classifier.score(np.array(pairs), y) == 1


def test_long_texts_are_cut(folder):
    long = ["tax " * 300, "cat " * 300] * 4
    classifier = TextClassifier(folder, **QUICK).fit(long, LABELS[:8])  # the model has 32 positions
    short = TextClassifier(folder, **QUICK | {"max_length": 5}).fit(long, LABELS[:8])
    np.testing.assert_array_equal(
        short.predict_proba(["tax tax tax cat"]), short.predict_proba(["tax tax tax law law law"])
    )
    assert np.any(classifier.predict_proba(["tax tax tax cat"]) != classifier.predict_proba(["tax tax tax law"]))


def test_sample_weights_pull(folder):
    wrong = [label if place % 2 else "law" for place, label in enumerate(LABELS)]
    weights = [1.0 if place % 2 else 1e-3 for place in range(len(LABELS))]
    texts = [TEXTS[0] if label == "pet" else TEXTS[2] for label in LABELS]
    by_weight = TextClassifier(folder, **QUICK).fit(texts, wrong, weights)
    plain = TextClassifier(folder, **QUICK).fit(texts, wrong)
    right = by_weight.classes_.tolist().index("pet")
    assert by_weight.predict_proba(texts[:1])[0, right] > 0.9 > plain.predict_proba(texts[:1])[0, right]
    scaled = TextClassifier(folder, **QUICK).fit(texts, wrong, [4 * weight for weight in weights])
    np.testing.assert_allclose(scaled.predict_proba(texts), by_weight.predict_proba(texts), rtol=1e-3)


def test_early_stopping_holds_texts_out_and_returns_to_the_best(folder):
    settings = QUICK | {"epochs": 60, "lr": 0.05, "early_stopping": True, "validation_fraction": 0.25}
    noisy = [LABELS[place] if place % 3 else "law" for place in range(len(LABELS))]
    classifier = TextClassifier(folder, **settings).fit(TEXTS, noisy)
    curve = classifier.validation_loss_curve_
    assert classifier.n_iter_ == len(curve) == int(np.argmin(curve)) + 1 + 2 < 60
    assert classifier.t_ == classifier.n_iter_ * 5  # 18 texts of 24, by fours


def test_a_head_of_the_folder_is_trained_on(folder, tmp_path):
    first = TextClassifier(folder, **QUICK | {"epochs": 16}).fit(TEXTS, LABELS)
    first.save_pretrained(tmp_path / "tuned")
    again = TextClassifier(tmp_path / "tuned", **QUICK | {"method": "head", "epochs": 1, "lr": 1e-6}).fit(TEXTS, LABELS)
    assert again.loss_curve_[0] < 0.1
    three = TextClassifier(tmp_path / "tuned", **QUICK | {"epochs": 1}).fit(TEXTS, [*LABELS[:-1], "other"])
    assert three.model_.out_features == 3


# --- in scikit-learn's tools -------------------------------------------------------------------------------------


def shortened(texts):
    return [text.replace("the ", "") for text in texts]


def test_grid_search_in_a_pipeline(folder):
    steps = [("shorten", FunctionTransformer(shortened)), ("classify", TextClassifier(folder, **QUICK))]
    search = GridSearchCV(Pipeline(steps), {"classify__rank": [1, 2], "classify__lr": [1e-6, 5e-3]}, cv=2)
    search.fit(TEXTS, LABELS)
    assert search.best_params_["classify__lr"] == 5e-3
    assert search.best_score_ == search.score(TEXTS, LABELS) == 1
    assert min(search.cv_results_["mean_test_score"]) < 1


def test_cross_validation_in_processes(folder):
    scores = cross_val_score(TextClassifier(folder, **QUICK), TEXTS, LABELS, cv=2, n_jobs=2)
    assert scores.tolist() == [1, 1]


def test_clone_and_pickle(fitted):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    twin = clone(fitted)
    assert not hasattr(twin, "model_")
    np.testing.assert_array_equal(twin.fit(TEXTS, LABELS).predict_proba(TEXTS), fitted.predict_proba(TEXTS))


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "delta"])
def test_the_adapter_of_a_folder_classifies_alike(folder, tmp_path, method):
    classifier = TextClassifier(folder, method=method, **QUICK).fit(TEXTS, LABELS)
    with pytest.warns(UserWarning, match="delta") if method == "delta" else nothing():
        classifier.save_adapter(tmp_path / "adapter")
    names = read_labels(tmp_path / "adapter")
    assert names == ["law", "pet"]
    model = nblora.load_pretrained(folder, task="sequence-classification", num_labels=2, seed=9)
    model.load_adapter(tmp_path / "adapter")
    if method == "lora":
        ids = classifier.tokenizer_.encode(TEXTS).ids
        assert [names[best] for best in model(ids).argmax(1)] == classifier.predict(TEXTS).tolist()
        found = model(ids)[:, 1] - model(ids)[:, 0]
        np.testing.assert_allclose(found, classifier.decision_function(TEXTS), atol=1e-5 * abs(found).max())


def test_the_merged_model_says_its_labels(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "law", "1": "pet"}
    assert config["label2id"] == {"law": 0, "pet": 1}
    model = nblora.load_pretrained(tmp_path / "merged", task="sequence-classification")
    assert labels_of(model) == ["law", "pet"]
    found = model(nblora.load_tokenizer(tmp_path / "merged").encode(TEXTS).ids)
    np.testing.assert_allclose(found[:, 1] - found[:, 0], fitted.decision_function(TEXTS), atol=1e-4)


def test_every_weight_is_no_adapter_and_a_head_alone_is_one(folder, tmp_path):
    settings = QUICK | {"epochs": 1}
    whole = TextClassifier(folder, method="full", **settings).fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match="'full' makes no adapter: save_pretrained"):
        whole.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    whole.save_pretrained(tmp_path / "whole")
    assert read_labels(tmp_path / "whole") == ["law", "pet"]
    head = TextClassifier(folder, method="head", **settings).fit(TEXTS, LABELS)
    head.save_adapter(tmp_path / "head")
    for saved, classifier in (((tmp_path / "whole",), whole), ((folder, tmp_path / "head"), head)):
        found = load_predictor(*saved).outputs(TEXTS)
        np.testing.assert_allclose(found[:, 1] - found[:, 0], classifier.decision_function(TEXTS), atol=1e-4)


# --- what cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        ("one text", ["a"], TypeError, "one text is a list of one"),
        ([], [], ValueError, "at least one text"),
        (["a", 3], ["a", "b"], TypeError, "X must hold texts, or a pair of texts in each row, got 3"),
        (np.zeros((3, 2)), ["a", "b", "a"], TypeError, "X must hold texts"),
        ([("a", "b", "c"), ("a", "b", "c")], ["a", "b"], TypeError, "a pair of texts"),
        (["a", "b"], ["a"], ValueError, "inconsistent numbers of samples"),
        (["a", "b"], ["a", "a"], ValueError, "at least 2 classes, got 1 class: 'a'"),
        (["a", "b"], [0.1, 0.7], ValueError, "Unknown label type"),
        (["a", "b"], None, ValueError, "requires y to be passed"),
    ],
)
def test_data_that_cannot_be_used(folder, x, y, error, words):
    with pytest.raises(error, match=words):
        TextClassifier(folder).fit(x, y)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": None}, TypeError, "model must be the path of a pretrained model"),
        ({"model": "not/there"}, FileNotFoundError, "no such model folder"),
        ({"method": "dorra"}, ValueError, "method"),
        ({"rank": 0}, ValueError, "rank"),
        ({"target": "none"}, ValueError, "target 'none' matches none of the layers"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"max_length": 2}, ValueError, "max_length"),
        ({"epochs": 0}, ValueError, "epochs"),
    ],
)
def test_settings_that_cannot_be_used(folder, settings, error, words):
    with pytest.raises(error, match=words):
        TextClassifier(**{"model": folder} | settings).fit(TEXTS, LABELS)
