"""PiSSA: factors that begin at the principal singular values of the base's weight (Meng et al., 2024)."""

from typing import Any

import numpy as np

from nblora.linalg import best_product


def principal_factors(base_layer: Any, rank: int, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """A (in, rank) and B (rank, out) with s A B the best approximation of the weight of this rank, as in PEFT.

    With W = U Σ V, A = U √(Σ / s) and B = √(Σ / s) V of the largest singular values.

    Raises
    ------
    ValueError
        For a weight that is not finite.
    """
    weight = base_layer.get_parameter("weight").astype(np.float64)
    if not np.isfinite(weight).all():
        raise ValueError("base_layer's weight holds values that are not finite: init='pissa' needs its singular values")
    A, B, _ = best_product(weight / scaling, rank)
    return A, B
