"""`MiSSAdapter`: z = x W + b + (Σ_k x_k) D, one matrix that all shards of the input share (Kang and Yin, 2024)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array, LowRank
from nblora.layers.base import Layer
from nblora.layers.low_rank import LoRALayer
from nblora.layers.parameters import Parameter
from nblora.layers.projection import Targets
from nblora.storage.checkpoint import take_tensor

from .base import Adapter, Factors, check_base


def _tiles(in_features: int, rank: int) -> np.ndarray:
    """A (in, rank): row i has its 1 in column i mod rank, so that x A adds the shards of x up."""
    return np.eye(rank)[np.arange(in_features) % rank]


class _Shards(LoRALayer, abstract=True):
    """A low-rank layer whose A is fixed, and made wherever it computes; s = 1."""

    def __init__(self, in_features: int, block: np.ndarray) -> None:
        rank, out_features = block.shape
        self.in_features, self.out_features, self.dtype = in_features, out_features, block.dtype
        self._scale(rank, float(rank), False)
        self._tiles: tuple[Any, Array] | None = None
        self._hold(np.zeros((0, rank), block.dtype), block)

    @property
    def A(self) -> Array:
        """The fixed factor, on the device of the block."""
        if self._tiles is None or self._tiles[0] is not self._backend:
            tiles = _tiles(self.in_features, self.rank).astype(self.dtype)
            self._tiles = self._backend, self._backend.from_host(tiles)
        return self._tiles[1]

    def as_operand(self) -> LowRank:
        return LowRank(self.A, self._B.array, self.scaling)

    def _targets(self) -> Targets:
        return (("B", self._B),)

    def _own_parameters(self) -> dict[str, Parameter]:
        return {"block": self._B}


class MiSSAdapter(Adapter):
    """A base layer plus one trained matrix that all shards of its input share (MiSS, Kang and Yin, 2024).

    y = act(x W + b + (Σ_k x_k) D): x is cut into shards x_k of `rank` numbers, the last filled up with zeros, and their
    sum multiplies `block` D (rank, out). That is LoRA with a fixed A, whose row i has its 1 in column i mod rank, and
    with s = 1: the fused step, less the gradient of A. D begins at zero.

    Parameters
    ----------
    base_layer, freeze_base_layer, lora_dropout
        As in `LoRAAdapter`.
    rank : int
        Rows of D, 1 <= rank <= min(in_features, out_features).
    seed : int or numpy.random.Generator, optional
        Of the dropout.

    Attributes
    ----------
    block : ndarray, shape (rank, out_features)
        Live view of D.
    """

    method = "miss"
    peft_fields: ClassVar[dict[str, Any]] = {"peft_type": "MISS"}
    reads_peft = True
    peft_parts: ClassVar[dict[str, str]] = {"miss_block": "B"}

    def __init__(
        self,
        base_layer: Layer,
        rank: int,
        freeze_base_layer: bool = True,
        *,
        lora_dropout: float = 0.0,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        check_base(base_layer)
        rank = checks.check_rank(rank, base_layer.in_features, base_layer.out_features)
        block = np.zeros((rank, base_layer.out_features), base_layer.dtype)
        self._wrap(base_layer, _Shards(base_layer.in_features, block), freeze_base_layer, lora_dropout, seed)

    @property
    def block(self) -> Array:
        """D as a live view, (rank, out_features)."""
        return self.lora_layer.B

    def as_factors(self, fold: int | None = None) -> Factors:
        block = self.get_parameter("block").astype(np.float64)
        return Factors(_tiles(self.in_features, self.rank), block, 1.0, self.alpha)

    @classmethod
    def _of_factors(cls, base_layer: Any, factors: Factors, use_rslora: bool) -> Self:
        adapter = cls.__new__(cls, base_layer)
        block = np.ascontiguousarray(factors.B, base_layer.dtype)
        adapter._wrap(base_layer, _Shards(base_layer.in_features, block), True, 0.0, None)
        return adapter

    def _saved_low_rank(self, base: Any, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> LoRALayer:
        rank = checks.check_integer("rank", config["rank"], 1)
        return _Shards(base.in_features, take_tensor(tensors, "block", base.dtype, (rank, base.out_features)))

    # --- PEFT's files --------------------------------------------------------------------------------------------

    @classmethod
    def fixed_factor(cls, in_features: int, rank: int) -> np.ndarray:
        return _tiles(in_features, rank)

    @classmethod
    def config_as_lora(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        init = config.get("init_weights", True)
        if not isinstance(init, bool):
            raise ValueError(
                f"init_weights is {init!r}, which stands for another arithmetic that nblora does not support"
            )
        if config.get("bias", "none") != "none":
            raise ValueError(f"bias is {config['bias']!r}; expected 'none' of a MiSS adapter")
        own = ("init_weights", "mini_r", "miss_dropout")
        rest = {field: value for field, value in config.items() if field not in own}
        return rest | {"lora_alpha": config.get("r", 64), "r": config.get("r", 64)}

    @classmethod
    def config_of_lora(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("rank_pattern"):
            raise ValueError(f"MiSS has one rank for all layers of a file, and these differ: {config['rank_pattern']}")
        lora = (
            "lora_alpha", "lora_dropout", "lora_bias", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
            "fan_in_fan_out", "init_lora_weights",
        )  # fmt: skip
        kept = {field: value for field, value in config.items() if field not in lora}
        dropout = config.get("lora_dropout", config.get("miss_dropout", 0.0))
        return {"init_weights": True, "mini_r": 1, **kept, "miss_dropout": dropout}
