"""`Normalized`: a convolution and the fixed batch norm behind it as one convolution, with its weight scaled.

With a scale g and a shift h of each output: y = act((x (W + c D) + s (x A) B + b)·g + h) is the same step of W·g, D·g,
B·g and b·g + h. Gradients of those, times g, are those of W, D, B and b; x and A have the same in both.
"""

from typing import Any

import numpy as np

from .protocol import Array, Base, Gradients, Operands, Product


class Normalized:
    """The step of `product` with what it computes scaled and shifted, before an activation of its own.

    Parameters
    ----------
    product : Product
        Of a weight stored (out, in), on NumPy's arrays.
    backend : Backend
    scale, shift : ndarray, shape (out,)
    activation : int
        A code of `elementwise`, in place of the identity.
    """

    def __init__(self, product: Product, backend: Any, scale: Array, shift: Array, activation: int) -> None:
        self._product, self._backend = product, backend
        self._scale, self._shift, self._activation = scale, shift, activation

    def _scaled(self, operands: Operands) -> Operands:
        base, low_rank, delta, _, train = operands
        assert base is not None  # a convolution always has its own weight
        column = self._scale[:, None]
        bias = self._shift if base.bias is None else base.bias * self._scale + self._shift
        if low_rank is not None:
            low_rank = low_rank._replace(B=low_rank.B * self._scale)
        if delta is not None:
            delta = delta._replace(delta=delta.delta * column)
        return Operands(Base(base.weight * column, bias, True), low_rank, delta, self._activation, train)

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Any]:
        """Compute y, and keep what the product keeps."""
        return self._product.forward(x, self._scaled(operands), mask, keep)

    def backward(self, grad_output: Array, saved: Any, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient, from the values as they are."""
        found = self._product.backward(grad_output, saved, self._scaled(operands), input_gradient)
        column = self._scale[:, None]

        def times(gradient: Array | None, factor: np.ndarray) -> Array | None:
            return None if gradient is None else gradient * factor

        own_bias = operands.base is not None and operands.base.bias is not None
        return Gradients(
            found.x,
            found.A,
            times(found.B, self._scale),
            times(found.delta, column),
            times(found.weight, column),
            times(found.bias, self._scale) if own_bias else None,
        )

    def backward_update(
        self,
        grad_output: Array,
        saved: Any,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward, and the update of velocity, delta and a trained weight, in place."""
        found, delta, base = self.backward(grad_output, saved, operands, input_gradient), operands.delta, operands.base
        if delta is not None and found.delta is not None:
            self._backend.momentum_update(delta.delta, delta.velocity, found.delta, delta.momentum, delta_lr)
        if base is not None and found.weight is not None:
            self._backend.sgd_update(base.weight, found.weight, lr)
        return found._replace(delta=None, weight=None)
