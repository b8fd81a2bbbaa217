"""`ZiAdapter`: LoRA whose base moves by the change of the low-rank product in each step (Zi et al., 2023)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nblora import checks
from nblora.layers.base import Layer
from nblora.layers.low_rank import INITIALISERS
from nblora.layers.parameters import Parameter
from nblora.storage.checkpoint import take_tensor

from .base import Adapter, Beside


class ZiAdapter(Adapter):
    """The Delta-LoRA of Zi et al. (2023): A and B learn as in LoRA, and W follows the change of their product.

    y = act(x W + b + s (x A) B), and with each update after the first K, W += λ s (A' B' - A B): A, B before the update
    and A', B' after it (algorithm 1). W gets no gradient of its own, and the gradients of A and B are LoRA's.

    The sum of these steps telescopes: after any number of them W has moved by λ s (A B - A_K B_K). So W is never
    written: y = act(x W + b + s x ((1 + λ) A B - λ A_K B_K)), one fused step of rank 2r, and of rank r with K = 0,
    where A_0 B_0 = 0. What moves W is thereby the change of the factors since then, by whatever hand; factors that are
    set move it too. There is no dropout, which the paper leaves out: A B would not be what the step saw.

    Parameters
    ----------
    base_layer, rank, alpha, freeze_base_layer, use_rslora, init, seed
        As in `LoRAAdapter`, but for "pissa"; the base must be a layer with a weight of its own.
    update_ratio : float
        λ, positive and finite.
    start_step : int
        K: the updates after which W begins to move.

    Attributes
    ----------
    steps : int
        Updates so far, counted up to K.
    """

    method = "zi"
    around_models = False

    def __init__(
        self,
        base_layer: Layer,
        rank: int,
        alpha: float = -1.0,
        update_ratio: float = 0.5,
        start_step: int = 0,
        freeze_base_layer: bool = True,
        *,
        use_rslora: bool = False,
        init: str = "kaiming",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        checks.check_choice("init", init, INITIALISERS)
        rng = np.random.default_rng(seed)
        low_rank = self._new_low_rank(base_layer, rank, alpha, use_rslora, init, rng)
        zeros = (np.zeros(factor.shape, base_layer.dtype) for factor in (low_rank.A, low_rank.B))
        self._set_method(update_ratio, start_step, np.zeros(1, base_layer.dtype), *zeros)
        self._wrap(base_layer, low_rank, freeze_base_layer, 0.0, rng)

    def _set_method(self, update_ratio: Any, start_step: Any, steps: Any, A: Any, B: Any) -> None:
        """Take λ and K, the steps so far, and A_K and B_K, zeros until then."""
        self.update_ratio = checks.check_positive("update_ratio", update_ratio)
        self.start_step = checks.check_integer("start_step", start_step, 0)
        self._start = {}
        if self.start_step:
            arrays = {"steps": steps, "start_A": A, "start_B": B}
            self._start = {name: Parameter(array, state=True) for name, array in arrays.items()}

    @property
    def steps(self) -> int:
        """Updates so far, counted up to K."""
        return int(self._backend.to_host(self._start["steps"].array)[0]) if self._start else 0

    def _after_update(self) -> None:
        """Count it, and keep A_K and B_K when it was the K-th."""
        if self.steps < self.start_step:
            self._start["steps"].array[...] = self._backend.from_host(np.full(1, self.steps + 1, self.dtype))
            if self.steps == self.start_step:
                self._start["start_A"].array[...] = self.lora_layer.A
                self._start["start_B"].array[...] = self.lora_layer.B

    def _beside(self) -> Beside | None:
        if self.steps < self.start_step:
            return None
        if not self._start:
            return Beside(1 + self.update_ratio)
        start = self._start
        return Beside(1 + self.update_ratio, self.update_ratio, start["start_A"].array, start["start_B"].array)

    def _own_parameters(self) -> dict[str, Parameter]:
        return self._start

    def _method_config(self) -> dict[str, Any]:
        return {"update_ratio": self.update_ratio, "start_step": self.start_step}

    def _restore(self, base: Layer, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        rank = config["rank"]
        shapes = {"steps": (1,), "start_A": (base.in_features, rank), "start_B": (rank, base.out_features)}
        if not config["start_step"]:
            arrays = [np.zeros(shape, base.dtype) for shape in shapes.values()]
        else:
            arrays = [take_tensor(tensors, name, base.dtype, shape) for name, shape in shapes.items()]
        self._set_method(config["update_ratio"], config["start_step"], *arrays)
