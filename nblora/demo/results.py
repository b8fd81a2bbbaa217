"""What the demo is asked for and what it measured, as plain data."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nblora._version import __version__

from .methods import Candidate


@dataclass(frozen=True)
class Settings:
    """What the user of `nblora demo` may choose; the defaults are the demo's.

    Attributes
    ----------
    output : Path
        Folder of everything that is written; made if need be.
    seeds : int
        Runs of each method, with seeds `seed`, `seed + 1`, ...
    seed : int
        Of everything that is drawn; the split and the noise are drawn from it alone.
    epochs, pretrain_epochs : int
        Sweeps over the adaptation split, and over the pretraining split.
    batch_size : int
        Samples of a step.
    device : str, optional
        As in `nblora.set_device`; None for the default device.
    tiny : bool
        One seed, two methods, one candidate each, three steps, a batch of images to judge by: to see that it runs.
    """

    output: Path = Path("nblora-demo")
    seeds: int = 5
    seed: int = 0
    epochs: int = 30
    pretrain_epochs: int = 30
    batch_size: int = 32
    device: str | None = None
    tiny: bool = False


@dataclass
class MethodResult:
    """One row of the table; accuracies are fractions, one a seed."""

    method: str
    test_accuracy: list[float] = field(default_factory=list)
    upright_accuracy: list[float] = field(default_factory=list)
    trainable_parameters: int = 0
    state_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    candidate: Candidate | None = None
    validation_accuracy: dict[str, float] = field(default_factory=dict)  # of each candidate, over the tuning seeds
    curves: list[list[dict[str, float]]] = field(default_factory=list)  # of each seed, a row an epoch
    merge_difference: float | None = None
    merge_relative_difference: float | None = None
    merge_changed_labels: int | None = None
    adapter_file: str | None = None


@dataclass
class NetworkResult:
    """What was measured on one network."""

    before: MethodResult
    methods: list[MethodResult]

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"not_adapted": _row_dict(self.before), "methods": [_row_dict(row) for row in self.methods]}


@dataclass
class DemoResult:
    """Everything that was measured: on the dense network, and on the convolutional one, None where it was left out."""

    settings: Settings
    machine: dict[str, Any]
    samples: dict[str, int]
    steps: int
    dense: NetworkResult
    convolutional: NetworkResult | None
    learned_delta: np.ndarray  # c D of the heat map's layer, (in, out), first seed
    seconds: float
    compiled: bool  # whether the seconds include compiling the kernels

    def as_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON can hold it."""
        settings = asdict(self.settings) | {"output": str(self.settings.output)}
        return {
            "nblora_version": __version__,
            "machine": self.machine,
            "settings": settings,
            "samples": self.samples,
            "steps": self.steps,
            "seconds": self.seconds,
            "compiled": self.compiled,
            **self.dense.as_dict(),
            "convolutional": None if self.convolutional is None else self.convolutional.as_dict(),
        }


def _row_dict(row: MethodResult) -> dict[str, Any]:
    candidate = None if row.candidate is None else row.candidate._asdict()
    return asdict(row) | {
        "candidate": candidate,
        "test_accuracy_mean": mean(row.test_accuracy),
        "test_accuracy_std": deviation(row.test_accuracy),
        "upright_accuracy_mean": mean(row.upright_accuracy),
        "upright_accuracy_std": deviation(row.upright_accuracy),
        "seconds_mean": mean(row.seconds) if row.seconds else None,
    }


def mean(values: list[float]) -> float:
    """The mean, as a plain float."""
    return float(np.mean(values))


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
