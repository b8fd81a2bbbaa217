"""Figures of merit, taken beside the loss."""

import numpy as np


def accuracy(output: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples whose largest output is the one that `labels` names.

    Parameters
    ----------
    output : ndarray, shape (..., classes)
        Logits or probabilities.
    labels : ndarray of int, shape (...)
        The right classes.
    """
    return float(np.mean(np.argmax(output, axis=-1) == labels))


def binary_accuracy(logits: np.ndarray, target: np.ndarray) -> float:
    """The share of outputs on the right side: a positive logit where the target is above one half.

    Parameters
    ----------
    logits, target : ndarray of the same shape
    """
    return float(np.mean((np.asarray(logits) > 0) == (np.asarray(target) > 0.5)))
