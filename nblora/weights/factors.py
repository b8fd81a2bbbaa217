"""The factors of one recipe, stacked: change = P Q for any range of rows and columns, in bounded memory."""

from collections.abc import Callable

import numpy as np

from nblora.formats.safetensors_reader import FLOATS, SafetensorsFile, TensorInfo
from nblora.kernels.cpu.weights_merge import NO_SCALE, SCALE_COLUMNS, SCALE_ROWS
from nblora.weights.plan import ROWS, Factor, Recipe, Term


def widen(raw: np.ndarray, dtype: str, working: type) -> np.ndarray:
    """Return stored numbers as working ones.

    Parameters
    ----------
    raw : ndarray of uint8, shape (n · itemsize,)
    dtype : str
        As safetensors spells it: F64, F32, F16 or BF16.
    working : type
        float32 or float64.

    Returns
    -------
    ndarray of `working`, shape (n,)
    """
    numbers = raw.view(FLOATS[dtype])
    if dtype == "BF16":
        numbers = (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(working)


class Stack:
    """P (rows, K) and Q (K, columns) of a recipe, with every scaling folded in.

    Parameters
    ----------
    recipe : Recipe
    working : type
        float32 or float64.
    limit : int
        Bytes that P and Q may take each; a larger one is read again for every block.

    Attributes
    ----------
    nbytes : int
        Bytes held between blocks.
    scale : ndarray of working
        g, (rows,) or (columns,) by `scale_axis`; one unused number with NO_SCALE.
    scale_axis : int
        NO_SCALE, SCALE_ROWS or SCALE_COLUMNS: what the starting weight is multiplied by.
    """

    def __init__(self, recipe: Recipe, working: type, limit: int) -> None:
        self.recipe, self.working = recipe, working
        self.scale, self.scale_axis = np.ones(1, working), NO_SCALE
        self._norms: np.ndarray | None = None
        self._row_factors: list[np.ndarray | None] = [None] * len(recipe.terms)
        self._column_factors: list[np.ndarray | None] = [None] * len(recipe.terms)
        item = np.dtype(working).itemsize
        self._P = self._load_P(0, recipe.rows) if recipe.rows * recipe.rank * item <= limit else None
        self._Q = self._load_Q(0, recipe.columns) if recipe.columns * recipe.rank * item <= limit else None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self._P, self._Q) if array is not None)

    def P(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of P, C-contiguous, (stop − start, K)."""
        return self._load_P(start, stop) if self._P is None else self._P[start:stop]

    def Q(self, start: int, stop: int) -> np.ndarray:
        """Columns [start, stop) of Q, C-contiguous, (K, stop − start)."""
        return self._load_Q(start, stop) if self._Q is None else np.ascontiguousarray(self._Q[:, start:stop])

    def fold_magnitude(self, norms: np.ndarray) -> None:
        """Turn a DoRA term into scalings of what comes before it and of itself.

        With f = m / ‖W + sBA‖ and the adapter's weight w, the merged weight is
        (1 − w) X + w f (X + sBA), X being the weight with the terms before.

        Parameters
        ----------
        norms : ndarray of float64, shape (rows,) or (columns,)
            ‖W + sBA‖ along the axis of the term.
        """
        term = self.recipe.dora
        assert term and term.magnitude
        magnitude = read_all(term.magnitude, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = magnitude / norms
        kept = (1 - term.weight) + term.weight * factor
        at = self.recipe.terms.index(term)
        factors = self._row_factors if term.axis == ROWS else self._column_factors
        factors[:at] = [kept] * at
        factors[at] = term.weight * factor
        self.scale = kept.astype(self.working)
        self.scale_axis = SCALE_ROWS if term.axis == ROWS else SCALE_COLUMNS
        if self._P is not None and term.axis == ROWS:
            self._P = self._load_P(0, self.recipe.rows)
        if self._Q is not None and term.axis != ROWS:
            self._Q = self._load_Q(0, self.recipe.columns)

    def _load_P(self, start: int, stop: int) -> np.ndarray:
        P = np.empty((stop - start, self.recipe.rank), self.working)

        def fill(term: Term, place: slice) -> np.ndarray:
            if term.left is None:
                return np.full((stop - start, 1), term.scale)
            return read_rows(term.left, term.rank, start, stop, np.float64) * term.scale

        self._fill(fill, lambda part, place: P.__setitem__((slice(None), place), part), self._row_factors, start, stop)
        return P

    def _load_Q(self, start: int, stop: int) -> np.ndarray:
        Q = np.empty((self.recipe.rank, stop - start), self.working)

        def fill(term: Term, place: slice) -> np.ndarray:
            return read_rows(term.right, term.rank, start, stop, np.float64)

        factors = self._column_factors
        self._fill(fill, lambda part, place: Q.__setitem__(place, part.T), factors, start, stop)
        return Q

    def _fill(self, fill: Callable, put: Callable, factors: list[np.ndarray | None], start: int, stop: int) -> None:
        at = 0
        for term, factor in zip(self.recipe.terms, factors, strict=True):
            place = slice(at, at + term.rank)
            part = fill(term, place)
            put(part if factor is None else part * factor[start:stop, None], place)
            at += term.rank


def read_all(factor: Factor, working: type) -> np.ndarray:
    """All numbers of a small stored tensor, (n,)."""
    raw = np.empty(factor.info.nbytes, np.uint8)
    factor.file.pread(memoryview(raw), factor.info.start)
    return widen(raw, factor.info.dtype, working)


def read_rows(factor: Factor, rank: int, start: int, stop: int, working: type) -> np.ndarray:
    """Rows [start, stop) of a factor seen as (n, rank), whichever way round it is stored."""
    info = factor.info
    item = info.nbytes // info.size
    n = info.size // rank
    if not factor.transposed:
        raw = np.empty((stop - start) * rank * item, np.uint8)
        factor.file.pread(memoryview(raw), info.start + start * rank * item)
        return widen(raw, info.dtype, working).reshape(stop - start, rank)
    if stop - start == n:
        return read_all(factor, working).reshape(rank, n).T
    raw = np.empty((rank, (stop - start) * item), np.uint8)
    for k in range(rank):
        factor.file.pread(memoryview(raw[k]), info.start + (k * n + start) * item)
    return widen(raw.reshape(-1), info.dtype, working).reshape(rank, stop - start).T


__all__ = ["SafetensorsFile", "Stack", "TensorInfo", "read_all", "read_rows", "widen"]
