"""Losses: what training makes small. Each is a mean, and gives the gradient of that mean."""

from typing import Any, ClassVar

import numpy as np

from nblora import checks
from nblora.backends import default_backend

from .metrics import accuracy, binary_accuracy


class Loss:
    """A loss and its gradient. A loss of your own derives from it and overrides `value_and_gradient`.

    Attributes
    ----------
    metrics : tuple of str
        Names of the figures that `measure` returns beside the loss.
    """

    metrics: ClassVar[tuple[str, ...]] = ()

    def value_and_gradient(self, output: np.ndarray, target: np.ndarray, backend: Any = None) -> tuple[float, Any]:
        """Compute the loss and its gradient with respect to `output`.

        Parameters
        ----------
        output : ndarray of float32 or float64, shape (samples, ..., out_features)
        target : ndarray
            As `check_target` returns it, for the same samples.
        backend : optional
            Where to compute: the model's. Default: that of new layers.

        Returns
        -------
        tuple of float and ndarray
            The mean, and a new array of `output`'s shape and dtype.
        """
        raise NotImplementedError

    def check_target(self, name: str, target: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return the targets of a whole data set as an array that can be cut into batches.

        `name` is what messages call them, `shape` that of the model's outputs for the data set.

        Raises
        ------
        TypeError, ValueError
            For targets of another kind or shape.
        """
        array = checks.as_real(name, target)
        if shape[-1] == 1 and array.shape == shape[:-1]:
            array = array.reshape(shape)
        _check_length(name, array, shape)
        if array.shape != shape:
            raise ValueError(f"{name} must have the shape of the model's outputs, {shape}, got {array.shape}")
        return array

    def measure(self, output: np.ndarray, target: np.ndarray) -> dict[str, float]:
        """Compute the figures named by `metrics`: means over the given samples."""
        return {}

    def _figures(self, output: Any, target: np.ndarray, backend: Any) -> dict[str, Any]:
        """What `measure` computes, of outputs where the model is: numbers that `backend.read` brings to the host."""
        return self.measure(backend.to_host(output), target)

    def _learnt(self, target: np.ndarray) -> int:
        """Of how many targets the loss is the mean."""
        return len(target)

    def __call__(self, output: Any, target: Any) -> float:
        """Compute the loss of `output`, checked like a data set's."""
        array = np.asarray(output)
        array = array if array.dtype in checks.FLOAT_DTYPES else checks.as_real("output", output).astype(np.float64)
        return float(self.value_and_gradient(array, self.check_target("target", target, array.shape))[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class MeanSquaredError(Loss):
    """Σ (y - t)² / count, the mean over samples and outputs, as `torch.nn.MSELoss`. Its name in `fit`: "mse".

    Targets have the shape of the outputs; the last axis may be left out where the model has one output.
    """

    def value_and_gradient(self, output: np.ndarray, target: np.ndarray, backend: Any = None) -> tuple[float, Any]:
        return _by_rows((backend or default_backend()).mean_squared_error, output, target.astype(output.dtype))


IGNORED = -100
"""The label of a sample, or token, that nothing is learnt from, as in PyTorch."""


class CrossEntropy(Loss):
    """Softmax cross-entropy with integer labels: the mean over samples of log Σ exp(z) - z[label].

    The model gives logits, one for each class. Targets are integers in [0, classes), without a class axis, or -100
    where nothing is to be learnt: the mean is over the others, 0 where there are none. As
    `torch.nn.CrossEntropyLoss`, and Keras's sparse one with `from_logits=True`. Its name in `fit`: "cross_entropy".
    """

    metrics = ("accuracy",)

    def value_and_gradient(self, output: np.ndarray, target: np.ndarray, backend: Any = None) -> tuple[float, Any]:
        labels = target.reshape(-1).astype(np.int64)
        return _by_rows((backend or default_backend()).softmax_cross_entropy, output, labels)

    def check_target(self, name: str, target: Any, shape: tuple[int, ...]) -> np.ndarray:
        array = np.asarray(target)
        if array.dtype.kind not in "biu":
            raise TypeError(
                f"{name} must hold integer class labels, got dtype {array.dtype}: "
                "numpy.unique(labels, return_inverse=True)[1] numbers labels of any kind"
            )
        _check_length(name, array, shape)
        if shape[-1] < 2:
            raise ValueError(
                "cross_entropy needs a model with one output for each class, at least 2, and this model has 1: "
                "use binary_cross_entropy"
            )
        if array.shape != shape[:-1]:
            remedy = ": one-hot rows become labels by y.argmax(axis=-1)" if array.shape == shape else ""
            raise ValueError(f"{name} must have shape {shape[:-1]}, one label a sample, got {array.shape}{remedy}")
        wrong = ((array < 0) & (array != IGNORED)) | (array >= shape[-1])
        if wrong.any():
            place = np.unravel_index(int(np.argmax(wrong)), array.shape)
            raise ValueError(
                f"{name} must hold labels from 0 to {shape[-1] - 1}, as many as the model has outputs, or {IGNORED} "
                f"where nothing is to be learnt, got {array[place]} at sample {place[0]}"
            )
        return array

    def _learnt(self, target: np.ndarray) -> int:
        values = getattr(target, "values", target)  # of sequences of different lengths
        return int(np.count_nonzero(values != IGNORED))

    def measure(self, output: np.ndarray, target: np.ndarray) -> dict[str, float]:
        learnt = target != IGNORED
        return {"accuracy": accuracy(output[learnt], target[learnt]) if learnt.any() else 0.0}

    def _figures(self, output: Any, target: np.ndarray, backend: Any) -> dict[str, Any]:
        if isinstance(output, np.ndarray) or type(self).measure is not CrossEntropy.measure:
            return super()._figures(output, target, backend)
        right = backend.right_answers(checks.as_rows(output), target.reshape(-1))
        return {"accuracy": right * (1 / max(1, self._learnt(target)))}


class BinaryCrossEntropy(Loss):
    """Binary cross-entropy with logits: the mean over samples and outputs of log(1 + exp(z)) - z t.

    Targets are 0 or 1, or probabilities between, in the shape of the outputs; the last axis may be left out where the
    model has one output. As `torch.nn.BCEWithLogitsLoss`. Its name in `fit`: "binary_cross_entropy".
    """

    metrics = ("accuracy",)

    def value_and_gradient(self, output: np.ndarray, target: np.ndarray, backend: Any = None) -> tuple[float, Any]:
        return _by_rows((backend or default_backend()).binary_cross_entropy, output, target.astype(output.dtype))

    def check_target(self, name: str, target: Any, shape: tuple[int, ...]) -> np.ndarray:
        array = super().check_target(name, target, shape)
        wrong = ~((array >= 0) & (array <= 1))
        if wrong.any():
            place = np.unravel_index(int(np.argmax(wrong)), array.shape)
            raise ValueError(f"{name} must hold 0, 1 or probabilities between, got {array[place]} at sample {place[0]}")
        return array

    def measure(self, output: np.ndarray, target: np.ndarray) -> dict[str, float]:
        return {"accuracy": binary_accuracy(output, target)}


class Part(Loss):
    """A loss of which a batch is a share only, so that its gradient counts by that: one of several that make a step."""

    def __init__(self, loss: Loss, share: float) -> None:
        self._loss, self._share = loss, share
        self.metrics = loss.metrics  # type: ignore[misc]  # a class variable of losses whose metrics are fixed

    def value_and_gradient(self, output: np.ndarray, target: np.ndarray, backend: Any = None) -> tuple[float, Any]:
        value, gradient = self._loss.value_and_gradient(output, target, backend)
        (backend or default_backend()).scale(gradient, self._share)
        return value, gradient

    def measure(self, output: np.ndarray, target: np.ndarray) -> dict[str, float]:
        return self._loss.measure(output, target)

    def _figures(self, output: Any, target: np.ndarray, backend: Any) -> dict[str, Any]:
        return self._loss._figures(output, target, backend)


LOSSES: dict[str, type[Loss]] = {
    "mse": MeanSquaredError,
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
}


def as_loss(loss: Any) -> Loss:
    """Return the loss that a name or an object stands for."""
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name ({', '.join(map(repr, LOSSES))}) or a Loss object, got {loss!r}")
    return LOSSES[checks.check_choice("loss", loss, tuple(LOSSES))]()


def _by_rows(function: Any, output: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Call a backend's loss on (N, out), with the target's leading axes made one likewise."""
    rows = checks.as_rows(output)
    if target.ndim > 1:
        target = checks.as_rows(target)
    value, gradient = function(rows, target)
    return value, gradient.reshape(output.shape)


def _check_length(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.ndim == 0 or len(array) != shape[0]:
        count = "a single number" if array.ndim == 0 else f"{len(array)}"
        raise ValueError(f"{name} must have one entry for each of the {shape[0]} samples, got {count}")
