"""The factors of one recipe, stacked: change = P Q for any range of rows and columns, in bounded memory."""

from collections.abc import Iterator

import numpy as np

from nblora.storage.safetensors_reader import widen
from nblora.weights.plan import ROWS, Factor, Fixed, Recipe, Term


class Stack:
    """P (rows, K) and Q (K, columns) of a recipe in float64, with every scaling folded in.

    Parameters
    ----------
    recipe : Recipe
    limit : int
        Bytes that P and Q may take each; a larger one is read again for every block.

    Attributes
    ----------
    row_scale, column_scale : ndarray of float64, shape (rows,) or (0,), (columns,) or (0,)
        What the starting weight is multiplied by; empty where it is 1.
    """

    def __init__(self, recipe: Recipe, limit: int) -> None:
        self.recipe = recipe
        self.row_scale, self.column_scale = np.empty(0), np.empty(0)
        self._row_factors: list[np.ndarray | None] = [None] * len(recipe.terms)
        self._column_factors: list[np.ndarray | None] = [None] * len(recipe.terms)
        self._P = self._load_P(0, recipe.rows) if held(recipe.rows, recipe, limit) else None
        self._Q = self._load_Q(0, recipe.columns) if held(recipe.columns, recipe, limit) else None

    @property
    def nbytes(self) -> int:
        """Bytes held between blocks."""
        return sum(array.nbytes for array in (self._P, self._Q) if array is not None)

    def P(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of P, C-contiguous, (stop − start, K)."""
        return self._load_P(start, stop) if self._P is None else self._P[start:stop]

    def Q(self, start: int, stop: int) -> np.ndarray:
        """Columns [start, stop) of Q, C-contiguous, (K, stop − start)."""
        return self._load_Q(start, stop) if self._Q is None else np.ascontiguousarray(self._Q[:, start:stop])

    def fold_magnitude(self, norms: np.ndarray) -> None:
        """Turn a DoRA term into scalings of what comes before it and of itself.

        With f = m / ‖W + sBA‖ and the adapter's weight w, the merged weight is (1 − w) X + w f (X + sBA), X being the
        weight with the terms before.

        Parameters
        ----------
        norms : ndarray of float64, shape (rows,) or (columns,)
            ‖W + sBA‖ along the axis of the term.
        """
        term = self.recipe.dora
        assert term
        assert term.magnitude
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # a weight of zeros has no direction: NaN, which is counted
            factor = read_all(term.magnitude) / norms
        kept = (1 - term.weight) + term.weight * factor
        at = self.recipe.terms.index(term)
        if term.axis == ROWS:
            self.row_scale = kept
            self._row_factors[: at + 1] = [kept] * at + [term.weight * factor]
            self._P = None if self._P is None else self._load_P(0, self.recipe.rows)
        else:
            self.column_scale = kept
            self._column_factors[: at + 1] = [kept] * at + [term.weight * factor]
            self._Q = None if self._Q is None else self._load_Q(0, self.recipe.columns)

    def _load_P(self, start: int, stop: int) -> np.ndarray:
        P = np.empty((stop - start, self.recipe.rank))
        for term, factor, place in self._places(self._row_factors):
            left = np.ones((stop - start, 1)) if term.left is None else read_rows(term.left, term.rank, start, stop)
            np.multiply(left, term.scale, out=P[:, place])
            if factor is not None:
                P[:, place] *= factor[start:stop, None]
        return P

    def _load_Q(self, start: int, stop: int) -> np.ndarray:
        Q = np.empty((self.recipe.rank, stop - start))
        for term, factor, place in self._places(self._column_factors):
            Q[place] = read_rows(term.right, term.rank, start, stop).T
            if factor is not None:
                Q[place] *= factor[start:stop]
        return Q

    def _places(self, factors: list[np.ndarray | None]) -> Iterator[tuple[Term, np.ndarray | None, slice]]:
        at = 0
        for term, factor in zip(self.recipe.terms, factors, strict=True):
            yield term, factor, slice(at, at + term.rank)
            at += term.rank


def held(count: int, recipe: Recipe, limit: int) -> bool:
    """Whether `count` rows or columns of the recipe's factors stay in memory."""
    return count * recipe.rank * 8 <= limit


def read_all(factor: Factor) -> np.ndarray:
    """All numbers of a small stored tensor, float64 (n,)."""
    raw = np.empty(factor.info.nbytes, np.uint8)
    factor.file.pread(raw.data, factor.info.start)
    return widen(raw, factor.info.dtype)


def read_rows(factor: Factor | Fixed, rank: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a factor seen as (n, rank), whichever way round it is stored; float64."""
    if isinstance(factor, Fixed):
        return factor.rows(factor.count, rank)[start:stop]
    info = factor.info
    item = info.nbytes // info.size
    n = info.size // rank
    if not factor.transposed:
        raw = np.empty((stop - start) * rank * item, np.uint8)
        factor.file.pread(raw.data, info.start + start * rank * item)
        return widen(raw, info.dtype).reshape(stop - start, rank)
    if stop - start == n:
        return read_all(factor).reshape(rank, n).T
    raw = np.empty((rank, (stop - start) * item), np.uint8)
    for k in range(rank):
        factor.file.pread(raw[k].data, info.start + (k * n + start) * item)
    return widen(raw.reshape(-1), info.dtype).reshape(rank, stop - start).T
