"""`Embedding`: rows of a table, by number."""

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array, Backend, Product

from .weighted import Weighted


class Embedding(Weighted):
    """y = W[x]: the rows of a table that integers name, as `torch.nn.Embedding`.

    Logical shapes are (count, features): with an adapter y = (W + s A B + c D)[x], A (count, rank). Its input has no
    gradient, so `backward` and `backward_update` return None; an adapter's `lora_dropout` does nothing, as in PEFT.

    Parameters
    ----------
    weight : array_like, shape (count, features)
        Taken over without a copy where it is float32 or float64 and C-contiguous; lists, integers and float16
        become float32.

    Attributes
    ----------
    weight : ndarray
    in_features, out_features : int
        Rows of the table, and numbers of a row.
    trainable : bool
        As for `Dense`.
    """

    _transposed = False
    _droppable = False

    def __init__(self, weight: Any) -> None:
        self._hold(checks.as_parameter("weight", weight, (None, None)))

    @classmethod
    def random(
        cls, count: int, features: int, *, dtype: Any = "float32", seed: int | np.random.Generator | None = None
    ) -> Self:
        """Make a table of standard normal numbers, as `torch.nn.Embedding` does."""
        shape = checks.check_integer("count", count, 1), checks.check_integer("features", features, 1)
        kind = checks.check_dtype(dtype)
        return cls(np.random.default_rng(seed).standard_normal(shape).astype(kind))

    def forward(self, x: Any) -> np.ndarray:
        """Return the rows that `x` names.

        Parameters
        ----------
        x : array_like of integers, any shape
            In [0, in_features). Kept by reference until backward, as by every layer.

        Returns
        -------
        ndarray of the layer's dtype, shape (*x.shape, out_features)
            A new array.

        Raises
        ------
        TypeError
            For what is no integer.
        IndexError
            For an integer out of range.
        """
        return super().forward(x)

    @property
    def _takes(self) -> None:
        return None

    def _product(self, backend: Backend) -> Product:
        return backend.embedding()

    def _batch(self, x: Array) -> Array:
        checks.check_range("x", x, self.in_features)  # here, for what calls no public forward comes by too
        return x.reshape(math.prod(x.shape))

    def _as_input(self, name: str, value: Any) -> Array:
        return checks.as_indices(name, self._backend.to_host(value))

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return *shape, self.out_features

    def _axes(self) -> tuple[int | str, ...]:
        return ("batch",)

    def _example(self, samples: int) -> np.ndarray:
        return np.arange(samples) % self.in_features

    @classmethod
    def _made(cls, weight: np.ndarray, bias: np.ndarray | None, config: Mapping[str, Any]) -> Self:
        return cls(weight)

    def _settings(self) -> dict[str, Any]:
        return {}

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        return f"{type(self).__name__}({self.in_features}, {self.out_features})"
