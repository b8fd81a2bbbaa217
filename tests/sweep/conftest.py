import numpy as np
import pytest

import nblora
from nblora.sweep import Data, Sweep

PLACE = ("seconds", "host", "process")  # what may differ between two executions of a run


def results_only(records):
    """Records without when and where they were made."""
    return [{name: value for name, value in record.items() if name not in PLACE} for record in records]


@pytest.fixture
def data(rng):
    """Three classes that a bent line separates."""
    x = rng.normal(size=(240, 6)).astype(np.float32)
    y = np.digitize(x[:, 0] * x[:, 1] + x[:, 2], [-0.5, 0.5])
    return Data(x[:120], y[:120], x[120:180], y[120:180], x[180:], y[180:])


@pytest.fixture
def base(rng):
    """A network with no zero in it."""
    return nblora.Sequential(
        {
            "hidden": nblora.FullyConnected.random(6, 8, activation="tanh", seed=1),
            "head": nblora.Dense.random(8, 3, seed=2),
        }
    )


@pytest.fixture
def sweep(data, base):
    """64 runs."""
    grid = {
        "method": ["head", "lora", "delta", "full"],
        "rank": [1, 2],
        "delta_scaling": [0.1, 0.5],
        "seed": list(range(8)),
    }
    return Sweep.grid(data, grid, {"epochs": 4, "lr": 0.01, "lora_dropout": 0.1}, base=base)
