"""`DoRAAdapter`: z = m (W + s A B) / ‖W + s A B‖, the magnitude of each output trained by itself (Liu et al., 2024)."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np

from nblora.backends.blocks import ReferenceBlocks
from nblora.backends.protocol import Array, Backend, Operands, Product
from nblora.layers.base import Layer
from nblora.layers.low_rank import LoRALayer
from nblora.layers.parameters import Parameter
from nblora.layers.projection import Targets
from nblora.storage.checkpoint import take_tensor

from .base import Adapter, Factors, check_base


class _Kept(NamedTuple):
    """What backward needs of a forward: p = x W + s (x A) B and what the product saved of it; with dropout the mask,
    the pre-activation z, and what was saved of the product of what was dropped."""

    p: Array
    saved: Any
    mask: Array | None
    z: Array | None
    saved_rest: Any


class _Gradients(NamedTuple):
    """As `protocol.Gradients`, and the magnitude's."""

    x: Array | None
    A: Array | None
    B: Array | None
    delta: Array | None
    weight: Array | None
    bias: Array | None
    magnitude: Array | None


class _Scaled:
    """The step of `product` with each output scaled: y = act(f∘p + b), p = x W + s (x A) B, f = m / norms.

    Gradients go through p and m; the norms count as constants. With dropout the adapter sees x' = mask∘x and the base
    what is left, as in PEFT: y = act(f∘p' + (x - x') W + b), p' of x'.
    """

    def __init__(self, product: Product, backend: Any, factor: Array, per_norm: Array, no_bias: Array) -> None:
        self._product, self._backend = product, backend
        self._factor, self._per_norm, self._no_bias = factor, per_norm, no_bias

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, _Kept | None]:
        """Compute y, and keep what backward needs where `keep`."""
        backend, inner, shift = self._backend, _inner(operands), self._shift(operands)
        if mask is None:
            p, saved = self._product.forward(x, inner, None, keep)
            y = backend.channels(p, self._factor, shift, operands.activation)
            return y, _Kept(p, saved, None, None, None) if keep else None
        dropped = backend.multiplied(x, mask)
        p, saved = self._product.forward(dropped, inner, None, keep)
        left = self._minus(x, dropped)
        rest, saved_rest = self._product.forward(left, inner._replace(low_rank=None), None, keep)
        z = backend.channels(p, self._factor, shift, 0)
        backend.add(z, rest)
        y = backend.pointwise(z, operands.activation) if operands.activation else z
        return y, _Kept(p, saved, mask, z, saved_rest) if keep else None

    def backward(self, grad_output: Array, saved: _Kept, operands: Operands, input_gradient: bool = True) -> _Gradients:
        """Every gradient, from the values as they are."""
        return self._back(grad_output, saved, operands, input_gradient, self._product.backward)

    def backward_update(
        self,
        grad_output: Array,
        saved: _Kept,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> _Gradients:
        """Backward, and the update of a trained base, in place."""
        if saved.mask is None:

            def sweep(gp: Array, kept: Any, inner: Operands, wanted: bool) -> Any:
                return self._product.backward_update(gp, kept, inner, lr, delta_lr, wanted)

            return self._back(grad_output, saved, operands, input_gradient, sweep)
        found = self.backward(grad_output, saved, operands, input_gradient)  # two products read the weight
        if found.weight is not None and operands.base is not None:
            self._backend.sgd_update(operands.base.weight, found.weight, lr)
        return found._replace(weight=None)

    def _back(self, grad: Array, saved: _Kept, operands: Operands, input_gradient: bool, back: Any) -> _Gradients:
        backend, inner, code, mask = self._backend, _inner(operands), operands.activation, saved.mask
        shift = self._shift(operands)
        if mask is not None and code:
            grad, code = backend.pointwise_gradient(grad, saved.z, code), 0
        gp, along, plain = backend.channels_gradient(grad, saved.p, self._factor, shift, code)
        found = back(gp, saved.saved, inner, input_gradient)
        gx, weight = found.x, found.weight
        if mask is not None:
            rest = back(grad, saved.saved_rest, inner._replace(low_rank=None), input_gradient)
            if gx is not None:
                gx = backend.multiplied(self._minus(gx, rest.x), mask)
                backend.add(gx, rest.x)
            if weight is not None:
                backend.add(weight, rest.weight)
        bias = plain if operands.train_base and operands.base is not None and operands.base.bias is not None else None
        return _Gradients(gx, found.A, found.B, None, weight, bias, backend.multiplied(along, self._per_norm))

    def _minus(self, x: Array, y: Array) -> Array:
        """x - y, a new array."""
        found = y.copy()
        self._backend.scale(found, -1.0)
        self._backend.add(found, x)
        return found

    def _shift(self, operands: Operands) -> Array:
        assert operands.base is not None  # whose outputs are scaled
        return self._no_bias if operands.base.bias is None else operands.base.bias


def _inner(operands: Operands) -> Operands:
    """What gives p: without the bias and the activation."""
    assert operands.base is not None  # whose outputs are scaled
    return operands._replace(base=operands.base._replace(bias=None), activation=0)


def _blocks(backend: Any) -> ReferenceBlocks:
    return cast(ReferenceBlocks, backend)


class DoRAAdapter(Adapter):
    """A base layer whose weight's direction has a low-rank change, and whose magnitude is trained by itself.

    y = act(x V + b) with V = m (W + s A B) / ‖W + s A B‖, the norm that of each output over its inputs (Liu et al.,
    2024, equation 5). As in the paper's section 4.3 and in PEFT, the norm counts as a constant in the gradients. A new
    adapter has m = ‖W‖, and computes what its base computes.

    The product x W + s (x A) B is the fused step of LoRA; scaling, bias and activation are one pass more over the
    outputs, and every forward computes the norms anew, on the CPU from W and Aᵀ W. Merge for inference.

    Parameters
    ----------
    base_layer, rank, alpha, freeze_base_layer, use_rslora, init, seed
        As in `LoRAAdapter`; the base must be a layer with a weight of its own.
    lora_dropout : float
        As in `LoRAAdapter`. As in PEFT the elements that are dropped reach the base unscaled by m.

    Attributes
    ----------
    magnitude : ndarray, shape (out_features,)
        Live view of m.
    """

    method = "dora"
    peft_fields: ClassVar[dict[str, Any]] = {"peft_type": "LORA", "use_dora": True}
    reads_peft = True
    around_models = False
    _joins_norm = False

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
        check_base(base_layer)
        rng = np.random.default_rng(seed)
        low_rank = self._new_low_rank(base_layer, rank, alpha, use_rslora, init, rng)
        operands: Operands = base_layer._operands()  # type: ignore[attr-defined]  # a projection
        self._magnitude = Parameter(_blocks(base_layer._backend).output_norms(operands))  # the change begins at zero
        self._wrap(base_layer, low_rank, freeze_base_layer, lora_dropout, rng)

    @property
    def magnitude(self) -> Array:
        """m as a live view, (out_features,)."""
        return self._magnitude.array

    def _product(self, backend: Backend) -> Product:
        product = super()._product(backend)
        if not self._enabled:
            return product
        factor, per_norm = self._factors(self._adapted())
        no_bias = self._backend.zeros_like(factor)
        return _Scaled(product, backend, factor, per_norm, no_bias)  # type: ignore[return-value]  # more gradients

    def _factors(self, operands: Operands) -> tuple[Array, Array]:
        """m and 1 by the norm of each output. One without any weight has no direction; it gives its bias, as the base
        does, and not NaN."""
        blocks = _blocks(self._backend)
        return blocks.per_norms(self._magnitude.array, blocks.output_norms(operands))

    def _targets(self) -> Targets:
        return (*super()._targets(), ("magnitude", self._magnitude)) if self._enabled else super()._targets()

    def _own_parameters(self) -> dict[str, Parameter]:
        return {**super()._own_parameters(), "magnitude": self._magnitude}

    def _change(self, operands: Operands) -> np.ndarray | None:
        weight = self.base_layer.get_parameter("weight").astype(np.float64)
        return self.merge_to_original_layer().get_parameter("weight") - weight

    def merge_to_original_layer(self) -> Layer:
        """Return a new layer of the base's class with the change folded in: W' = m (W + s A B) / ‖W + s A B‖, b' = b.

        The base is untouched and shares no memory with the new layer.
        """
        operands, backend = self._adapted(), self._backend
        factor, _ = self._factors(operands)
        merged, zeros = backend.merge(operands), backend.zeros_like(factor)
        turned = operands.base is not None and operands.base.transposed
        outputs_second = merged.reshape(1, *merged.shape) if turned else merged
        scaled = _blocks(backend).channels(outputs_second, factor, zeros, 0)
        return self.base_layer.with_weight(scaled.reshape(merged.shape))

    def as_factors(self, fold: int | None = None) -> Factors:
        return super().as_factors()._replace(magnitude=self.get_parameter("magnitude").astype(np.float64))

    @classmethod
    def _of_factors(cls, base_layer: Any, factors: Factors, use_rslora: bool) -> Self:
        A, B, magnitude = (
            np.ascontiguousarray(part, base_layer.dtype) for part in (factors.A, factors.B, factors.magnitude)
        )
        adapter = cls.__new__(cls, base_layer)
        adapter._magnitude = Parameter(magnitude)
        low_rank = LoRALayer.from_factors(A, B, factors.alpha, use_rslora=use_rslora)
        adapter._wrap(base_layer, low_rank, True, 0.0, None)
        return adapter

    def _restore(self, base: Layer, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        self._magnitude = Parameter(take_tensor(tensors, "magnitude", base.dtype, (base.out_features,)))
