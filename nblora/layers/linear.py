"""`Linear`: the one step that plain layers, low-rank layers and adapters share, given by its operands."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Gradients, Operands, Saved
from nblora.storage.onnx_graph import OnnxGraph

from .activations import ACTIVATIONS
from .base import Layer


class Linear(Layer, abstract=True):
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
        samples, on_device = self._samples("x", x, self.in_features)
        rows = self._backend.from_host(checks.as_rows(samples))
        keep = self._training
        operands = self._operands()
        y, saved = self._backend.forward(rows, operands, self._dropout_mask(rows) if keep else None, keep)
        if saved is not None:
            self._saved = saved, samples.shape, operands
        return self._leave(y, on_device).reshape((*samples.shape[:-1], self.out_features))

    def backward(self, grad_output: Any, accumulate: bool = False) -> np.ndarray:
        checks.check_flag("accumulate", accumulate)
        grad, on_device, saved, shape, operands = self._checked_gradient(grad_output)
        gradients = self._backend.backward(grad, saved, operands)
        self._store_gradients(self._named_gradients(gradients), accumulate)
        return self._leave(gradients.x, on_device).reshape(shape)

    def _onnx_operands(self) -> Operands:
        """The operands of the exported graph."""
        return self._operands()

    def _add_to_onnx(self, graph: OnnxGraph, x: str) -> str:
        base, low_rank, delta, code, _ = self._onnx_operands()
        to_host, terms = self._backend.to_host, []
        transposed = base is not None and base.transposed
        if base is not None:
            weight = to_host(base.weight)
            terms.append(graph.node("MatMul", x, graph.constant(weight.T if transposed else weight, "weight")))
            if base.bias is not None:
                terms.append(graph.constant(to_host(base.bias), "bias"))
        if low_rank is not None:
            low = graph.node("MatMul", x, graph.constant(to_host(low_rank.A), "lora_A"))
            low = graph.node("MatMul", low, graph.constant(to_host(low_rank.B), "lora_B"))
            terms.append(graph.node("Mul", low, graph.constant(low_rank.scaling, "scaling")))
        if delta is not None:
            change = to_host(delta.delta)
            dense = graph.node("MatMul", x, graph.constant(change.T if transposed else change, "delta"))
            terms.append(graph.node("Mul", dense, graph.constant(delta.scaling, "delta_scaling")))
        z = terms[0]
        for term in terms[1:]:
            z = graph.node("Add", z, term)
        return graph.activation(z, ACTIVATIONS[code])

    def _sweep(self, grad_output: Any, lr: float, delta_lr: float) -> np.ndarray:
        grad, on_device, saved, shape, operands = self._checked_gradient(grad_output)
        gradients = self._backend.backward_update(grad, saved, operands, lr, delta_lr)
        self._store_gradients(self._named_gradients(gradients), accumulate=False)
        self._saved = None
        return self._leave(gradients.x, on_device).reshape(shape)

    def _forget_forward(self) -> None:
        self._saved = None

    def _require_forward(self) -> None:
        self._last_forward()

    def _last_forward(self) -> tuple[Saved, tuple[int, ...], Operands]:
        if self._saved is None:
            self._require_open()
            raise RuntimeError(_why_no_forward(self._training))
        return self._saved

    def _checked_gradient(self, grad_output: Any) -> tuple[Any, bool, Saved, tuple[int, ...], Operands]:
        saved, shape, operands = self._last_forward()
        grad, on_device = self._samples("grad_output", grad_output, self.out_features)
        if grad.shape[:-1] != shape[:-1]:
            raise ValueError(
                f"grad_output must have the output's shape {(*shape[:-1], self.out_features)}, got {grad.shape}"
            )
        return self._backend.from_host(checks.as_rows(grad)), on_device, saved, shape, operands


def _why_no_forward(training: bool) -> str:
    if not training:
        return "backward needs a forward in training mode: call train() and forward() first"
    return "backward needs a forward first: none was made since the object was made, reset or updated"
