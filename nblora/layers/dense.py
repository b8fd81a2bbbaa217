"""`Dense` and `FullyConnected`: the pretrained layers that adapters wrap, one class for each layout of the weight."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from nblora import checks

from .weighted import Weighted, drawn


class Dense(Weighted):
    """y = act(x W + b), with the weight stored as (in_features, out_features).

    Parameters
    ----------
    weight : array_like, shape (in_features, out_features)
        Taken over without a copy where it is float32 or float64 and C-contiguous; lists, integers and float16
        become float32.
    bias : array_like, shape (out_features,), optional
        Of the weight's dtype, or cast to it.
    activation : {"identity", "relu", "gelu", "tanh", "sigmoid", "silu", "gelu_tanh", "quick_gelu"}
        "gelu" is the exact one, with erf; "gelu_tanh" approximates it by tanh, "quick_gelu" is z σ(1.702 z), "silu"
        z σ(z). The derivative of "relu" at 0 is 0.

    Attributes
    ----------
    weight, bias : ndarray
        The stored arrays; `bias` is None where there is none.
    trainable : bool
        True at first. A layer that is not trainable has no trainable parameters and gets no gradients.
    """

    _transposed = False

    def __init__(self, weight: Any, bias: Any = None, *, activation: str = "identity") -> None:
        self._hold(checks.as_parameter("weight", weight, (None, None)), bias, activation)

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        *,
        activation: str = "identity",
        bias: bool = True,
        dtype: Any = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> Self:
        """Make a layer with weight and bias uniform in ±1/sqrt(in_features), as `torch.nn.Linear` does."""
        inputs = checks.check_integer("in_features", in_features, 1)
        outputs = checks.check_integer("out_features", out_features, 1)
        shape = (outputs, inputs) if cls._transposed else (inputs, outputs)
        return cls(*drawn(shape, inputs, outputs, bias, dtype, seed), activation=activation)

    @classmethod
    def _made(cls, weight: np.ndarray, bias: np.ndarray | None, config: Mapping[str, Any]) -> Self:
        return cls(weight, bias, activation=config["activation"])

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        bias = "" if self.bias is not None else ", bias=None"
        return f"{type(self).__name__}({self.in_features}, {self.out_features}{bias}, activation={self.activation!r})"


class FullyConnected(Dense):
    """y = act(x Wᵀ + b), with the weight stored as (out_features, in_features), as most checkpoints have it.

    Parameters, attributes and methods are those of `Dense`, except for the layout of `weight`; named parameters and
    packed vectors have the logical shape (in_features, out_features).
    """

    _transposed = True
