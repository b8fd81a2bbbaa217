"""scikit-learn's own checks of `TextClassifier`.

They give rows of numbers, and it takes texts. So most are made on an estimator that writes each number as a word, which
the classifier then reads; only the checks of its tags would be made on the plain one, which scikit-learn leaves out for
all estimators of texts. Two do not apply, for the reason that `EXPECTED` gives.
"""

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")

from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted, validate_data

from nblora.estimators import TextClassifier
from tests.text.folders import sentence_folder

EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": "asks for equal outputs to 1e-7 after other batches: float32",
    "check_methods_subset_invariance": "asks for equal outputs to 1e-7 of one text and of many together: float32",
}
WORDS = "abcdefghijklmnopqrstuvwxyz"
LONGEST = 30  # the small model has 32 positions


def written(X):
    """Rows of numbers as texts: a letter for each."""
    places = np.clip(np.round(4 * np.asarray(X, float)), -12, 12).astype(int) + 12
    return [" ".join(WORDS[place] for place in row[:LONGEST]) for row in places]


class ReadsNumbers(TextClassifier):
    """The classifier of texts that stand for rows of numbers."""

    def fit(self, X, y, sample_weight=None):
        X, y = validate_data(self, X, y)
        return super().fit(written(X), y, sample_weight)

    def _logits(self, X):
        check_is_fitted(self, "model_")
        return super()._logits(written(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        given = tags.input_tags
        assert given.string
        assert given.one_d_array
        assert not given.two_d_array
        given.string, given.one_d_array, given.two_d_array = False, False, True
        return tags


@pytest.fixture(scope="module")
def estimator(tmp_path_factory):
    folder = sentence_folder(tmp_path_factory.mktemp("models") / "minilm")
    return ReadsNumbers(str(folder), rank=2, alpha=4, epochs=10, lr=1e-2, random_state=0)


def name_of(check):
    return getattr(check, "func", check).__name__


CHECKS = [check for _, check in estimator_checks.estimator_checks_generator(ReadsNumbers("folder"))]


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_scikit_learn_check(check, estimator):
    if name_of(check) in EXPECTED:
        pytest.skip(EXPECTED[name_of(check)])
    check(estimator)


def test_the_checks_are_there():
    names = {name_of(check) for check in CHECKS}
    assert EXPECTED.keys() <= names
    assert len(names) > 45
