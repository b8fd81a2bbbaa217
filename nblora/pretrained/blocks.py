"""What families of models are made of: blocks of layers with the names that checkpoints give them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np

from nblora.backends.blocks import ReferenceBlocks
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
        return _blocks(run).split_columns(x, self._parts)

    def _backward(self, grads: Sequence[Array] | None, run: Run) -> Array | None:
        return None if run.recall(self) is None or grads is None else _blocks(run).join_columns(grads)


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
        return _blocks(run).gather(a, rows), _blocks(run).gather(x, rows)

    def _backward(self, a: Array | None, x: Array | None, run: Run) -> tuple[Array | None, Array | None]:
        kept = run.recall(self)
        if kept is None:
            return a, x
        rows, count = kept
        return _spread(a, rows, count, run), _spread(x, rows, count, run)


def _spread(grad: Array | None, rows: np.ndarray, count: int, run: Run) -> Array | None:
    """The gradient of all rows of which some were read."""
    if grad is None:
        return None
    below = run.backend.zeros((count, grad.shape[1]), grad.dtype)
    _blocks(run).scatter(below, rows, grad)
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
        return _blocks(run).gather(x, rows)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        if run.reads is not None:
            return grad
        kept = run.recall(self)
        if kept is None:
            return None
        rows, count = kept
        return _spread(grad, rows, count, run)


class Mean(Function):
    """The mean of the rows of each sequence."""

    def _forward(self, x: Array, run: Run) -> Array:
        begins = run.sequences.begins  # type: ignore[union-attr]  # as for Pick
        self._keep(run, begins)
        return _blocks(run).row_means(x, begins)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept = run.recall(self)
        return None if kept is None else _blocks(run).row_means_gradient(grad, *kept)


class Normalised(Function):
    """Rows of length one: x / √(‖x‖² + 1e-24), which differs from `torch.nn.functional.normalize` for lengths about
    1e-12 alone: a norm of root mean squares with the weight 1 / √features.

    Parameters
    ----------
    features : int
        Of a row.
    """

    def __init__(self, features: int) -> None:
        self._eps = 1e-24 / features
        self._weights = {np.dtype(t): np.full(features, features**-0.5, t) for t in ("float32", "float64")}

    def _forward(self, x: Array, run: Run) -> Array:
        weight = run.backend.from_host(self._weights[x.dtype])
        y, stats = _blocks(run).norm(x, weight, None, self._eps, False)
        self._keep(run, x, stats, weight)
        return y

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept = run.recall(self)
        if kept is None:
            return None
        x, stats, weight = kept
        return _blocks(run).norm_gradient(grad, x, stats, weight, False, (True, False))[0]


def _blocks(run: Run) -> ReferenceBlocks:
    return cast(ReferenceBlocks, run.backend)
