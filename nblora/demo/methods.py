"""The four ways to adapt that the demo compares, each with the settings it may choose from."""

from collections.abc import Callable
from typing import NamedTuple

from nblora import FullyConnected, Sequential

from .data import CLASSES, PIXELS

HIDDEN = 96
RANK = 8


class Candidate(NamedTuple):
    """Learning rates: AdamW's, and the delta's own where there is a delta."""

    lr: float
    delta_lr: float | None = None

    @property
    def label(self) -> str:
        """`lr=0.003` or `lr=0.003 delta_lr=30`."""
        return " ".join(f"{name}={value:g}" for name, value in self._asdict().items() if value is not None)


class Method(NamedTuple):
    """One way to adapt: `prepare(model, seed)` makes trainable, in place, what the method trains."""

    name: str
    prepare: Callable[[Sequential, int], None]
    candidates: tuple[Candidate, ...]

    @property
    def slug(self) -> str:
        """The name as files carry it."""
        return self.name.lower().replace(" ", "-")


def new_network(seed: int) -> Sequential:
    """Make the untrained network: 64 pixels, two hidden layers of 96, ten classes; weights stored (out, in)."""
    sizes = {"hidden1": (PIXELS, HIDDEN), "hidden2": (HIDDEN, HIDDEN), "head": (HIDDEN, CLASSES)}
    return Sequential(
        {
            name: FullyConnected.random(
                *size, activation="identity" if name == "head" else "relu", seed=1000 * seed + place
            )
            for place, (name, size) in enumerate(sizes.items())
        }
    )


def _head_only(model: Sequential, seed: int) -> None:
    for name, layer in model.named_layers():
        layer.trainable = name == "head"


def _lora(model: Sequential, seed: int) -> None:
    model.adapt("hidden*", "lora", rank=RANK, modules_to_save="head", seed=seed)


def _delta_lora(model: Sequential, seed: int) -> None:
    model.adapt("hidden*", "delta", rank=RANK, modules_to_save="head", seed=seed)


def _full(model: Sequential, seed: int) -> None:
    """Everything is trainable from the start."""


# Six candidates each. A delta's step moves the weight by delta_scaling² = 0.01 times delta_lr, without AdamW's
# normalisation: its useful rates lie far above AdamW's.
_ADAMW = tuple(Candidate(lr) for lr in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05))
_DELTA = tuple(Candidate(lr, delta_lr) for lr in (0.001, 0.003) for delta_lr in (30.0, 100.0, 300.0))

HEAD_ONLY = Method("Head only", _head_only, _ADAMW)
LORA = Method("LoRA", _lora, _ADAMW)
DELTA_LORA = Method("Delta-LoRA", _delta_lora, _DELTA)
FULL = Method("Full", _full, _ADAMW)
METHODS = (HEAD_ONLY, LORA, DELTA_LORA, FULL)
