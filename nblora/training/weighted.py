"""`Weighted`: a loss in which samples count more or less."""

from typing import Any

import numpy as np

from .losses import IGNORED, CrossEntropy, Loss, MeanSquaredError, as_loss


class Weighted(Loss):
    """Σ w l / count: each sample's loss times its weight, the weights scaled to a mean of 1 over the data set.

    `pack` joins targets and weights to what `fit` takes as `y`, so that they stay together however batches are drawn.
    With equal weights it is the loss itself. A weight of 2 is not the same as the sample twice: it makes one larger
    step where the sample twice makes two. Computed in float64 by NumPy, whatever the model's device.

    Parameters
    ----------
    loss : {"mse", "cross_entropy"}
        The loss of one sample; for "mse" the mean over its outputs.
    """

    def __init__(self, loss: str) -> None:
        inner = as_loss(loss)
        if not isinstance(inner, MeanSquaredError | CrossEntropy):
            raise ValueError(f"loss must be 'mse' or 'cross_entropy' to be weighted, got {loss!r}")
        self.loss = inner
        self.metrics = inner.metrics  # type: ignore[misc]  # a class variable of losses whose metrics are fixed

    def pack(self, target: Any, weights: Any) -> np.ndarray:
        """Return targets and weights as one array, (samples, columns + 1).

        Parameters
        ----------
        target : array_like, shape (samples,) or (samples, outputs)
        weights : array_like, shape (samples,)
            Not negative, and not all zero.
        """
        values, factors = np.asarray(target, np.float64), np.asarray(weights, np.float64)
        if factors.shape != values.shape[:1]:
            raise ValueError(f"weights must have shape ({len(values)},), one for each sample, got {factors.shape}")
        if not np.isfinite(factors).all() or (factors < 0).any() or not factors.any():
            raise ValueError("weights must be finite and not negative, and not all zero")
        return np.column_stack([values, factors / factors.mean()])

    def check_target(self, name: str, target: Any, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) != 2 or np.ndim(target) != 2:
            raise ValueError(f"{name} must be what Weighted.pack returns, for outputs of shape (samples, outputs)")
        values, _ = self._unpack(target)
        self.loss.check_target(name, values, shape)
        if isinstance(self.loss, CrossEntropy) and (values == IGNORED).any():
            raise ValueError(f"{name} must not hold {IGNORED} where samples have weights: give those the weight 0")
        return np.asarray(target)

    def _unpack(self, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self.loss, CrossEntropy):
            return target[:, 0].astype(np.int64), target[:, -1]
        return target[:, :-1], target[:, -1]

    def value_and_gradient(self, output: np.ndarray, target: np.ndarray, backend: Any = None) -> tuple[float, Any]:
        values, weights = self._unpack(target)
        z = output.astype(np.float64)
        if isinstance(self.loss, CrossEntropy):
            losses, slopes = _cross_entropy(z, values)
        else:
            losses, slopes = np.mean((z - values) ** 2, axis=1), 2 * (z - values) / z.shape[1]
        gradient = slopes * (weights / len(z))[:, None]
        return float(np.mean(losses * weights)), gradient.astype(output.dtype)

    def measure(self, output: np.ndarray, target: np.ndarray) -> dict[str, float]:
        values, weights = self._unpack(target)
        if not isinstance(self.loss, CrossEntropy):
            return {}
        return {"accuracy": float(np.mean((output.argmax(axis=1) == values) * weights))}


def _cross_entropy(z: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's log Σ exp(z) - z[label], and its gradient: the softmax less the label's one."""
    shifted = z - z.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(z))
    losses = np.log(sums[:, 0]) - shifted[rows, labels]
    slopes = exponentials / sums
    slopes[rows, labels] -= 1
    return losses, slopes
