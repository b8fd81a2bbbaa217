"""What families of models are made of: blocks of layers with the names that checkpoints give them."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from nblora.backends.protocol import Array
from nblora.layers import Layer, tree
from nblora.layers.attention import Attention
from nblora.layers.functions import Dropout, Function, join
from nblora.layers.run import Run, Sequences


class Block(Layer, abstract=True):
    """Layers as attributes, and a forward through them.

    `NAMES` says what a checkpoint calls each of them, relative to the block; others are called as the attribute is, and
    "" stands for the block itself.
    """

    NAMES: ClassVar[Mapping[str, str]] = {}

    @property
    def drops(self) -> bool:
        """Whether it has dropout of its own, which draws from `_rng` where one is: in `fit(base_dropout=True)`."""
        return any(
            (isinstance(step, Dropout) and step.share > 0) or (isinstance(step, Attention) and step.dropout > 0)
            for step in vars(self).values()
        )

    def _begin(self) -> None:
        """Begin life, all layers set."""
        layers = list(self.children().values())
        self.dtype = layers[0].dtype
        self.in_features, self.out_features = layers[0].in_features, layers[-1].out_features
        self._open(layers[0]._backend)

    def children(self) -> dict[str, Layer]:
        layers = ((key, value) for key, value in vars(self).items() if isinstance(value, Layer))
        return {self.NAMES.get(key, key): value for key, value in layers}

    def _set_child(self, name: str, layer: Layer) -> None:
        key = next((key for key, called in self.NAMES.items() if called == name), name)
        setattr(self, key, layer)


class Stack(Block, abstract=True):
    """Blocks one after the other, called by their places.

    With `run.recompute` a block keeps its input alone, and computes itself again on the way back. Only the last one is
    told which rows are read.
    """

    def __init__(self, blocks: Iterable[Layer]) -> None:
        self._blocks = list(blocks)
        self._begin()

    def children(self) -> dict[str, Layer]:
        return {str(place): block for place, block in enumerate(self._blocks)}

    def _set_child(self, name: str, layer: Layer) -> None:
        self._blocks[int(name)] = layer

    def _forward(self, x: Array, run: Run) -> Array:
        reads, lightly = run.reads, run.recompute and run.training
        for block in self._blocks:
            run.reads = reads if block is self._blocks[-1] else None
            x = self._lightly(block, x, run) if lightly else block._forward(x, run)
        return x

    def _backward(self, grad: Array, run: Run) -> Array | None:
        below: Array | None = grad
        for block in reversed(self._blocks):
            if below is None:
                return None
            below = block._backward(below, run) if not run.recompute else self._again(block, below, run)
        return below

    def _lightly(self, block: Layer, x: Array, run: Run) -> Array:
        """The block's output, of which only the input is kept."""
        before = {name: g.bit_generator.state for name, g in tree.generators(block).items()}
        inner = run.inner()
        y = block._forward(x, inner)
        run.keep(self, (x, run.live, before) if inner.live else None)
        run.live = inner.live
        return y

    def _again(self, block: Layer, grad: Array, run: Run) -> Array | None:
        """The way back through a block that is computed again."""
        kept = run.recall(self)
        if kept is None:
            return None
        x, live, before = kept
        generators = tree.generators(block)
        after = {name: generator.bit_generator.state for name, generator in generators.items()}
        inner = run.inner()
        inner.live = live
        inner.reads = run.reads if block is self._blocks[-1] else None
        _set_states(generators, before)
        block._forward(x, inner)
        _set_states(generators, after)
        return block._backward(grad, inner.back(run.sink))


def _set_states(generators: Mapping[str, np.random.Generator], states: Mapping[str, Any]) -> None:
    for name, state in states.items():
        generators[name].bit_generator.state = state


def gathered(tables: Mapping[Any, Array], run: Run) -> Array:
    """The sum of the rows that integers name in several tables."""
    live, wanted, total = run.live, False, None
    for table, places in tables.items():
        run.live = live
        rows = table._forward(places, run)
        total = rows if total is None else join(total, rows, run)
        wanted = wanted or run.live
    run.live = wanted
    return total


class Split(Function):
    """Parts of equal width of each row: queries, keys and values that one projection made."""

    def __init__(self, parts: int) -> None:
        self._parts = parts

    def _forward(self, x: Array, run: Run) -> list[Array]:
        self._keep(run)
        return [np.ascontiguousarray(part) for part in np.split(x, self._parts, axis=1)]

    def _backward(self, grads: Iterable[Array] | None, run: Run) -> Array | None:
        return None if run.recall(self) is None or grads is None else np.concatenate(list(grads), axis=1)


class Narrow(Function):
    """Of what attention gives, and of the rows beside it, those that are read: nothing more is computed of others."""

    def _forward(self, a: Array, x: Array, run: Run) -> tuple[Array, Array]:
        if run.reads is None or run.sequences is None:
            if run.training:
                run.keep(self, None)
            return a, x
        rows = run.reads(run.sequences)
        if run.training:
            run.keep(self, (rows, len(x)))
        return a[rows], x[rows]

    def _backward(self, a: Array | None, x: Array | None, run: Run) -> tuple[Array | None, Array | None]:
        kept = run.recall(self)
        if kept is None:
            return a, x
        return _spread(a, *kept), _spread(x, *kept)


def _spread(grad: Array | None, rows: np.ndarray, count: int) -> Array | None:
    """The gradient of all rows of which some were read."""
    if grad is None:
        return None
    below = np.zeros((count, grad.shape[1]), grad.dtype)
    below[rows] = grad
    return below


class Pick(Function):
    """One row of each sequence: its first, or its last; nothing to do where the last block gave no others."""

    def __init__(self, place: str) -> None:
        self._last = place == "last"

    def rows(self, sequences: Sequences) -> np.ndarray:
        """Which rows these are."""
        return sequences.begins[1:] - 1 if self._last else sequences.begins[:-1]

    def _forward(self, x: Array, run: Run) -> Array:
        if run.reads is not None:
            return x
        rows = self.rows(run.sequences)  # type: ignore[arg-type]  # models of text and of patches set them
        self._keep(run, rows, len(x))
        return np.ascontiguousarray(x[rows])

    def _backward(self, grad: Array, run: Run) -> Array | None:
        if run.reads is not None:
            return grad
        kept = run.recall(self)
        return None if kept is None else _spread(grad, *kept)


class Mean(Function):
    """The mean of the rows of each sequence."""

    def _forward(self, x: Array, run: Run) -> Array:
        begins = run.sequences.begins  # type: ignore[union-attr]  # as for Pick
        counts = np.diff(begins).astype(x.dtype)[:, None]
        self._keep(run, counts)
        return np.add.reduceat(x, begins[:-1], axis=0) / counts

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept = run.recall(self)
        if kept is None:
            return None
        (counts,) = kept
        return np.repeat(grad / counts, counts[:, 0].astype(np.int64), axis=0)


class Normalised(Function):
    """Rows of length one: x / max(‖x‖, 1e-12), as `torch.nn.functional.normalize`."""

    def _forward(self, x: Array, run: Run) -> Array:
        norms = np.maximum(np.sqrt((x * x).sum(axis=1, keepdims=True)), x.dtype.type(1e-12))
        y = x / norms
        self._keep(run, y, norms)
        return y

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept = run.recall(self)
        if kept is None:
            return None
        y, norms = kept
        return (grad - y * (grad * y).sum(axis=1, keepdims=True)) / norms
