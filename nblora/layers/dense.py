"""`Dense` and `FullyConnected`: the pretrained layers that adapters wrap, one class for each layout of the weight."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from nblora import checks
from nblora.backends import default_backend
from nblora.backends.protocol import Array, Base, Operands
from nblora.storage.checkpoint import take_tensor

from .activations import ACTIVATIONS, activation_code
from .diagnostics import describe_projection
from .parameters import Parameter
from .projection import Projection, Targets


class Dense(Projection):
    """y = act(x W + b), with the weight stored as (in_features, out_features).

    Parameters
    ----------
    weight : array_like, shape (in_features, out_features)
        Taken over without a copy where it is float32 or float64 and C-contiguous; lists, integers and float16
        become float32.
    bias : array_like, shape (out_features,), optional
        Of the weight's dtype, or cast to it.
    activation : {"identity", "relu", "gelu", "tanh", "sigmoid"}
        "gelu" is the exact one, with erf; the derivative of "relu" at 0 is 0.

    Attributes
    ----------
    weight, bias : ndarray
        The stored arrays; `bias` is None where there is none.
    trainable : bool
        True at first. A layer that is not trainable has no trainable parameters and gets no gradients.
    """

    adaptable = True
    _transposed: ClassVar[bool] = False

    def __init__(self, weight: Any, bias: Any = None, *, activation: str = "identity") -> None:
        stored = checks.as_parameter("weight", weight, (None, None))
        self.dtype = stored.dtype
        self._weight = Parameter(stored, transposed=self._transposed, dense=True)
        self.in_features, self.out_features = self._weight.shape
        self._bias = None
        if bias is not None:
            self._bias = Parameter(checks.as_parameter("bias", bias, (self.out_features,), self.dtype))
        self._activation = activation_code(activation)
        self._open(default_backend())

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
        in_features = checks.check_integer("in_features", in_features, 1)
        out_features = checks.check_integer("out_features", out_features, 1)
        kind = checks.check_dtype(dtype)
        rng = np.random.default_rng(seed)
        bound = 1 / np.sqrt(in_features)
        shape = (out_features, in_features) if cls._transposed else (in_features, out_features)
        weight = rng.uniform(-bound, bound, shape).astype(kind)
        vector = rng.uniform(-bound, bound, out_features).astype(kind) if checks.check_flag("bias", bias) else None
        return cls(weight, vector, activation=activation)

    @property
    def weight(self) -> Array:
        """The stored weight."""
        return self._weight.array

    @property
    def bias(self) -> Array | None:
        """The bias, None where there is none."""
        return None if self._bias is None else self._bias.array

    @property
    def activation(self) -> str:
        """The name of the activation function."""
        return ACTIVATIONS[self._activation]

    def as_operand(self) -> Base:
        """Return the arrays as a backend takes them."""
        bias = self._bias
        return Base(self._weight.array, None if bias is None else bias.array, self._transposed)

    def _operands(self) -> Operands:
        return Operands(self.as_operand(), None, None, self._activation, self.trainable)

    def _targets(self) -> Targets:
        return tuple(self._own_parameters().items())

    def _own_parameters(self) -> dict[str, Parameter]:
        return {"weight": self._weight} if self._bias is None else {"weight": self._weight, "bias": self._bias}

    def with_weight(self, weight: Any) -> Self:
        """Return a layer like this one, on its device, with another weight, stored like its own."""
        bias = None if self.bias is None else np.array(self._backend.to_host(self.bias))
        twin = type(self)(self._backend.to_host(weight), bias, activation=self.activation)
        twin._move(self._backend)
        return twin

    def diagnostics(self) -> dict[str, Any]:
        return describe_projection(self, {"activation": self.activation, "trainable": self.trainable})

    def _config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": self.dtype.name,
            "bias": self.bias is not None,
            "activation": self.activation,
            "trainable": self.trainable,
            "training": self.training,
        }

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        dtype, sizes = checks.check_dtype(config["dtype"]), (config["in_features"], config["out_features"])
        weight = take_tensor(tensors, "weight", dtype, sizes)
        bias = take_tensor(tensors, "bias", dtype, sizes[1:]) if config["bias"] else None
        layer = cls(weight.T if cls._transposed else weight, bias, activation=config["activation"])
        layer.trainable = checks.check_flag("trainable", config["trainable"])
        return layer.train() if config["training"] else layer.eval()

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
