"""Sweeps: the same task with many settings, on this machine or on a Dask cluster, resumed wherever they were killed."""

from .data import read_data, split_data
from .space import draw_random, expand_grid
from .store import read_results
from .summary import best_of_each_method, over_seeds, text_table
from .sweep import Sweep
from .task import Data
from .texts import read_texts

__all__ = [
    "Data",
    "Sweep",
    "best_of_each_method",
    "draw_random",
    "expand_grid",
    "over_seeds",
    "read_data",
    "read_results",
    "read_texts",
    "split_data",
    "text_table",
]
