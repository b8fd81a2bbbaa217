"""`DeltaLoRAAdapter`: z = x W + b + s (x A) B + c (x D), the dense D trained with momentum."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Base, Delta
from nblora.layers.base import Layer
from nblora.layers.named_parameters import Parameter
from nblora.storage.checkpoint import take_tensor

from .base import Adapter


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
    _own_arrays = ("_delta", "_velocity")

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
        self._wrap(base_layer, low_rank, freeze_base_layer, lora_dropout, rng)
        self._set_method(delta_scaling, momentum_factor)
        shape = self.base_layer.weight.shape if self._fused else (self.in_features, self.out_features)
        self._delta, self._velocity = (self._backend.from_host(np.zeros(shape, self.dtype)) for _ in range(2))

    def _set_method(self, delta_scaling: Any, momentum_factor: Any) -> None:
        self.delta_scaling = checks.check_positive("delta_scaling", delta_scaling)
        self.momentum_factor = checks.check_fraction("momentum_factor", momentum_factor)

    @property
    def _transposed(self) -> bool:
        """Whether D and V are stored as (out, in): like the base's weight."""
        return self._fused and self.base_layer._transposed

    @property
    def delta(self) -> np.ndarray:
        """D as a live view, (in_features, out_features)."""
        return self._delta.T if self._transposed else self._delta

    @property
    def velocity(self) -> np.ndarray:
        """V as a live view, (in_features, out_features)."""
        return self._velocity.T if self._transposed else self._velocity

    def get_current_delta(self) -> np.ndarray:
        """Return a copy of D, (in_features, out_features)."""
        return self.get_parameter("delta")

    def reset_state(self, include_delta: bool = False) -> None:
        """Clear the cached input, the gradients and the velocity; with `include_delta=True` zero the delta too."""
        checks.check_flag("include_delta", include_delta)
        super().reset_state()
        self._velocity[...] = 0
        if include_delta:
            self._delta[...] = 0

    def _delta_operand(self) -> Delta | None:
        return Delta(self._delta, self._velocity, self.delta_scaling, self.momentum_factor)

    def _stand_in_base(self) -> Base | None:
        return Base(self._backend.zeros_like(self._delta), None, False)

    def _own_parameters(self) -> Iterator[Parameter]:
        yield from super()._own_parameters()
        transposed = self._transposed
        yield Parameter("delta", self._delta, transposed, momentum=True)
        yield Parameter("velocity", self._velocity, transposed, trainable=False, optional=True)

    def _apply_momentum(self, lr: float) -> None:
        super()._apply_momentum(lr)
        gradient = (self._gradients or {}).get("delta")
        if gradient is not None:
            self._backend.momentum_update(self._delta, self._velocity, gradient, self.momentum_factor, lr)

    def _method_config(self) -> dict[str, Any]:
        return {"delta_scaling": self.delta_scaling, "momentum_factor": self.momentum_factor}

    def _restore(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        self._set_method(config["delta_scaling"], config["momentum_factor"])
        shape = self.in_features, self.out_features
        delta, velocity = (take_tensor(tensors, name, self.dtype, shape) for name in ("delta", "velocity"))
        stored = (np.ascontiguousarray(array.T if self._transposed else array) for array in (delta, velocity))
        self._delta, self._velocity = map(self._backend.from_host, stored)
