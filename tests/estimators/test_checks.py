"""scikit-learn's own checks, every one of them: none is declared as an expected failure."""

import pytest

pytest.importorskip("sklearn")

from sklearn.utils.estimator_checks import parametrize_with_checks

from nblora.estimators import LoRAClassifier, LoRARegressor


@parametrize_with_checks([LoRAClassifier(), LoRARegressor()])
def test_scikit_learn_check(estimator, check):
    check(estimator)
