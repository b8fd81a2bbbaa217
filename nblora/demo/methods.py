"""The two networks of the demo, and the four ways to adapt that it compares, each with what settings it may choose."""

from collections.abc import Callable
from typing import NamedTuple

from nblora import Conv2d, FullyConnected, Sequential
from nblora.layers.images import GlobalAvgPool2d

from .data import CLASSES, PIXELS

HIDDEN = 96
CHANNELS = 16, 48
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
    candidates: tuple[Candidate, ...]  # for the dense network
    fewer: tuple[Candidate, ...]  # for the convolutional one, whose runs take longer

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


def new_convolutional_network(seed: int) -> Sequential:
    """Make the untrained network of images: two hidden convolutions, 3 x 3, the mean over all places, ten classes."""
    first, second = CHANNELS
    return Sequential(
        {
            "hidden1": Conv2d.random(1, first, 3, activation="relu", seed=1000 * seed),
            "hidden2": Conv2d.random(first, second, 3, activation="relu", seed=1000 * seed + 1),
            "pool": GlobalAvgPool2d(second),
            "head": FullyConnected.random(second, CLASSES, seed=1000 * seed + 2),
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


# Six candidates each, three on the convolutional network. A delta's step moves the weight by delta_scaling² = 0.01
# times delta_lr, without AdamW's normalisation: its useful rates lie far above AdamW's.
_ADAMW = tuple(Candidate(lr) for lr in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05))
_DELTA = tuple(Candidate(lr, delta_lr) for lr in (0.001, 0.003) for delta_lr in (30.0, 100.0, 300.0))

_FEWER_ADAMW = tuple(Candidate(lr) for lr in (0.01, 0.02, 0.03))
_FEWER_DELTA = tuple(Candidate(0.02, delta_lr) for delta_lr in (3.0, 10.0, 30.0))

HEAD_ONLY = Method("Head only", _head_only, _ADAMW, tuple(Candidate(lr) for lr in (0.01, 0.02, 0.05)))
LORA = Method("LoRA", _lora, _ADAMW, _FEWER_ADAMW)
DELTA_LORA = Method("Delta-LoRA", _delta_lora, _DELTA, _FEWER_DELTA)
FULL = Method("Full", _full, _ADAMW, _FEWER_ADAMW)
METHODS = (HEAD_ONLY, LORA, DELTA_LORA, FULL)


class Network(NamedTuple):
    """One of the two: how it is made of a seed, and whether of convolutions, which take images."""

    name: str
    make: Callable[[int], Sequential]
    convolutional: bool

    @property
    def prefix(self) -> str:
        """What names of files begin with."""
        return "convolutional-" if self.convolutional else ""

    def candidates(self, method: Method) -> tuple[Candidate, ...]:
        """The settings that a method may choose from."""
        return method.fewer if self.convolutional else method.candidates


DENSE = Network("dense", new_network, False)
CONVOLUTIONAL = Network("convolutional", new_convolutional_network, True)
