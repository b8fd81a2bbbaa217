"""Parameters: an array with its gradient and its rule; and access by name, in logical shapes, all or nothing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nblora import checks

if TYPE_CHECKING:
    from nblora.backends.protocol import Array, Backend


class Parameter:
    """One array of a layer, stored as the kernels want it, and what training knows of it.

    Its logical form, (in, out) for weights, is its transpose where `transposed`. A parameter that two layers hold is
    one parameter: moved, counted and updated once.

    Parameters
    ----------
    array : Array
    transposed : bool
        Whether `array` is stored the other way round.
    dense : bool
        A projection's weight: the sweep itself updates it where the optimiser's rule is plain descent.
    plus : bool
        Whether the faster learning rate of LoRA+ is meant for it.
    state : bool
        Never trained, kept for the training of another; a file may lack it.
    shared : bool
        Held by more than one layer (tied), so that its gradient is known only when all of them have gone back.
    velocity, momentum : Parameter and float, optional
        A parameter with a velocity V follows it, whatever the optimiser: V = m V + (1 - m) g, p -= lr V.
    updated : callable, optional
        Called after every update of the parameters that are trained together.

    Attributes
    ----------
    gradient : Array or None
        The one held since the last backward, stored like `array`.
    """

    __slots__ = (
        "array", "dense", "gradient", "momentum", "plus", "shared", "state", "transposed", "updated", "velocity",
    )  # fmt: skip

    def __init__(
        self,
        array: "Array",
        *,
        transposed: bool = False,
        dense: bool = False,
        plus: bool = False,
        state: bool = False,
        velocity: "Parameter | None" = None,
        momentum: float = 0.0,
    ) -> None:
        self.array, self.transposed, self.dense = array, transposed, dense
        self.plus, self.state, self.velocity, self.momentum = plus, state, velocity, momentum
        self.shared = False
        self.updated: Callable[[], None] | None = None
        self.gradient: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        shape: tuple[int, ...] = tuple(self.array.shape)
        return shape[::-1] if self.transposed else shape

    def logical(self, host: np.ndarray) -> np.ndarray:
        """A copy of an array stored like this one, in logical shape."""
        return np.array(host.T if self.transposed else host, order="C")

    def stored(self, logical: np.ndarray) -> np.ndarray:
        """An array of logical shape as it is stored."""
        return np.ascontiguousarray(logical.T if self.transposed else logical)


class Named(NamedTuple):
    """A parameter in a tree: its dotted name there, and whether it is trained there."""

    name: str
    parameter: Parameter
    trainable: bool

    @property
    def array(self) -> "Array":
        """As it is stored."""
        return self.parameter.array

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.parameter.shape


@dataclass(frozen=True)
class WeightValidation:
    """What `validate_weights` found."""

    matched: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shape_mismatches: list[str] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        """Whether every name matched, none is missing, and every shape is right."""
        return not (self.unmatched or self.missing or self.shape_mismatches)


@dataclass(frozen=True)
class WeightLoading:
    """What `load_weights` did."""

    success: bool
    loaded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    message: str = ""


class NamedParameters:
    """Access by name to what `_parameters()` lists, and as one vector to what `_trainable()` does."""

    _backend: "Backend"
    dtype: np.dtype

    def _parameters(self) -> Iterator[Named]:
        raise NotImplementedError

    def _trainable(self) -> Iterator[Named]:
        raise NotImplementedError

    def _find(self, name: str) -> Parameter:
        names = []
        for named in self._parameters():
            if named.name == name:
                return named.parameter
            names.append(named.name)
        raise KeyError(f"no parameter {name!r}; there are {', '.join(names)}")

    def parameter_names(self) -> list[str]:
        """Return the names of all parameters, trainable or not."""
        return [named.name for named in self._parameters()]

    @property
    def named_parameter_count(self) -> int:
        """The number of named parameters (of arrays, not of elements)."""
        return len(self.parameter_names())

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of a parameter; KeyError for an unknown name."""
        return self._find(name).shape

    def get_parameter(self, name: str) -> np.ndarray:
        """Return a copy of a parameter in its logical shape; KeyError for an unknown name."""
        return self._logical_copy(self._find(name))

    def set_parameter(self, name: str, value: Any) -> None:
        """Set a parameter, in place, from an array of its logical shape.

        Raises
        ------
        KeyError
            For an unknown name.
        ValueError
            For another shape; nothing is changed.
        """
        self._assign({name: value})

    def validate_weights(
        self, weights: Mapping[str, Any], mapping: Mapping[str, str] | None = None
    ) -> WeightValidation:
        """Compare `weights` (name -> array) with the parameters, changing nothing.

        `mapping` is {name in the file: parameter name}. `matched`, `missing` and `shape_mismatches` hold parameter
        names, `unmatched` the names in `weights` that no parameter has, or whose parameter an earlier one took. A
        missing `velocity` is never a fault.
        """
        known = {named.name: named.parameter for named in self._parameters()}
        result = WeightValidation()
        seen = set()
        for name, value, target in _items(weights, mapping):
            if target not in known or target in seen:
                result.unmatched.append(name)
                continue
            seen.add(target)
            if tuple(np.shape(value)) == known[target].shape:
                result.matched.append(target)
            else:
                result.shape_mismatches.append(target)
        result.missing.extend(n for n, p in known.items() if n not in seen and not p.state)
        return result

    def load_weights(
        self, weights: Mapping[str, Any], mapping: Mapping[str, str] | None = None, strict: bool = False
    ) -> WeightLoading:
        """Set parameters from `weights` (name -> array): all that match, or nothing where anything fails.

        An unknown name is skipped, under `strict=True` a fault; a wrong shape or kind is a fault; under `strict=True`
        a missing name is one too, a missing `velocity` never.

        Raises
        ------
        ValueError
            Under `strict=True`, listing every fault.
        """
        known = {named.name: named.parameter for named in self._parameters()}
        values: dict[str, Any] = {}
        skipped: list[str] = []
        faults: dict[str, str] = {}
        for name, value, target in _items(weights, mapping):
            if target not in known:
                if strict:
                    faults[name] = f"{name!r} is not a parameter ({', '.join(known)})"
                else:
                    skipped.append(name)
            elif target in values:
                faults[name] = f"{name!r} names {target!r} a second time"
            else:
                try:
                    self._checked(target, known[target], value)
                    values[target] = value
                except (TypeError, ValueError) as error:
                    faults[name] = str(error)
        if strict:
            for missing in self.validate_weights(weights, mapping).missing:
                faults[missing] = f"{missing!r} is missing"
        if faults:
            message = "nothing was loaded: " + "; ".join(faults.values())
            if strict:
                raise ValueError(message)
            return WeightLoading(False, [], skipped, list(faults), message)
        self._assign(values)
        message = f"loaded {len(values)} of {len(known)} parameters"
        if skipped:
            message += f"; skipped unknown names {', '.join(skipped)}"
        return WeightLoading(True, list(values), skipped, [], message)

    def _checked(self, name: str, parameter: Parameter, value: Any) -> np.ndarray:
        """`value` as a host array in the stored layout; ValueError for another shape."""
        array = checks.as_real(name, value)
        if array.shape != parameter.shape:
            raise ValueError(f"{name} must have shape {parameter.shape}, got {array.shape}")
        return parameter.stored(array).astype(self.dtype, copy=False)

    def _assign(self, values: Mapping[str, Any]) -> None:
        """Set several parameters, after all of them were found good."""
        targets = [(name, self._find(name), value) for name, value in values.items()]
        for name, parameter, _ in targets:
            checks.check_writeable(name, parameter.array)
        stored = [(parameter.array, self._checked(name, parameter, value)) for name, parameter, value in targets]
        hosts = [array for array, _ in stored if isinstance(array, np.ndarray)]
        if any(np.may_share_memory(value, array) for array in hosts for _, value in stored):
            stored = [(array, value.copy()) for array, value in stored]  # live views of the parameters themselves
        for array, value in stored:
            array[...] = self._backend.from_host(value)

    def _logical_copy(self, parameter: Parameter, array: "Array | None" = None) -> np.ndarray:
        """The parameter, or an array stored like it, as a new host array in logical shape."""
        return parameter.logical(self._backend.to_host(parameter.array if array is None else array))

    # --- as one vector -----------------------------------------------------------------------------------------

    @property
    def parameter_count(self) -> int:
        """The number of trainable parameters, counted as elements."""
        return sum(int(np.prod(named.shape)) for named in self._trainable())

    def get_parameters(self) -> np.ndarray:
        """Return all trainable parameters as one vector: a copy, each row-major in its logical shape."""
        return self._pack(self._logical_copy(named.parameter) for named in self._trainable())

    def set_parameters(self, vector: Any) -> None:
        """Set all trainable parameters, in place, from a vector packed as `get_parameters` packs them.

        Raises
        ------
        ValueError
            For a vector of another length; nothing is changed.
        """
        array = checks.as_real("parameters", vector)
        if array.shape != (self.parameter_count,):
            raise ValueError(f"parameters must have shape ({self.parameter_count},), got {array.shape}")
        values, start = {}, 0
        for name, parameter, _ in self._trainable():
            stop = start + int(np.prod(parameter.shape))
            values[name] = array[start:stop].reshape(parameter.shape)
            start = stop
        self._assign(values)

    def get_parameter_gradients(self) -> np.ndarray:
        """Return all gradients as one vector: a copy, packed as `get_parameters` packs the parameters.

        Raises
        ------
        RuntimeError
            Where there are no gradients.
        """
        return self._pack(self._logical_copy(p, p.gradient) for _, p, _ in self._with_gradients())

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        for _, parameter, _ in self._trainable():
            parameter.gradient = self._backend.zeros_like(parameter.array)

    def _with_gradients(self) -> list[Named]:
        """The trainable parameters, once each holds a gradient."""
        trainable = list(self._trainable())
        if any(named.parameter.gradient is None for named in trainable):
            raise RuntimeError("there are no gradients: call forward and backward first")
        return trainable

    def _check_writeable(self) -> None:
        """ValueError where a trainable parameter cannot be updated in place."""
        for named in self._trainable():
            checks.check_writeable(named.name, named.array)

    def _pack(self, arrays: Iterator[np.ndarray]) -> np.ndarray:
        vectors = [array.ravel() for array in arrays]
        return np.concatenate(vectors) if vectors else np.zeros(0, self.dtype)


def _items(weights: Any, mapping: Any) -> Iterator[tuple[str, Any, str]]:
    """Every name in `weights`, its array, and the name of the parameter that it means."""
    for argument, value in (("weights", weights), ("mapping", {} if mapping is None else mapping)):
        if not isinstance(value, Mapping):
            kind = "arrays" if argument == "weights" else "parameter names"
            raise TypeError(f"{argument} must be a mapping of names to {kind}, got {type(value).__name__}")
    return ((name, value, (mapping or {}).get(name, name)) for name, value in weights.items())
