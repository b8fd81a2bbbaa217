"""`LoRAAdapter`: z = x W + b + s (x A) B (Hu et al., 2021, equation 3)."""

from typing import Any, Self

import numpy as np

from nblora.layers.base import Layer
from nblora.layers.low_rank import LoRALayer

from .base import Adapter, Factors, check_base


class LoRAAdapter(Adapter):
    """A base layer plus a low-rank change: y = act(x W + b + s (x A) B), s = alpha / rank.

    Parameters
    ----------
    base_layer : Dense, FullyConnected or any other layer
        Kept by reference: `adapter.base_layer is base_layer`.
    rank : int
        1 <= rank <= min(in_features, out_features).
    alpha : float
        Strength of the low-rank part; negative means `rank`, so that s = 1.
    freeze_base_layer : bool
        Leave the base as it is, or train it too.
    use_rslora : bool
        s = alpha / sqrt(rank) (Kalajdzievski, 2023).
    init : {"kaiming", "gaussian", "pissa"}
        How `A` is drawn; `B` is zero, so a new adapter computes what its base computes. "pissa" begins at the weight's
        principal singular values and takes that part off the base's (Meng et al., 2024): y = act(x (W - s A0 B0) + b +
        s (x A) B), A0 and B0 what A and B were at first; without `lora_dropout`.
    lora_dropout : float
        In training mode, the probability in [0, 1) with which each element of x on its way into the low-rank path is
        dropped; the others are scaled by 1/(1 - lora_dropout).
    seed : int or numpy.random.Generator, optional
        Of `A` and of the dropout. Same seed, same adapter, bit for bit.

    Raises
    ------
    TypeError
        For an argument of the wrong kind, such as `base_layer=None`.
    ValueError
        For a value out of its range.
    """

    method = "lora"
    reads_peft = True

    def __init__(
        self,
        base_layer: Layer,
        rank: int,
        alpha: float = -1.0,
        freeze_base_layer: bool = True,
        *,
        use_rslora: bool = False,
        init: str = "kaiming",
        lora_dropout: float = 0.0,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        low_rank = self._new_low_rank(base_layer, rank, alpha, use_rslora, init, rng)
        self._wrap(base_layer, low_rank, freeze_base_layer, lora_dropout, rng)

    @classmethod
    def from_factors(cls, base_layer: Layer, A: Any, B: Any, alpha: float = -1.0, *, use_rslora: bool = False) -> Self:
        """Make an adapter of given factors, (in, rank) and (rank, out), whose rank may exceed min(in, out)."""
        check_base(base_layer)
        adapter = cls.__new__(cls, base_layer)
        low_rank = LoRALayer.from_factors(A, B, alpha, use_rslora=use_rslora)
        adapter._wrap(base_layer, low_rank, True, 0.0, None)
        return adapter

    @classmethod
    def _of_factors(cls, base_layer: Layer, factors: Factors, use_rslora: bool) -> Self:
        A, B = (np.ascontiguousarray(factor, base_layer.dtype) for factor in (factors.A, factors.B))
        return cls.from_factors(base_layer, A, B, factors.alpha, use_rslora=use_rslora)
