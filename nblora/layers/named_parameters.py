"""Parameters by name: read, set, validate and load them, in logical shapes, all or nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nblora import checks

if TYPE_CHECKING:
    from nblora.backends.protocol import Array, Backend


class Parameter(NamedTuple):
    """One array of a layer.

    `array` is stored as the kernels want it; its logical form, (in, out) for weights, is its transpose where
    `transposed`. `trainable` parameters are packed by `get_parameters`. `optional` ones may be absent from a file.
    `momentum` ones follow their velocity, whatever the optimiser of the others. `swept` ones are updated by the
    backward sweep itself, by plain gradient descent.
    """

    name: str
    array: "Array"
    transposed: bool = False
    trainable: bool = True
    optional: bool = False
    momentum: bool = False
    swept: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        shape: tuple[int, ...] = tuple(self.array.shape)
        return shape[::-1] if self.transposed else shape


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
    """Access by name to what `_parameters()` lists."""

    _backend: "Backend"
    dtype: np.dtype

    def _parameters(self) -> Iterator[Parameter]:
        raise NotImplementedError  # every concrete layer lists its own

    def _find(self, name: str) -> Parameter:
        names = []
        for parameter in self._parameters():
            if parameter.name == name:
                return parameter
            names.append(parameter.name)
        raise KeyError(f"no parameter {name!r}; there are {', '.join(names)}")

    def parameter_names(self) -> list[str]:
        """Return the names of all parameters, trainable or not."""
        return [parameter.name for parameter in self._parameters()]

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
        known = {parameter.name: parameter for parameter in self._parameters()}
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
        result.missing.extend(n for n, p in known.items() if n not in seen and not p.optional)
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
        known = {parameter.name: parameter for parameter in self._parameters()}
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
                    self._checked(known[target], value)
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

    def _checked(self, parameter: Parameter, value: Any) -> np.ndarray:
        """`value` as a host array in the stored layout; ValueError for another shape."""
        array = checks.as_real(parameter.name, value)
        if array.shape != parameter.shape:
            raise ValueError(f"{parameter.name} must have shape {parameter.shape}, got {array.shape}")
        stored = array.T if parameter.transposed else array
        return np.ascontiguousarray(stored, dtype=self.dtype)

    def _assign(self, values: Mapping[str, Any]) -> None:
        """Set several parameters, after all of them were found good."""
        targets = [(self._find(name), value) for name, value in values.items()]
        for parameter, _ in targets:
            checks.check_writeable(parameter.name, parameter.array)
        stored = [(parameter.array, self._checked(parameter, value)) for parameter, value in targets]
        hosts = [array for array, _ in stored if isinstance(array, np.ndarray)]
        if any(np.may_share_memory(value, array) for array in hosts for _, value in stored):
            stored = [(array, value.copy()) for array, value in stored]  # live views of the parameters themselves
        for array, value in stored:
            array[...] = self._backend.from_host(value)

    def _logical_copy(self, parameter: Parameter) -> np.ndarray:
        host = self._backend.to_host(parameter.array)
        return np.array(host.T if parameter.transposed else host, order="C")


def _items(weights: Any, mapping: Any) -> Iterator[tuple[str, Any, str]]:
    """Every name in `weights`, its array, and the name of the parameter that it means."""
    for argument, value in (("weights", weights), ("mapping", {} if mapping is None else mapping)):
        if not isinstance(value, Mapping):
            kind = "arrays" if argument == "weights" else "parameter names"
            raise TypeError(f"{argument} must be a mapping of names to {kind}, got {type(value).__name__}")
    return ((name, value, (mapping or {}).get(name, name)) for name, value in weights.items())
