"""scikit-learn's estimators (extra `sklearn`): networks on numbers, and pretrained models on texts."""

from nblora.errors import MissingExtraError

try:
    import sklearn.base  # noqa: F401
except ImportError as error:
    raise MissingExtraError("nblora.estimators needs scikit-learn: pip install 'nblora[sklearn]'") from error

from .network import LoRAClassifier, LoRARegressor
from .text import TextClassifier

__all__ = ["LoRAClassifier", "LoRARegressor", "TextClassifier"]
