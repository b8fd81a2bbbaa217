"""`LayerNorm` and `RMSNorm`: rows brought to mean 0 and variance 1, or to a mean square of 1."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np

from nblora import checks
from nblora.backends import default_backend
from nblora.backends.blocks import ReferenceBlocks
from nblora.backends.protocol import Array
from nblora.storage.checkpoint import take_tensor

from .base import Layer
from .diagnostics import describe_own
from .parameters import Parameter
from .run import Run


class _Kept(NamedTuple):
    """What backward needs of a forward: rows, their mean and gain, the input's shape, and what is wanted."""

    rows: Array
    stats: Array
    shape: tuple[int, ...]
    wanted: tuple[bool, bool]


class Norm(Layer, abstract=True):
    """What `LayerNorm` and `RMSNorm` share."""

    _centred: ClassVar[bool]
    _bias: Parameter | None = None

    def _hold(self, weight: Any, bias: Any, eps: float) -> None:
        stored = checks.as_parameter("weight", weight, (None,))
        self.dtype, self.in_features, self.out_features = stored.dtype, len(stored), len(stored)
        self.eps = checks.check_not_negative("eps", eps)
        self._weight = Parameter(stored)
        if bias is not None:
            self._bias = Parameter(checks.as_parameter("bias", bias, (len(stored),), self.dtype))
        self._open(default_backend())

    @property
    def weight(self) -> Array:
        """The factor of each feature."""
        return self._weight.array

    def _own_parameters(self) -> dict[str, Parameter]:
        return {"weight": self._weight} if self._bias is None else {"weight": self._weight, "bias": self._bias}

    def _forward(self, x: Array, run: Run) -> Array:
        rows, bias = checks.as_rows(x), None if self._bias is None else self._bias.array
        backend = cast(ReferenceBlocks, run.backend)
        y, stats = backend.norm(rows, self._weight.array, bias, self.eps, self._centred)
        if run.training:
            wanted = run.live, self.trainable and not run.frozen
            run.keep(self, _Kept(rows, stats, x.shape, wanted) if any(wanted) else None)
            run.live = any(wanted)
        run.passed(self, y)
        return y if rows is x else y.reshape(x.shape)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept: _Kept | None = run.recall(self)
        if kept is None:
            return None
        rows, weight = checks.as_rows(grad), self._weight.array
        backend = cast(ReferenceBlocks, run.backend)
        gx, gw, gb = backend.norm_gradient(rows, kept.rows, kept.stats, weight, self._centred, kept.wanted)
        if kept.wanted[1]:
            run.sink.put(self._weight, gw, run)
            if self._bias is not None:
                run.sink.put(self._bias, gb, run)
        return gx if gx is None or len(kept.shape) == 2 else gx.reshape(kept.shape)

    def diagnostics(self) -> dict[str, Any]:
        return describe_own(self, {"eps": self.eps, "trainable": self.trainable})

    def _config(self) -> dict[str, Any]:
        return {
            "features": self.in_features,
            "dtype": self.dtype.name,
            "bias": self._bias is not None,
            "eps": self.eps,
            "trainable": self.trainable,
            "training": self.training,
        }

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        dtype, shape = checks.check_dtype(config["dtype"]), (config["features"],)
        layer = cls.__new__(cls)
        weight = take_tensor(tensors, "weight", dtype, shape)
        layer._hold(weight, take_tensor(tensors, "bias", dtype, shape) if config["bias"] else None, config["eps"])
        layer.trainable = checks.check_flag("trainable", config["trainable"])
        return layer.train() if config["training"] else layer.eval()

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        return f"{type(self).__name__}({self.in_features}, eps={self.eps:g})"


class LayerNorm(Norm):
    """y = (x - mean) / √(variance + eps)·weight + bias over the last axis, as `torch.nn.LayerNorm`.

    Parameters
    ----------
    weight : array_like, shape (features,)
        Taken over without a copy where it is float32 or float64 and C-contiguous; lists, integers and float16
        become float32.
    bias : array_like, shape (features,), optional
    eps : float

    Attributes
    ----------
    weight, bias : ndarray
        `bias` is None where there is none.
    eps : float
    trainable : bool
        As for `Dense`.
    """

    _centred = True

    def __init__(self, weight: Any, bias: Any = None, *, eps: float = 1e-5) -> None:
        self._hold(weight, bias, eps)

    @classmethod
    def random(cls, features: int, *, bias: bool = True, eps: float = 1e-5, dtype: Any = "float32") -> Self:
        """Make a layer as `torch.nn.LayerNorm` begins: weight one, bias zero. Nothing is drawn."""
        count, kind = checks.check_integer("features", features, 1), checks.check_dtype(dtype)
        return cls(np.ones(count, kind), np.zeros(count, kind) if checks.check_flag("bias", bias) else None, eps=eps)

    @property
    def bias(self) -> Array | None:
        """What is added to each feature, None where there is nothing."""
        return None if self._bias is None else self._bias.array


class RMSNorm(Norm):
    """y = x / √(mean of x² + eps)·weight over the last axis, as `torch.nn.RMSNorm`.

    Parameters
    ----------
    weight : array_like, shape (features,)
        As for `LayerNorm`.
    eps : float

    Attributes
    ----------
    weight : ndarray
    eps : float
    trainable : bool
        As for `Dense`.
    """

    _centred = False

    def __init__(self, weight: Any, *, eps: float = 1e-6) -> None:
        self._hold(weight, None, eps)

    @classmethod
    def random(cls, features: int, *, eps: float = 1e-6, dtype: Any = "float32") -> Self:
        """Make a layer as `torch.nn.RMSNorm` begins: weight one. Nothing is drawn."""
        return cls(np.ones(checks.check_integer("features", features, 1), checks.check_dtype(dtype)), eps=eps)
