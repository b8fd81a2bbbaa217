"""`Adapter`: what every adapter does around its base layer, whichever method it follows."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from nblora import checks
from nblora.backends.protocol import Base, Delta, Gradients, Operands
from nblora.layers.base import Layer, layer_from_state
from nblora.layers.dense import Dense
from nblora.layers.diagnostics import describe_linear
from nblora.layers.linear import Linear
from nblora.layers.low_rank import LoRALayer
from nblora.layers.named_parameters import Parameter
from nblora.storage.checkpoint import take_tensor
from nblora.storage.onnx_graph import OnnxGraph


class Adapter(Linear, abstract=True):
    """A base layer plus a trained change of it.

    On a `Dense` or `FullyConnected` base everything is one fused computation on the pre-activation. Any other base
    (a model, another adapter) is computed by itself and the change is added to its output.
    """

    method: ClassVar[str]
    _own_arrays: ClassVar[tuple[str, ...]] = ()

    def _wrap(self, base_layer: Any, lora_layer: LoRALayer, freeze: bool, lora_dropout: float, rng: Any) -> None:
        """Begin life around `base_layer`, all arguments checked but the base."""
        self.base_layer = base_layer
        self.lora_layer = lora_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.dtype = base_layer.dtype
        self.is_base_layer_frozen = checks.check_flag("freeze_base_layer", freeze)
        self.lora_dropout = checks.check_fraction("lora_dropout", lora_dropout)
        self._rng = _saveable(np.random.default_rng(rng))
        self._enabled = True
        self._fused = isinstance(base_layer, Dense)
        lora_layer._move(base_layer._backend)
        self._open(base_layer._backend)

    def _new_low_rank(
        self, base_layer: Any, rank: int, alpha: float, use_rslora: bool, init: str, rng: np.random.Generator
    ) -> LoRALayer:
        """A fresh low-rank layer for `base_layer`, drawn from `rng`."""
        check_base(base_layer)
        sizes = base_layer.in_features, base_layer.out_features
        return LoRALayer(*sizes, rank, alpha, use_rslora=use_rslora, init=init, dtype=base_layer.dtype, seed=rng)

    # --- the low-rank part -------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Rank of the low-rank factors."""
        return self.lora_layer.rank

    @property
    def alpha(self) -> float:
        """Strength of the low-rank part before it is divided by the rank."""
        return self.lora_layer.alpha

    @property
    def scaling(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.lora_layer.scaling

    # --- computing ---------------------------------------------------------------------------------------------

    def _delta_operand(self) -> Delta | None:
        """The delta as a backend takes it; None for methods without one."""
        return None

    def _operands(self) -> Operands:
        base = self.base_layer.as_operand() if self._fused else self._stand_in_base()
        code = self.base_layer._activation if self._fused else 0
        train_base = self._fused and not self.is_base_layer_frozen
        if not self._enabled:
            return Operands(base, None, None, code, train_base)
        return Operands(base, self.lora_layer.as_operand(), self._delta_operand(), code, train_base)

    def _stand_in_base(self) -> Base | None:
        """What the change is computed on where the base computes by itself."""
        return None

    def _dropout_mask(self, rows: np.ndarray) -> Any:
        if self.lora_dropout == 0 or not self._enabled:
            return None
        kept = self._rng.random(rows.shape, self.dtype) >= self.lora_dropout
        return self._backend.from_host(kept * self.dtype.type(1 / (1 - self.lora_dropout)))

    def forward(self, x: Any) -> np.ndarray:
        if self._fused:
            return super().forward(x)
        samples, on_device = self._enter("x", x, self.in_features)
        y = self.base_layer.forward(samples)
        if self._enabled:
            self._backend.add(y, super().forward(samples))
        elif self._training:
            self._saved = None
        return self._leave(y, on_device)

    def backward(self, grad_output: Any, accumulate: bool = False) -> np.ndarray:
        if self._fused:
            return super().backward(grad_output, accumulate)
        self._require_forward()
        if self._saved is None and not self._enabled:
            grad_input = self.base_layer.backward(grad_output, accumulate)
            if self._gradients is None or not accumulate:
                self._gradients = {p.name: self._backend.zeros_like(p.array) for p in self._own_trainable()}
            return grad_input
        grad, on_device = self._enter("grad_output", grad_output, self.out_features)
        own = super().backward(grad, accumulate)
        grad_input = self.base_layer.backward(grad, accumulate)
        self._backend.add(grad_input, own)
        return self._leave(grad_input, on_device)

    def backward_update(self, grad_output: Any, lr: float) -> np.ndarray:
        if self._enabled:
            return super().backward_update(grad_output, lr)
        checks.check_not_negative("lr", lr)
        grad_input = self.backward(grad_output)
        self.update_parameters(lr)
        self._forget_gradients()
        return grad_input

    def _sweep(self, grad_output: Any, lr: float, delta_lr: float) -> np.ndarray:
        if self._fused:
            return super()._sweep(grad_output, lr, delta_lr)
        self._require_forward()
        grad, on_device = self._enter("grad_output", grad_output, self.out_features)
        if self.is_base_layer_frozen:
            grad_input = self.base_layer.backward(grad)
            self.base_layer._forget_forward()
        else:
            grad_input = self.base_layer._sweep(grad, lr, delta_lr)
        self._backend.add(grad_input, super()._sweep(grad, lr, delta_lr))
        return self._leave(grad_input, on_device)

    def _require_forward(self) -> None:
        if self._fused or self._enabled:
            super()._require_forward()
        if not self._fused:
            self.base_layer._require_forward()

    def _forget_forward(self) -> None:
        super()._forget_forward()
        if not self._fused:
            self.base_layer._forget_forward()

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        if not self._fused:
            self.base_layer._forget_gradients()

    def _generators(self) -> dict[str, np.random.Generator]:
        own = {"": self._rng}
        return own if self._fused else own | {f"base.{name}": g for name, g in self.base_layer._generators().items()}

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Compute the base layer alone inside the `with` block."""
        before, self._enabled = self._enabled, False
        try:
            yield self
        finally:
            if not self._closed:
                self._enabled = before

    # --- parameters and gradients ------------------------------------------------------------------------------

    def _own_parameters(self) -> Iterator[Parameter]:
        """What the adapter adds to its base."""
        yield from self.lora_layer._parameters()

    def _trainable(self) -> Iterator[Parameter]:
        # To walk through a frozen base and name its parameters anew took a tenth of a tiny step.
        return self._own_trainable() if self.is_base_layer_frozen else super()._trainable()

    def _own_trainable(self) -> Iterator[Parameter]:
        return (parameter for parameter in self._own_parameters() if parameter.trainable)

    def _parameters(self) -> Iterator[Parameter]:
        for parameter in self.base_layer._parameters():
            trainable = not self.is_base_layer_frozen and (parameter.trainable or self._fused)
            if parameter.optional:
                trainable = False
            yield parameter._replace(name=f"base.{parameter.name}", trainable=trainable)
        yield from self._own_parameters()

    def _named_gradients(self, gradients: Gradients) -> Iterator[tuple[str, Any]]:
        yield "base.weight", gradients.weight
        yield "base.bias", gradients.bias
        named = {"lora_A": gradients.A, "lora_B": gradients.B, "delta": gradients.delta}
        if self._saved is not None and self._saved[2].low_rank is None:  # the forward ran disabled
            named = {p.name: self._backend.zeros_like(p.array) for p in self._own_trainable()}
        yield from named.items()

    def _held_gradients(self) -> dict[str, Any]:
        held = super()._held_gradients()
        if self._fused or self.is_base_layer_frozen:
            return held
        return held | {f"base.{name}": g for name, g in self.base_layer._held_gradients().items()}

    def _apply_momentum(self, lr: float) -> None:
        if not (self._fused or self.is_base_layer_frozen):
            self.base_layer._apply_momentum(lr)

    def zero_gradients(self) -> None:
        if self._fused:
            super().zero_gradients()
            return
        self._gradients = {p.name: self._backend.zeros_like(p.array) for p in self._own_trainable()}
        self.base_layer.zero_gradients()

    # --- modes -------------------------------------------------------------------------------------------------

    def train(self) -> Self:
        if not self._fused:
            self.base_layer.train()
        return super().train()

    def eval(self) -> Self:
        if not self._fused:
            self.base_layer.eval()
        return super().eval()

    def reset_state(self) -> None:
        if not self._fused:
            self.base_layer.reset_state()
        super().reset_state()

    def _pieces(self, frozen: bool) -> Iterator[tuple[Layer, tuple[str, ...], tuple[str, ...]]]:
        yield from self.base_layer._pieces(frozen or self.is_base_layer_frozen)
        yield from self.lora_layer._pieces(frozen)
        yield self, self._own_arrays, ()

    # --- merging, describing, keeping --------------------------------------------------------------------------

    def merge_to_original_layer(self) -> Dense:
        """Return a new layer of the base's class with the change folded in: W' = W + s A B + c D, b' = b.

        The base is untouched and shares no memory with the new layer.

        Raises
        ------
        RuntimeError
            For a base that is neither `Dense` nor `FullyConnected`.
        """
        base = self.base_layer
        if not isinstance(base, Dense):
            raise RuntimeError(
                f"only Dense and FullyConnected layers can take a merged weight, and the base is a "
                f"{type(base).__name__}: merge that one first and wrap what comes back"
            )
        operands = Operands(base.as_operand(), self.lora_layer.as_operand(), self._delta_operand(), 0, False)
        weight = self._backend.to_host(self._backend.merge(operands))
        bias = None if base.bias is None else np.array(self._backend.to_host(base.bias))
        merged = type(base)(weight, bias, activation=base.activation)
        merged._move(self._backend)
        return merged

    def diagnostics(self) -> dict[str, Any]:
        extra = {
            "base_type": type(self.base_layer).__name__,
            "is_base_layer_frozen": self.is_base_layer_frozen,
            "rank": self.rank,
            "alpha": self.alpha,
            "scaling": self.scaling,
            "lora_dropout": self.lora_dropout,
        }
        return describe_linear(self, extra | self._method_config())

    def _onnx_operands(self) -> Operands:
        operands = self._operands()
        return operands if self._fused else operands._replace(base=None)  # that one adds itself

    def _add_to_onnx(self, graph: OnnxGraph, x: str) -> str:
        if self._fused:
            return super()._add_to_onnx(graph, x)
        y = self.base_layer._add_to_onnx(graph, x)
        return graph.node("Add", y, super()._add_to_onnx(graph, x)) if self._enabled else y

    def _method_config(self) -> dict[str, Any]:
        """The settings that only this method has."""
        return {}

    def _config(self) -> dict[str, Any]:
        return {
            "base": {"kind": type(self.base_layer).__name__, "config": self.base_layer._config()},
            "rank": self.rank,
            "alpha": self.alpha,
            "use_rslora": self.lora_layer.use_rslora,
            "freeze_base_layer": self.is_base_layer_frozen,
            "lora_dropout": self.lora_dropout,
            "random_state": self._rng.bit_generator.state,
            "training": self.training,
            **self._method_config(),
        }

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        of_base = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
        base = layer_from_state(config["base"]["kind"], config["base"]["config"], of_base)
        check_base(base)
        rank = checks.check_integer("rank", config["rank"], 1)
        A = take_tensor(tensors, "lora_A", base.dtype, (base.in_features, rank))
        B = take_tensor(tensors, "lora_B", base.dtype, (rank, base.out_features))
        adapter = cls.__new__(cls)
        low_rank = LoRALayer.from_factors(A, B, config["alpha"], use_rslora=config["use_rslora"])
        adapter._wrap(base, low_rank, config["freeze_base_layer"], config["lora_dropout"], _generator(config))
        adapter._restore(config, tensors)
        return adapter.train() if config["training"] else adapter.eval()

    def _restore(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        """Take what only this method has from a saved state."""

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        return f"{type(self).__name__}({self.base_layer!r}, rank={self.rank}, alpha={self.alpha:g})"


def check_base(base_layer: Any) -> None:
    """TypeError for what is no layer; RuntimeError for a closed one."""
    if not isinstance(base_layer, Layer):
        raise TypeError(
            f"base_layer must be a layer such as nblora.Dense or nblora.FullyConnected, got "
            f"{'None' if base_layer is None else type(base_layer).__name__}"
        )
    base_layer._require_open()


def _saveable(rng: np.random.Generator) -> np.random.Generator:
    """`rng` itself where its state can be saved as that of a PCG64, else a PCG64 seeded from it."""
    if isinstance(rng.bit_generator, np.random.PCG64):
        return rng
    return np.random.default_rng(rng.integers(2**63))


def _generator(config: Mapping[str, Any]) -> np.random.Generator:
    state = config["random_state"]
    bits = np.random.PCG64(0)
    bits.state = state
    return np.random.Generator(bits)
