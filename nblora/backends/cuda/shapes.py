"""Tiles and block sizes of the kernels, for a GPU and for Numba's simulator of one."""

from dataclasses import dataclass

import numpy as np

from nblora.kernels.linear.cuda.tiles import Tile

from ..protocol import Array


@dataclass(frozen=True)
class Shapes:
    """Tiles and block sizes for one dtype: `wide` products, few rows (`flat`), few columns (`narrow`), dense updates of
    weights of few tiles (`small`), and the rest.

    A product is split from twice `split` inner elements on: below it adding the splits up costs what they save.
    """

    wide: Tile
    flat: Tile
    narrow: Tile
    small: Tile
    threads: int
    split: int = 256


# NumPy puts a dtype's name together anew each time.
NAMES = {np.dtype(name): name for name in ("float32", "float64")}

PLAIN = {
    "float32": Shapes(Tile(128, 128, 8), Tile(32, 128, 8), Tile(64, 32, 4, groups=4), Tile(64, 64, 8, groups=4), 256),
    "float64": Shapes(
        Tile(64, 64, 8, "float64"),
        Tile(16, 64, 8, "float64"),
        Tile(64, 32, 8, "float64"),
        Tile(32, 32, 8, "float64", groups=4),
        256,
    ),
}
TENSOR = PLAIN | {
    "float32": Shapes(
        Tile(128, 128, 16, tensor=True),
        Tile(32, 128, 16, tensor=True),
        PLAIN["float32"].narrow,
        Tile(64, 64, 16, tensor=True, groups=2),
        256,
    )
}
# Numba's simulator makes a Python thread of each thread: blocks of 32, few of them.
_TINY, _TINY_64 = Tile(32, 64, 16), Tile(16, 32, 8, "float64")
SIMULATED = {
    "float32": Shapes(_TINY, _TINY, _TINY, _TINY, 32),
    "float64": Shapes(_TINY_64, _TINY_64, _TINY_64, _TINY_64, 32),
}


def base_aligned(*arrays: Array) -> bool:
    """Whether every array begins at a multiple of 16 bytes."""
    return all(array.address % 16 == 0 for array in arrays)


def vector_flag(flag: int, array: Array, tile: Tile, *others: Array) -> int:
    """`flag` where rows of the arrays, which have one width, begin at multiples of a vector."""
    return flag if array.shape[-1] % tile.lanes == 0 and base_aligned(array, *others) else 0
