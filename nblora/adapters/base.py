"""`Adapter`: what every adapter does around its base layer, whichever method it follows."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np

from nblora import checks
from nblora.backends.blocks import ReferenceBlocks
from nblora.backends.protocol import Array, Backend, Base, Delta, Gradients, LowRank, Operands, Product
from nblora.layers.base import Layer, layer_from_state
from nblora.layers.diagnostics import describe_projection
from nblora.layers.low_rank import INITIALISERS, LoRALayer
from nblora.layers.parameters import Parameter
from nblora.layers.projection import Projection, Targets
from nblora.layers.run import Run
from nblora.storage.checkpoint import take_tensor

from .initialisers import OF_THE_BASE


class Factors(NamedTuple):
    """A change as files of PEFT's format hold it, in float64: s A B, A (in, rank), B (rank, out), with the `alpha` that
    s follows from; `magnitude` (out,) where outputs are scaled to it; and of a dense change its norm and the share that
    the factors lack."""

    A: np.ndarray
    B: np.ndarray
    scaling: float
    alpha: float
    magnitude: np.ndarray | None = None
    dense_norm: float = 0.0
    dense_error: float = 0.0


class Beside(NamedTuple):
    """What stands beside the trained factors: the change is s (gain A B - share A0 B0), A0 (in, rank) and B0 (rank,
    out), None where their product is zero. No gradient goes through the gain, nor through A0 B0."""

    gain: float = 1.0
    share: float = 0.0
    A: Array | None = None
    B: Array | None = None


class Adapter(Projection, abstract=True):
    """A base layer plus a trained change of it, in one fused computation on the pre-activation.

    Only operands make an adapter different from its base: `_operands` is its forward. A base that is no single product
    (a model, another adapter) gets an `AroundModel` of the same class and name. What commands, estimators and files
    want to know of a method they ask its class.

    Attributes
    ----------
    method : str
        Its name.
    peft_fields : dict
        What PEFT's configuration says of its files.
    reads_peft : bool
        Whether such files are read as this method, by `_of_factors`.
    peft_parts : dict
        Of a method with tensors of its own in such files: what each of them is, a field of `Factors`. "A" is then made
        by `fixed_factor`, which no file holds.
    around_models : bool
        Whether it has a meaning around what has no weight of its own.
    trained_by : tuple of str
        Settings of `nblora.fit` that are this method's alone.
    """

    method: ClassVar[str]
    peft_fields: ClassVar[dict[str, Any]] = {"peft_type": "LORA"}
    reads_peft: ClassVar[bool] = False
    peft_parts: ClassVar[dict[str, str]] = {}
    around_models: ClassVar[bool] = True
    trained_by: ClassVar[tuple[str, ...]] = ()
    # A and B as they began, where the change begins without them.
    _initial: Mapping[str, Parameter] = MappingProxyType({})
    _rng: np.random.Generator

    def __new__(cls, base_layer: Any = None, *arguments: Any, **settings: Any) -> Self:
        if isinstance(base_layer, Layer) and not base_layer.adaptable:
            if not cls.around_models:
                raise ValueError(
                    f"base_layer must be a layer with a weight of its own, which {cls.__name__} reads, got a "
                    f"{type(base_layer).__name__}: adapt the layers in it (model.adapt)"
                )
            return super().__new__(around_model(cls))  # type: ignore[return-value, arg-type]  # a subclass of cls
        return super().__new__(cls)

    def _wrap(self, base_layer: Any, lora_layer: LoRALayer, freeze: bool, lora_dropout: float, rng: Any) -> None:
        """Begin life around `base_layer`, all arguments checked but the base."""
        self.base_layer = base_layer
        self.lora_layer = lora_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.dtype = base_layer.dtype
        self.is_base_layer_frozen = checks.check_flag("freeze_base_layer", freeze)
        self.lora_dropout = checks.check_fraction("lora_dropout", lora_dropout)
        if self._initial and self.lora_dropout:
            raise ValueError(
                "lora_dropout must be 0 with an init that reads the base's weight, of which a part would be dropped, "
                f"got {lora_dropout}"
            )
        self._rng = _saveable(np.random.default_rng(rng))
        lora_layer._B.updated = self._after_update
        self._enabled = True
        self._open(base_layer._backend)

    def _new_low_rank(
        self, base_layer: Any, rank: int, alpha: float, use_rslora: bool, init: str, rng: np.random.Generator
    ) -> LoRALayer:
        """A fresh low-rank layer for `base_layer`, drawn from `rng`, or made of the base's weight.

        What is made of the weight is taken off again, by the same factors beside the trained ones: the base is never
        written, and a new adapter computes what it computes.
        """
        check_base(base_layer)
        sizes, dtype = (base_layer.in_features, base_layer.out_features), base_layer.dtype
        drawn = checks.check_choice("init", init, (*INITIALISERS, *OF_THE_BASE)) in INITIALISERS
        how = init if drawn else INITIALISERS[0]
        low_rank = LoRALayer(*sizes, rank, alpha, use_rslora=use_rslora, init=how, dtype=dtype, seed=rng)
        if drawn:
            return low_rank
        if not base_layer.adaptable:
            raise ValueError(
                f"init={init!r} reads a weight, which a {type(base_layer).__name__} has not: adapt the layers in it"
            )
        A, B = (np.ascontiguousarray(f, dtype) for f in OF_THE_BASE[init](base_layer, rank, low_rank.scaling))
        self._begin_at(A.copy(), B.copy())
        return LoRALayer.from_factors(A, B, alpha, use_rslora=use_rslora)

    def _begin_at(self, A: np.ndarray, B: np.ndarray) -> None:
        self._initial = {"start_A": Parameter(A, state=True), "start_B": Parameter(B, state=True)}

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """Names of what its constructor takes beside the base, the rank, whether the base is trained, and the seed."""
        of_all = ("self", "base_layer", "rank", "freeze_base_layer", "seed")
        return tuple(name for name in inspect.signature(cls.__init__).parameters if name not in of_all)

    # --- the tree ----------------------------------------------------------------------------------------------

    def children(self) -> dict[str, Layer]:
        return {"base": self.base_layer, "": self.lora_layer}  # the factors are named as the adapter's own

    def _own_parameters(self) -> dict[str, Parameter]:
        return dict(self._initial)

    def _freezes(self, child: str) -> bool:
        return not self.trainable or (child == "base" and self.is_base_layer_frozen)

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

    @property
    def _takes(self) -> int | None:
        return self.base_layer._takes

    @property
    def _gives(self) -> int | None:
        return self.base_layer._gives

    def _product(self, backend: Backend) -> Product:
        return self.base_layer._product(backend)

    def _batch(self, x: Array) -> Array:
        return self.base_layer._batch(x)

    def _grad_batch(self, grad: Array) -> Array:
        return self.base_layer._grad_batch(grad)

    def _as_input(self, name: str, value: Any) -> Array:
        return self.base_layer._as_input(name, value)

    def _as_output(self, name: str, value: Any) -> Array:
        return self.base_layer._as_output(name, value)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.base_layer._output_shape(name, shape)

    def _axes(self) -> tuple[int | str, ...]:
        return self.base_layer._axes()

    def _example(self, samples: int) -> np.ndarray:
        return self.base_layer._example(samples)

    def _delta_operand(self) -> Delta | None:
        """The delta as a backend takes it; None for methods without one."""
        return None

    def _after_update(self) -> None:
        """Told after every update of what is trained with the factors."""

    def _beside(self) -> Beside | None:
        """What stands beside the trained factors; None where nothing does."""
        start = self._initial
        return Beside(1.0, 1.0, start["start_A"].array, start["start_B"].array) if start else None

    def _low_rank_operand(self) -> LowRank:
        """The factors as a backend takes them, those that are not trained to the right of and below the others."""
        own, beside, backend = self.lora_layer.as_operand(), self._beside(), self._backend
        if beside is None:
            return own
        B = own.B
        if beside.gain != 1:
            B = B.copy()
            backend.scale(B, beside.gain)
        if beside.A is None or beside.B is None:
            return LowRank(own.A, B, own.scaling)
        fixed = beside.B.copy()
        backend.scale(fixed, -beside.share)
        A = cast(ReferenceBlocks, backend).join_columns([own.A, beside.A])
        return LowRank(A, _stacked(backend, B, fixed), own.scaling)

    def _gradients_of(self, gradients: Gradients) -> list[tuple[Parameter, Array | None]]:
        found, beside = super()._gradients_of(gradients), self._beside()
        if beside is None or gradients.A is None or gradients.B is None:
            return found
        backend, low_rank = self._backend, self.lora_layer
        A, B = gradients.A, gradients.B
        if beside.A is not None:
            A, B = cast(ReferenceBlocks, backend).split_columns(A, 2)[0], B[: self.rank]
        if beside.gain != 1:
            backend.scale(A, 1 / beside.gain)  # the product reads gain·B, and the rule B
        own = {low_rank._A: A, low_rank._B: B}
        return [(parameter, own.get(parameter, gradient)) for parameter, gradient in found]

    def _base_operands(self) -> Operands:
        """What the base computes with."""
        return self.base_layer._operands()

    def _trains_base(self) -> bool:
        """Whether gradients of the base come from the adapter's own computation."""
        return not self.is_base_layer_frozen

    def _operands(self) -> Operands:
        return self._adapted() if self._enabled else self._base_operands()._replace(train_base=self._trains_base())

    def _adapted(self) -> Operands:
        """What the adapter computes with where it is not disabled, and is merged from."""
        base = self._base_operands()
        low_rank, delta = self._low_rank_operand(), self._delta_operand()
        return Operands(base.base, low_rank, delta, base.activation, self._trains_base())

    def _targets(self) -> Targets:
        base = self.base_layer._targets() if self._trains_base() else ()
        return (*base, *self.lora_layer._targets())

    def _dropout_mask(self, batch: Array) -> Array | None:
        if self.lora_dropout == 0 or not (self._enabled and self._training and self.base_layer._droppable):
            return None
        return self._backend.dropout_mask(self._rng, batch.shape, self.lora_dropout, self.dtype)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Compute the base layer alone inside the `with` block."""
        before, self._enabled = self._enabled, False
        try:
            yield self
        finally:
            if not self._closed:
                self._enabled = before

    # --- merging, describing, keeping --------------------------------------------------------------------------

    def merge_to_original_layer(self) -> Layer:
        """Return a new layer of the base's class with the change folded in: W' = W + s A B + c D, b' = b.

        The base is untouched and shares no memory with the new layer.

        Raises
        ------
        RuntimeError
            For a base without a weight of its own, such as a model.
        """
        return self.base_layer.with_weight(self._backend.merge(self._adapted()))

    def as_factors(self, fold: int | None = None) -> Factors:
        """Return the change as files of PEFT's format hold it.

        Parameters
        ----------
        fold : int, optional
            Rank of the approximation of a dense change that the factors end with; without, they lack it.
        """
        A, B = (self.get_parameter(factor).astype(np.float64) for factor in ("lora_A", "lora_B"))
        beside = self._beside()
        if beside is None:
            return Factors(A, B, self.scaling, self.alpha)
        B = beside.gain * B
        if beside.A is not None and beside.B is not None:
            fetch = self._backend.to_host
            A, B = np.hstack([A, fetch(beside.A)]), np.vstack([B, -beside.share * fetch(beside.B).astype(np.float64)])
        return Factors(A, B, self.scaling, self.lora_layer.alpha_for(A.shape[1]))

    @classmethod
    def fixed_factor(cls, in_features: int, rank: int) -> np.ndarray:
        """Return A (in, rank) of a method that does not train it, in float64."""
        raise NotImplementedError  # asked of methods with `peft_parts` alone

    @classmethod
    def config_as_lora(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what PEFT's configuration of the method means, in the fields of LoRA's.

        Raises
        ------
        ValueError
            For a field that asks for what the method does not compute here.
        """
        return dict(config)

    @classmethod
    def config_of_lora(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the method's own configuration of one in the fields of LoRA's."""
        return dict(config)

    @classmethod
    def _of_factors(cls, base_layer: Any, factors: Factors, use_rslora: bool) -> "Adapter":
        """An adapter of what a file holds."""
        raise NotImplementedError  # asked of methods with `reads_peft` alone

    def diagnostics(self) -> dict[str, Any]:
        extra = {
            "base_type": type(self.base_layer).__name__,
            "is_base_layer_frozen": self.is_base_layer_frozen,
            "rank": self.rank,
            "alpha": self.alpha,
            "scaling": self.scaling,
            "lora_dropout": self.lora_dropout,
        }
        return describe_projection(self, extra | self._method_config())

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
            **({"begun_at": sorted(self._initial)} if self._initial else {}),
            **self._method_config(),
        }

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        of_base = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
        base = layer_from_state(config["base"]["kind"], config["base"]["config"], of_base)
        check_base(base)
        return cls._on_base(base, config, tensors)

    @classmethod
    def _on_base(cls, base: Any, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        """An adapter of a saved state around a base layer."""
        adapter = cls.__new__(cls, base)
        low_rank = adapter._saved_low_rank(base, config, tensors)
        if config.get("begun_at"):
            shapes = {"start_A": low_rank.A.shape, "start_B": low_rank.B.shape}
            adapter._begin_at(*(take_tensor(tensors, name, base.dtype, shape) for name, shape in shapes.items()))
        adapter._restore(base, config, tensors)
        adapter._wrap(base, low_rank, config["freeze_base_layer"], config["lora_dropout"], _generator(config))
        adapter._training = checks.check_flag("training", config["training"])
        return adapter

    def _saved_low_rank(self, base: Any, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> LoRALayer:
        """The low-rank layer of a saved state."""
        rank = checks.check_integer("rank", config["rank"], 1)
        A = take_tensor(tensors, "lora_A", base.dtype, (base.in_features, rank))
        B = take_tensor(tensors, "lora_B", base.dtype, (rank, base.out_features))
        return LoRALayer.from_factors(A, B, config["alpha"], use_rslora=config["use_rslora"])

    def _restore(self, base: Layer, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        """Take what only this method has from a saved state, before it is wrapped around `base`."""

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        return f"{type(self).__name__}({self.base_layer!r}, rank={self.rank}, alpha={self.alpha:g})"


class AroundModel(Adapter, abstract=True):
    """An adapter whose base computes by itself: y = base(x) + s (x A) B + c (x D), the change added to its output."""

    def _parts(self) -> dict[str, Layer]:
        return {"base": self.base_layer}

    def _base_operands(self) -> Operands:
        delta = self._delta_operand()  # which is computed only on top of a weight
        base = None if delta is None else Base(self._backend.zeros_like(delta.delta), None, False)
        return Operands(base, None, None, 0, False)

    def _trains_base(self) -> bool:
        return False  # it goes back by itself

    def _product(self, backend: Backend) -> Product:
        return backend

    def _batch(self, x: Array) -> Array:
        return checks.as_rows(x)

    def _grad_batch(self, grad: Array) -> Array:
        return checks.as_rows(grad)

    def _forward(self, x: Array, run: Run) -> Array:
        live, frozen = run.live, run.frozen
        run.frozen = frozen or self.is_base_layer_frozen
        y = self.base_layer._forward(x, run)
        run.frozen, below, run.live = frozen, run.live, live
        if self._enabled:
            run.backend.add(y, super()._forward(x, run))
        elif run.training:
            run.keep(self, None)
        run.live = run.live or below
        return y

    def _backward(self, grad: Array, run: Run) -> Array | None:
        own = super()._backward(grad, run)
        below = self.base_layer._backward(grad, run)
        if own is None or below is None:
            return below if own is None else own
        run.backend.add(below, own)
        return below

    def merge_to_original_layer(self) -> Layer:
        raise RuntimeError(
            "only layers like Dense and FullyConnected, convolutions and embeddings, with one weight of their own, "
            "can take a merged one, and the base is a "
            f"{type(self.base_layer).__name__}: merge that one first and wrap what comes back"
        )


@functools.cache
def around_model(cls: type[Adapter]) -> type[Adapter]:
    """The class `cls` for bases that compute by themselves, of the same name."""
    if issubclass(cls, AroundModel):
        return cls
    return type(cls.__name__, (AroundModel, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}, abstract=True)


def _stacked(backend: Backend, first: Array, second: Array) -> Array:
    """Two matrices of as many columns one below the other."""
    whole = backend.empty((len(first) + len(second), first.shape[1]), first.dtype)
    whole[: len(first)] = first
    whole[len(first) :] = second
    return whole


def check_base(base_layer: Any) -> None:
    """TypeError for what is no layer; RuntimeError for a closed one."""
    if not isinstance(base_layer, Layer):
        raise TypeError(
            f"base_layer must be a layer such as nblora.Dense or nblora.FullyConnected, got "
            f"{'None' if base_layer is None else type(base_layer).__name__}"
        )
    base_layer._require_open()
    axes = base_layer._axes()
    if not base_layer.adaptable and not (len(axes) == 2 and isinstance(axes[1], int)):
        raise ValueError(
            f"base_layer, a {type(base_layer).__name__}, takes no rows of features, which an adapter around a whole "
            "model multiplies: adapt the layers in it (model.adapt)"
        )


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
