"""What `diagnostics` reports. Everything in float64, and NaN in gives NaN out, never an error."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nblora.linalg import frobenius_norm, stable_rank

if TYPE_CHECKING:
    from .projection import Projection


def describe_sizes(layer: Any) -> dict[str, Any]:
    """What every description begins with: the kind of a layer, its sizes, and where it is."""
    return {
        "type": type(layer).__name__,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "dtype": layer.dtype.name,
        "device": layer.device,
        "parameter_count": layer.parameter_count,
    }


def describe_projection(layer: "Projection", extra: Mapping[str, Any]) -> dict[str, Any]:
    """A flat dict of type, sizes, counts, norms and non-finite values of one layer; `extra` follows its sizes."""
    named = list(layer._parameters())
    arrays = [layer._backend.to_host(p.array) for p in named]
    result = describe_sizes(layer) | dict(extra)
    operands = layer._operands()
    with np.errstate(all="ignore"):
        if operands.base is not None:
            result["weight_norm"] = frobenius_norm(operands.base.weight)
        if operands.low_rank is not None:
            A, B = (_float64(layer, a) for a in operands.low_rank[:2])
            result["low_rank_norm"] = operands.low_rank.scaling * _product_norm(A, B)
            if operands.delta is not None:
                delta = _float64(layer, operands.delta.delta)
                result["delta_norm"] = operands.delta.scaling * frobenius_norm(delta)
                result["velocity_norm"] = frobenius_norm(_float64(layer, operands.delta.velocity))
            change = layer._change(operands)
            result["stable_rank"] = stable_rank(np.zeros((1, 1)) if change is None else change)
        for name, parameter, _ in named:
            if parameter.gradient is not None:
                result[f"gradient_norm.{name}"] = frobenius_norm(layer._backend.to_host(parameter.gradient))
    result["non_finite_count"] = sum(map(count_non_finite, arrays))
    return result


def describe_own(layer: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A flat dict of one layer that is no product: type, sizes, counts, norms of its parameters and gradients."""
    result = describe_sizes(layer) | dict(extra)
    arrays = {name: layer._backend.to_host(parameter.array) for name, parameter in layer._own_parameters().items()}
    with np.errstate(all="ignore"):
        for name, parameter in layer._own_parameters().items():
            result[f"{name}_norm"] = frobenius_norm(arrays[name].reshape(1, -1))
            if parameter.gradient is not None:
                held = layer._backend.to_host(parameter.gradient)
                result[f"gradient_norm.{name}"] = frobenius_norm(held.reshape(1, -1))
    result["non_finite_count"] = sum(map(count_non_finite, arrays.values()))
    return result


def count_non_finite(array: np.ndarray) -> int:
    """The number of NaN and infinite values."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def _product_norm(A: np.ndarray, B: np.ndarray) -> float:
    """‖A B‖_F from the rank x rank Gram matrices: ‖A B‖²_F = Σ (AᵀA)∘(B Bᵀ)."""
    return float(np.sqrt(np.maximum(np.sum((A.T @ A) * (B @ B.T)), 0.0)))


def _float64(layer: "Projection", array: Any) -> np.ndarray:
    return np.asarray(layer._backend.to_host(array), np.float64)
