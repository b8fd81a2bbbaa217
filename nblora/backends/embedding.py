"""The step of an embedding: rows that integers name, and gradients added up where they came from.

    forward     y = u B + W[x] + c D[x],  u = s A[x]
    backward    dB = uᵀ gz      dA[i] = s Σ gz[n] Bᵀ      dD[i] = c Σ gz[n]      dW[i] = Σ gz[n],  n with x[n] = i

The product with B and its gradients are the linear step on u with B as the weight. The integers, and what sorts them,
are on the host wherever the tables are.
"""

from typing import NamedTuple

import numpy as np

from .protocol import Array, Backend, Base, Gradients, LowRank, Operands, Rows, Saved


class Kept(NamedTuple):
    """What backward needs of a forward: the integers, and u (N, rank), None without factors."""

    indices: Array
    low: Array | None

    @property
    def x(self) -> np.ndarray:
        """The input."""
        return self.indices


class Embedding:
    """The product of rows that integers name: x (N,), y (N, features). There is no activation and no bias."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Kept | None]:
        """Compute y, and keep what backward needs where `keep`."""
        backend, (base, low_rank, delta, _, _) = self._backend, operands
        assert base is not None  # an embedding has a table
        indices, low = np.array(backend.to_host(x), np.int64), None  # ours alone: a GPU remembers it
        if low_rank is None:
            y = backend.empty((len(indices), base.weight.shape[1]), base.weight.dtype)
        else:
            low = backend.empty((len(indices), low_rank.A.shape[1]), base.weight.dtype)
            backend.take_rows([low_rank.A], [low_rank.scaling], indices, low, False)
            y, _ = backend.forward(low, _product_with(low_rank), None, False)
        tables, factors = [base.weight], [1.0]
        if delta is not None:
            tables, factors = [base.weight, delta.delta], [1.0, delta.scaling]
        backend.take_rows(tables, factors, indices, y, low_rank is not None)
        return y, Kept(x, low) if keep else None

    def backward(self, grad_output: Array, saved: Kept, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient but x's, which has none."""
        return self._sweep(grad_output, saved, operands, None)

    def backward_update(
        self,
        grad_output: Array,
        saved: Kept,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward, and the update of velocity, delta and a trained table row by row, in place."""
        return self._sweep(grad_output, saved, operands, (lr, delta_lr))

    def _sweep(self, gy: Array, saved: Kept, operands: Operands, rates: tuple[float, float] | None) -> Gradients:
        backend, (base, low_rank, delta, _, train) = self._backend, operands
        assert base is not None  # an embedding has a table
        dA = dB = dD = dW = None
        if low_rank is None and delta is None and not train:
            return Gradients(None, None, None, None, None, None)
        rows = _rows(np.ascontiguousarray(backend.to_host(saved.indices), np.int64), len(base.weight))
        if low_rank is not None:
            found = backend.backward(gy, Saved(saved.low, None, None, None), _product_with(low_rank, True))
            dB, dA = found.weight, backend.empty(low_rank.A.shape, low_rank.A.dtype)
            backend.sum_rows(found.x, rows, low_rank.scaling, dA)
        if rates is None:
            if delta is not None:
                dD = backend.empty(delta.delta.shape, gy.dtype)
                backend.sum_rows(gy, rows, delta.scaling, dD)
            if train:
                dW = backend.empty(base.weight.shape, gy.dtype)
                backend.sum_rows(gy, rows, 1.0, dW)
            return Gradients(None, dA, dB, dD, dW, None)
        if delta is not None:
            backend.follow_rows(gy, rows, delta, rates[1])
        if train:
            backend.descend_rows(gy, rows, rates[0], base.weight)
        return Gradients(None, dA, dB, None, None, None)


def _rows(indices: np.ndarray, count: int) -> Rows:
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(indices, minlength=count), out=starts[1:])
    return Rows(np.argsort(indices, kind="stable"), starts)


def _product_with(low_rank: LowRank, train: bool = False) -> Operands:
    """u B as a linear step of its own."""
    return Operands(Base(low_rank.B, None, False), None, None, 0, train)
