"""`Run`: one forward and its backward, and what the layers keep in between."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nblora.backends.protocol import Backend, Operands, Product, Saved


class Kept(NamedTuple):
    """What a projection keeps of a forward: what its backend saved, the input's shape, the operands it computed with,
    and by what, whether the input's gradient is wanted (`live`), and whether anything of its own is trained."""

    saved: Saved
    shape: tuple[int, ...]
    operands: Operands
    product: Product
    live: bool
    trained: bool


class Sequences(NamedTuple):
    """Where sequences lie among rows that hold one after the other: queries of sequence s are rows begins[s] to
    begins[s + 1], its keys rows key_begins[s] to key_begins[s + 1] of theirs, as many, but where keys of earlier
    forwards are kept: there they end at key_ends[s], with room for more after them. `positions` (N,) is each row's
    place in its sequence. All int64."""

    begins: np.ndarray
    key_begins: np.ndarray
    positions: np.ndarray
    key_ends: np.ndarray | None = None

    @classmethod
    def of(cls, lengths: Any) -> "Sequences":
        """Sequences of these lengths, each of which begins at its first position."""
        counts = np.asarray(lengths, np.int64)
        begins = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(begins[-1]) - np.repeat(begins[:-1], counts)
        return cls(begins, begins, positions)


class Run:
    """State of one forward, so that a layer has none: it may run twice in a run, and threads may share it.

    Parameters
    ----------
    backend : Backend
        Where the arrays are, and what computes.
    training : bool
        Whether a backward may follow: without it nothing is kept.
    live : bool
        Whether the gradient of the model's input is wanted.

    Attributes
    ----------
    live : bool
        Whether the gradient of the value at hand is wanted: by the caller, or by what is trained below. Layers raise
        it as the forward passes them; what computes two things from one value brings it back in between.
    frozen : bool
        Whether an adapter around the layers at hand leaves them as they are.
    sink : Sink
        Where the gradients of the present backward go.
    shape : tuple of int
        Of the output.
    sequences : Sequences or None
        Where sequences begin, for attention, which alone knows of them.
    cache : Cache or None
        Keys and values of earlier forwards, which the attention of this one reads and adds to.
    recompute : bool
        Whether blocks keep their input alone and compute themselves again on the way back.
    reads : callable or None
        From `sequences` to the rows that are read of the last block: a head's own. The block then computes no others
        once their keys and values are known.
    in_pieces : bool
        Whether the run is one of several over pieces of one batch, so that gradients are known at the end of the last.
    epilogue : tuple or None
        Scale, shift and activation of a norm that the convolution at hand computes with its own step.
    """

    sequences: Sequences | None = None
    cache: Any = None
    reads: Callable[[Sequences], np.ndarray] | None = None
    recompute = in_pieces = False
    sink: Any = None
    epilogue: tuple[Any, Any, int] | None = None
    tokens: Any = None  # of a model of text, what the forward was called with
    shape: tuple[int, ...] = ()

    def __init__(self, backend: Backend, training: bool = False, live: bool = True) -> None:
        self.backend, self.training, self.live = backend, training, live
        self.frozen = False
        self._kept: dict[Any, list[Any]] = {}
        self._left: dict[Any, int] = {}
        self._states: dict[Any, int] = {}

    def keep(self, layer: Any, kept: Any) -> None:
        """Keep something for the backward of `layer`; None says that it has nothing to do there."""
        self._kept.setdefault(layer, []).append(kept)
        self._states[layer] = layer._state

    def back(self, sink: Any) -> "Run":
        """Begin a backward whose gradients go to `sink`; several may follow one forward."""
        self.sink = sink
        self._left.clear()
        return self

    def recall(self, layer: Any) -> Any:
        """What `layer` kept, the last first."""
        kept = self._kept[layer]
        left = self._left[layer] = self._left.get(layer, len(kept)) - 1
        return kept[left]

    def repeats(self, layer: Any) -> bool:
        """Whether `layer` ran more than once, so that its gradient is known only at the end of the backward."""
        return self.in_pieces or len(self._kept[layer]) > 1

    def inner(self) -> "Run":
        """A run of a part of the model, with its own memory."""
        run = Run(self.backend, self.training, self.live)
        run.frozen, run.sequences, run.in_pieces = self.frozen, self.sequences, self.in_pieces
        run.reads = self.reads
        return run

    @property
    def is_stale(self) -> bool:
        """Whether a layer was updated, reset or taken out of training since it ran."""
        for layer, state in self._states.items():  # noqa: SIM110 - `any` makes three calls more, in every tiny step
            if layer._state != state:
                return True
        return False

    def end(self) -> None:
        """Say that the layers that ran have been updated."""
        for layer in self._states:
            layer._state += 1

    def passed(self, layer: Any, output: Any) -> None:
        """Take notice of what a layer computed: nothing, but in runs that look for faults."""
