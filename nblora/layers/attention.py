"""`Attention` over ragged rows, and `Rotary`, the positions that are turned into its queries and keys."""

import math
from typing import cast

import numpy as np

from nblora import checks
from nblora.backends.blocks import Heads, ReferenceBlocks
from nblora.backends.protocol import Array

from .functions import Function
from .run import Run, Sequences


class Rotary:
    """Rotary positions (Su et al., 2021) in halves, as Llama has them: feature i of a head turns with i + half.

    Parameters
    ----------
    size : int
        Features of a head that turn, even: all of them, or the first.
    theta : float
        Base of the frequencies theta^(-2i / size), which are computed in float32 at every step, as transformers does.
    """

    def __init__(self, size: int, theta: float = 10000.0) -> None:
        self.size = checks.check_integer("size", size, 2)
        if self.size % 2:
            raise ValueError(f"size must be even, got {size}: features turn in pairs")
        self.theta = checks.check_positive("theta", theta)
        exponents = np.arange(0, self.size, 2, dtype=np.float32) / np.float32(self.size)
        # Each step rounded once, as a library's powf of good quality does; NumPy's own is off by more here and there.
        powers = (np.float64(self.theta) ** exponents.astype(np.float64)).astype(np.float32)
        self.frequencies: np.ndarray = np.float32(1) / powers
        self._tables: dict[np.dtype, tuple[np.ndarray, np.ndarray]] = {}

    def tables(self, count: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the angles of at least so many positions, (positions, size / 2)."""
        found = self._tables.get(dtype)
        if found is None or len(found[0]) < count:
            places = np.arange(max(64, 1 << (count - 1).bit_length()), dtype=dtype)
            angles = places[:, None] * self.frequencies.astype(dtype)
            found = self._tables[dtype] = np.cos(angles), np.sin(angles)
        return found

    def __repr__(self) -> str:
        return f"Rotary({self.size}, theta={self.theta:g})"


class Attention(Function):
    """softmax(scale q kᵀ) v for each head of each of the run's sequences.

    Scores are never held: backward computes them again. Queries, keys and values are projections of their own: `q`
    (N, heads·size), `k` and `v` (N, key_heads·size), with the rows of all sequences one after the other, as
    `run.sequences` says. With rotary positions q and k are turned in place. With `run.cache` the keys and values of the
    sequences' earlier rows are read too.

    Parameters
    ----------
    heads : int
    key_heads : int, optional
        Heads of the keys and values, of which `heads` is a multiple; by default as many.
    causal : bool
        Whether a row sees itself and what is before it, or its whole sequence.
    rotary : Rotary, optional
    scale : float, optional
        By default 1 / √size.
    dropout : float
        In training, the probability with which a weight of the softmax is dropped, where the forward is given a
        generator. Which are is a function of one number drawn from it, so that the way back finds the same.
    """

    def __init__(
        self,
        heads: int,
        key_heads: int | None = None,
        *,
        causal: bool = False,
        rotary: Rotary | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.heads = checks.check_integer("heads", heads, 1)
        self.key_heads = self.heads if key_heads is None else checks.check_integer("key_heads", key_heads, 1)
        if self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {heads} and {key_heads}")
        self.causal, self.rotary = checks.check_flag("causal", causal), rotary
        self.scale = None if scale is None else checks.check_positive("scale", scale)
        self.dropout = checks.check_fraction("dropout", dropout)

    def _forward(self, q: Array, k: Array, v: Array, run: Run, rng: np.random.Generator | None = None) -> Array:
        sequences = self._check(q, k, v, run)
        scale = self.scale or 1 / math.sqrt(q.shape[1] // self.heads)
        begins, key_begins, _, key_ends = sequences
        shape = Heads(begins, key_begins, self.heads, self.key_heads, self.causal, scale, key_ends)
        if rng is not None and run.training and self.dropout:
            shape = shape._replace(dropout=self.dropout, seed=int(rng.integers(1 << 62)))
        backend = cast(ReferenceBlocks, run.backend)
        self._turn(q, k, sequences, backend)
        if run.cache is not None:
            k, v = run.cache.extended(self, k, v)
        o, sums = backend.attention(q, k, v, shape)
        self._keep(run, q, k, v, o, sums, shape, sequences)
        return o

    def _backward(self, grad: Array, run: Run) -> tuple[Array, Array, Array] | None:
        kept = run.recall(self)
        if kept is None:
            return None
        *values, sequences = kept
        backend = cast(ReferenceBlocks, run.backend)
        gq, gk, gv = backend.attention_gradient(grad, *values)
        self._turn(gq, gk, sequences, backend, back=True)
        return gq, gk, gv

    def _turn(self, q: Array, k: Array, sequences: Sequences, backend: ReferenceBlocks, back: bool = False) -> None:
        if self.rotary is not None and len(q):
            positions = sequences.positions
            tables = self.rotary.tables(int(positions.max()) + 1, q.dtype)
            backend.rotate(q, positions, *tables, self.heads, back)
            backend.rotate(k, positions, *tables, self.key_heads, back)

    def _check(self, q: Array, k: Array, v: Array, run: Run) -> Sequences:
        sequences = run.sequences
        if sequences is None:
            raise RuntimeError(f"{self!r} needs to know where sequences begin: set run.sequences before the forward")
        rows, features = q.shape
        size = features // self.heads
        if features % self.heads or k.shape != v.shape or k.shape[1] != size * self.key_heads:
            raise ValueError(
                f"{self!r} takes q (rows, heads·size), k and v (rows, key_heads·size), got {q.shape}, {k.shape} and "
                f"{v.shape}"
            )
        keys = sequences.begins[-1] if run.cache is not None else sequences.key_begins[-1]
        if rows != sequences.begins[-1] or len(k) != keys:
            raise ValueError(
                f"{self!r} got {rows} queries and {len(k)} keys, and sequences of {sequences.begins[-1]} and {keys}"
            )
        if self.rotary is not None and self.rotary.size > size:
            raise ValueError(f"{self!r} turns {self.rotary.size} features of a head, which has {size}")
        return sequences

    def __repr__(self) -> str:
        parts = [str(self.heads)] if self.heads == self.key_heads else [str(self.heads), str(self.key_heads)]
        parts += ["causal=True"] if self.causal else []
        parts += [f"rotary={self.rotary!r}"] if self.rotary is not None else []
        return f"Attention({', '.join(parts)})"
