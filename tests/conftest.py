"""What every test shares: tolerances, fixtures, the hypothesis profile."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("MPLBACKEND", "Agg")

settings.register_profile(
    "nblora",
    max_examples=40,
    deadline=None,  # the first example of a signature compiles
    derandomize=True,  # a failure today is the same failure tomorrow
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    print_blob=True,
)
settings.load_profile("nblora")


@pytest.fixture
def rng():
    """A generator with a fixed seed."""
    return np.random.default_rng(20240611)
