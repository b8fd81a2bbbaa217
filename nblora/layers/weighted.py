"""`Weighted`: what layers with a weight of their own share, whatever their weight multiplies."""

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


class Weighted(Projection, abstract=True):
    """A projection with a weight and as a rule a bias: what adapters wrap, and what they can be merged into.

    The weight is held as a matrix, (out, in) where `_transposed`; a class shows and takes it in a shape of its own.
    """

    adaptable = True
    _transposed: ClassVar[bool]
    _bias: Parameter | None = None
    _activation = 0

    def _hold(self, matrix: np.ndarray, bias: Any = None, activation: str = "identity") -> None:
        """Begin life with a weight, stored, and what else was given."""
        self.dtype = matrix.dtype
        self._weight = Parameter(matrix, transposed=self._transposed, dense=True)
        self.in_features, self.out_features = self._weight.shape
        if bias is not None:
            self._bias = Parameter(checks.as_parameter("bias", bias, (self.out_features,), self.dtype))
        self._activation = activation_code(activation)
        self._open(default_backend())

    def _tie(self, other: "Weighted") -> None:
        """Take another layer's weight for its own, stored alike: one parameter from here on, of the other's name.

        A head that reads a table (count, features) as its weight is a `FullyConnected`.
        """
        parameter, own = other._weight, self._weight
        if parameter.array.shape != own.array.shape or parameter.array.dtype != own.array.dtype:
            raise ValueError(
                f"{self!r} cannot share the weight of {other!r}: stored, one is {own.array.shape} of "
                f"{own.array.dtype}, the other {parameter.array.shape} of {parameter.array.dtype}"
            )
        parameter.shared = True
        self._weight = parameter
        self._forget_forward()

    def _turns(self, parameter: Parameter) -> bool:
        return parameter is self._weight and parameter.transposed != self._transposed

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

    @classmethod
    def _made(cls, weight: np.ndarray, bias: np.ndarray | None, config: Mapping[str, Any]) -> Self:
        """A layer of a stored weight and of the settings in `config`."""
        raise NotImplementedError

    def with_weight(self, weight: Any) -> Self:
        """Return a layer like this one, on its device, with another weight, stored like its own, which it takes."""
        bias = None if self._bias is None else np.zeros(self.out_features, self.dtype)
        twin = self._made(np.empty(weight.shape, self.dtype), bias, self._config())
        twin._weight.array, twin._backend = weight, self._backend
        if self._bias is not None and twin._bias is not None:
            twin._bias.array = self._bias.array.copy()
        return twin

    def _settings(self) -> dict[str, Any]:
        """The constructor's settings."""
        return {"activation": self.activation}

    def diagnostics(self) -> dict[str, Any]:
        return describe_projection(self, {**self._settings(), "trainable": self.trainable})

    def _config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": self.dtype.name,
            "bias": self.bias is not None,
            **self._settings(),
            "trainable": self.trainable,
            "training": self.training,
        }

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        dtype, sizes = checks.check_dtype(config["dtype"]), (config["in_features"], config["out_features"])
        weight = take_tensor(tensors, "weight", dtype, sizes)
        bias = take_tensor(tensors, "bias", dtype, sizes[1:]) if config["bias"] else None
        layer = cls._made(weight.T if cls._transposed else weight, bias, config)
        layer.trainable = checks.check_flag("trainable", config["trainable"])
        return layer.train() if config["training"] else layer.eval()


def drawn(
    shape: tuple[int, ...], inputs: int, outputs: int, bias: bool, dtype: Any, seed: int | np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A weight of this shape and a bias, uniform in ±1/sqrt(inputs), as PyTorch draws them."""
    kind = checks.check_dtype(dtype)
    rng = np.random.default_rng(seed)
    bound = 1 / np.sqrt(inputs)
    weight = rng.uniform(-bound, bound, shape).astype(kind)
    return weight, rng.uniform(-bound, bound, outputs).astype(kind) if checks.check_flag("bias", bias) else None
