"""`LoRALayer`: the low-rank map y = s (x A) B (Hu et al., 2021, equation 3)."""

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from nblora import checks
from nblora.backends import default_backend
from nblora.backends.protocol import Array, LowRank, Operands
from nblora.storage.checkpoint import take_tensor

from .diagnostics import describe_projection
from .parameters import Parameter
from .projection import Projection, Targets

INITIALISERS = ("kaiming", "gaussian")


class LoRALayer(Projection):
    """y = s (x A) B with s = alpha / rank: the low-rank correction alone, without a base.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the map.
    rank : int
        1 <= rank <= min(in_features, out_features).
    alpha : float
        Strength; negative means `rank`, so that s = 1.
    use_rslora : bool
        s = alpha / sqrt(rank) instead (Kalajdzievski, 2023).
    init : {"kaiming", "gaussian"}
        `A` uniform in ±1/sqrt(in_features), or normal with standard deviation 1/rank as in PEFT; `B` is zero.
    dtype : {"float32", "float64"}
        Of the factors.
    seed : int or numpy.random.Generator, optional
        Same seed, same layer, bit for bit.

    Attributes
    ----------
    A : ndarray, shape (in_features, rank)
    B : ndarray, shape (rank, out_features)
    rank, alpha, scaling, use_rslora
        `scaling` is s.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = -1.0,
        *,
        use_rslora: bool = False,
        init: str = "kaiming",
        dtype: Any = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.in_features = checks.check_integer("in_features", in_features, 1)
        self.out_features = checks.check_integer("out_features", out_features, 1)
        rank = checks.check_rank(rank, self.in_features, self.out_features)
        self._scale(rank, alpha, use_rslora)
        self.dtype = checks.check_dtype(dtype)
        rng = np.random.default_rng(seed)
        if checks.check_choice("init", init, INITIALISERS) == "kaiming":
            bound = 1 / math.sqrt(self.in_features)
            A = rng.uniform(-bound, bound, (self.in_features, rank))
        else:
            A = rng.normal(0.0, 1 / rank, (self.in_features, rank))
        self._hold(A.astype(self.dtype), np.zeros((rank, self.out_features), self.dtype))

    @classmethod
    def from_factors(cls, A: Any, B: Any, alpha: float = -1.0, *, use_rslora: bool = False) -> Self:
        """Make a layer of given factors, (in, rank) and (rank, out), whose rank may exceed min(in, out).

        They are taken over without a copy where they are float32 or float64 and C-contiguous.
        """
        layer = cls.__new__(cls)
        down = checks.as_parameter("A", A, (None, None))
        layer.dtype = down.dtype
        up = checks.as_parameter("B", B, (down.shape[1], None), layer.dtype)
        layer.in_features, layer.out_features = down.shape[0], up.shape[1]
        layer._scale(down.shape[1], alpha, use_rslora)
        layer._hold(down, up)
        return layer

    def _hold(self, A: np.ndarray, B: np.ndarray) -> None:
        self._A, self._B = Parameter(A), Parameter(B, plus=True)
        self._open(default_backend())

    def _scale(self, rank: int, alpha: float, use_rslora: bool) -> None:
        self.rank = rank
        self.alpha = checks.check_alpha(alpha, rank)
        self.use_rslora = checks.check_flag("use_rslora", use_rslora)
        self.scaling = self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def alpha_for(self, rank: int) -> float:
        """The alpha that gives s beside factors of another rank."""
        return self.scaling * (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def A(self) -> Array:
        """The factor that reads x."""
        return self._A.array

    @property
    def B(self) -> Array:
        """The factor that writes y."""
        return self._B.array

    def as_operand(self) -> LowRank:
        """Return the factors as a backend takes them."""
        return LowRank(self._A.array, self._B.array, self.scaling)

    def _operands(self) -> Operands:
        return Operands(None, self.as_operand(), None, 0, False)

    def _targets(self) -> Targets:
        return ("A", self._A), ("B", self._B)

    def _own_parameters(self) -> dict[str, Parameter]:
        return {"lora_A": self._A, "lora_B": self._B}

    def diagnostics(self) -> dict[str, Any]:
        return describe_projection(self, {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling})

    def _config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "dtype": self.dtype.name,
            "trainable": self.trainable,
            "training": self.training,
        }

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        dtype, rank = checks.check_dtype(config["dtype"]), config["rank"]
        A = take_tensor(tensors, "lora_A", dtype, (config["in_features"], rank))
        B = take_tensor(tensors, "lora_B", dtype, (rank, config["out_features"]))
        layer = cls.from_factors(A, B, config["alpha"], use_rslora=config["use_rslora"])
        layer.trainable = checks.check_flag("trainable", config["trainable"])
        return layer.train() if config["training"] else layer.eval()

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        return f"{type(self).__name__}({self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha:g})"
