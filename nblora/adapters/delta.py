"""`DeltaLoRAAdapter`: z = x W + b + s (x A) B + c (x D), the dense D trained with momentum."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array, Delta
from nblora.layers.base import Layer
from nblora.layers.parameters import Parameter
from nblora.layers.projection import Targets
from nblora.linalg import best_product
from nblora.storage.checkpoint import take_tensor

from .base import Adapter, Factors


class DeltaLoRAAdapter(Adapter):
    """A base layer plus a low-rank change plus a dense one: y = act(x W + b + s (x A) B + c (x D)).

    The dense `delta` D follows its velocity: V = m V + (1 - m) dD, D -= lr V. It is as large as the base's weight, so
    this adapter trains more parameters than the base holds. It is not the Delta-LoRA of Zi et al. (2023), which
    updates the base weight by the change of A B; it follows AiDotNet's `DeltaLoRAAdapter`.

    Parameters
    ----------
    base_layer, rank, alpha, freeze_base_layer, use_rslora, init, lora_dropout, seed
        As in `LoRAAdapter`.
    delta_scaling : float
        c, positive and finite: how strongly the delta acts. 0.01 is conservative, 0.5 aggressive. A step of the delta
        moves the layer's weight by c² lr times the velocity of its gradient.
    momentum_factor : float
        m in [0, 1): how much the velocity remembers.

    Attributes
    ----------
    delta, velocity : ndarray, shape (in_features, out_features)
        Live views of D and V; `get_current_delta` returns a copy.
    """

    method = "delta"
    trained_by = ("delta_lr",)

    def __init__(
        self,
        base_layer: Layer,
        rank: int,
        alpha: float = -1.0,
        delta_scaling: float = 0.1,
        momentum_factor: float = 0.9,
        freeze_base_layer: bool = True,
        *,
        use_rslora: bool = False,
        init: str = "kaiming",
        lora_dropout: float = 0.0,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        low_rank = self._new_low_rank(base_layer, rank, alpha, use_rslora, init, rng)
        zeros = (np.zeros((base_layer.in_features, base_layer.out_features), base_layer.dtype) for _ in range(2))
        self._set_method(base_layer, delta_scaling, momentum_factor, *zeros)
        self._wrap(base_layer, low_rank, freeze_base_layer, lora_dropout, rng)

    def _set_method(self, base: Layer, delta_scaling: Any, momentum_factor: Any, delta: Any, velocity: Any) -> None:
        """Take D and V, of logical shapes and stored like the base's weight, and how they act."""
        self.delta_scaling = checks.check_positive("delta_scaling", delta_scaling)
        momentum = checks.check_fraction("momentum_factor", momentum_factor)
        turned = base.adaptable and base._operands().base.transposed  # type: ignore[attr-defined]  # a projection
        self._velocity = Parameter(
            np.ascontiguousarray(velocity.T) if turned else velocity, transposed=turned, state=True
        )
        self._delta = Parameter(
            np.ascontiguousarray(delta.T) if turned else delta,
            transposed=turned,
            velocity=self._velocity,
            momentum=momentum,
        )

    @property
    def momentum_factor(self) -> float:
        """m."""
        return self._delta.momentum

    @momentum_factor.setter
    def momentum_factor(self, value: float) -> None:
        self._delta.momentum = checks.check_fraction("momentum_factor", value)

    @property
    def delta(self) -> Array:
        """D as a live view, (in_features, out_features)."""
        return self._delta.array.T if self._delta.transposed else self._delta.array

    @property
    def velocity(self) -> Array:
        """V as a live view, (in_features, out_features)."""
        return self._velocity.array.T if self._velocity.transposed else self._velocity.array

    def get_current_delta(self) -> np.ndarray:
        """Return a copy of D, (in_features, out_features)."""
        return self.get_parameter("delta")

    def reset_state(self, include_delta: bool = False) -> None:
        """Clear the cached input, the gradients and the velocity; with `include_delta=True` zero the delta too."""
        checks.check_flag("include_delta", include_delta)
        super().reset_state()
        if include_delta:
            self._delta.array[...] = 0

    def _reset_own_state(self) -> None:
        super()._reset_own_state()
        self._velocity.array[...] = 0

    def as_factors(self, fold: int | None = None) -> Factors:
        plain = super().as_factors()
        delta = self.delta_scaling * self.get_parameter("delta").astype(np.float64)
        norm = float(np.linalg.norm(delta))
        if fold is None:
            return plain._replace(dense_norm=norm, dense_error=1.0 if norm else 0.0)
        checks.check_integer("fold_delta", fold, 1, min(delta.shape))
        if not np.isfinite(norm):
            raise ValueError("the delta holds values that are not finite and cannot be folded")
        P, Q, error = best_product(delta / self.scaling, fold)
        A, B = np.concatenate([plain.A, P], axis=1), np.concatenate([plain.B, Q])
        return Factors(A, B, self.scaling, self.lora_layer.alpha_for(A.shape[1]), None, norm, error)

    def _delta_operand(self) -> Delta | None:
        return Delta(self._delta.array, self._velocity.array, self.delta_scaling, self._delta.momentum)

    def _targets(self) -> Targets:
        return (*super()._targets(), ("delta", self._delta))

    def _own_parameters(self) -> dict[str, Parameter]:
        return {**super()._own_parameters(), "delta": self._delta, "velocity": self._velocity}

    def _method_config(self) -> dict[str, Any]:
        return {"delta_scaling": self.delta_scaling, "momentum_factor": self.momentum_factor}

    def _restore(self, base: Layer, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        shape = base.in_features, base.out_features
        state = (take_tensor(tensors, name, base.dtype, shape) for name in ("delta", "velocity"))
        self._set_method(base, config["delta_scaling"], config["momentum_factor"], *state)
