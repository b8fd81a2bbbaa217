"""Initialisations that read the base's weight, one line each; those that only draw numbers are the low-rank layer's."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .pissa import principal_factors

Initialiser = Callable[[Any, int, float], tuple[np.ndarray, np.ndarray]]

OF_THE_BASE: dict[str, Initialiser] = {"pissa": principal_factors}
"""From a base layer, the rank and s to A (in, rank) and B (rank, out), whose product the change begins without."""
