"""What the estimators share."""

from typing import Any

import numpy as np


def draw_seed(random: Any) -> int:
    """A seed from a RandomState."""
    return int(random.randint(np.iinfo(np.int32).max))
