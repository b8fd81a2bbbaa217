"""`Linear`: the one step that plain layers, low-rank layers and adapters share, given by its operands."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Gradients, Operands, Saved

from .base import Layer


class Linear(Layer):
    """A layer whose arithmetic is one call of the backend: any of base, low-rank factors and delta (`Operands`)."""

    _saved: tuple[Saved, tuple[int, ...], Operands] | None = None

    def _operands(self) -> Operands:
        raise NotImplementedError

    def _named_gradients(self, gradients: Gradients) -> Iterator[tuple[str, Any]]:
        """Pairs of a parameter's name and its gradient."""
        raise NotImplementedError

    def _dropout_mask(self, rows: np.ndarray) -> Any:
        """The mask of this forward, None without dropout."""
        return None

    def forward(self, x: Any) -> np.ndarray:
        samples = checks.as_samples("x", x, self.in_features, self.dtype)
        rows = self._backend.from_host(checks.as_rows(samples))
        keep = self._training
        operands = self._operands()
        y, saved = self._backend.forward(rows, operands, self._dropout_mask(rows) if keep else None, keep)
        if saved is not None:
            self._saved = saved, samples.shape, operands
        return self._backend.to_host(y).reshape((*samples.shape[:-1], self.out_features))

    def backward(self, grad_output: Any, accumulate: bool = False) -> np.ndarray:
        checks.check_flag("accumulate", accumulate)
        grad, saved, shape, operands = self._checked_gradient(grad_output)
        gradients = self._backend.backward(grad, saved, operands)
        self._store_gradients(dict(self._named_gradients(gradients)), accumulate)
        return self._backend.to_host(gradients.x).reshape(shape)

    def _sweep(self, grad_output: Any, lr: float, delta_lr: float) -> np.ndarray:
        grad, saved, shape, operands = self._checked_gradient(grad_output)
        gradients = self._backend.backward_update(grad, saved, operands, lr, delta_lr)
        self._store_gradients(dict(self._named_gradients(gradients)), accumulate=False)
        self._saved = None
        return self._backend.to_host(gradients.x).reshape(shape)

    def _forget_forward(self) -> None:
        self._saved = None

    def _checked_gradient(self, grad_output: Any) -> tuple[Any, Saved, tuple[int, ...], Operands]:
        if self._saved is None:
            self._require_open()
            raise RuntimeError(_why_no_forward(self._training))
        saved, shape, operands = self._saved
        grad = checks.as_samples("grad_output", grad_output, self.out_features, self.dtype)
        if grad.shape[:-1] != shape[:-1]:
            raise ValueError(
                f"grad_output must have the output's shape {(*shape[:-1], self.out_features)}, got {grad.shape}"
            )
        return self._backend.from_host(checks.as_rows(grad)), saved, shape, operands


def _why_no_forward(training: bool) -> str:
    if not training:
        return "backward needs a forward in training mode: call train() and forward() first"
    return "backward needs a forward first: none was made since the object was made, reset or updated"
