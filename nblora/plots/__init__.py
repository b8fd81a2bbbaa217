"""Figures, by matplotlib (extra `plot`): each function takes plain data, draws on `ax` or on a new figure, and returns
the Axes. One style for all, readable in grey, every axis labelled with its unit.
"""

from .bars import benchmark_bars, difference_intervals
from .curves import accuracy_against_parameters, learning_curves, singular_values, stable_rank_curves
from .files import draw_file
from .maps import matrix_heat_map, sweep_heat_map
from .style import style

__all__ = [
    "accuracy_against_parameters",
    "benchmark_bars",
    "difference_intervals",
    "draw_file",
    "learning_curves",
    "matrix_heat_map",
    "singular_values",
    "stable_rank_curves",
    "style",
    "sweep_heat_map",
]
