"""`Lattice`: how the numbers that a convolution multiplies lie in rows of padded images.

Every image is copied plane by plane with its rows at a pitch P at which padding is shared: the zeros behind a row are
those before the next. Places of the output have the same pitch: place (h, w) is q = h·P + w, so what an element of the
kernel meets at all places is one run of numbers, shifted by that element's `shift`, and vectors of places are read
where they lie. Places w >= width of the output are computed and dropped. With a stride a plane is dealt to as many
phases as are met, (row mod stride, column mod stride), each a plane of its own.

The gradient of the images is a convolution of the output's gradient, one for each phase of the images: with stride 1 of
the turned kernel.
"""

import functools
from typing import NamedTuple

import numpy as np

from .window import Window


class Lattice(NamedTuple):
    """One convolution: from planes (height, width), dealt by `step`, to places (rows, columns), which are written
    `spread` apart from `origin` on in planes (out_height, out_width)."""

    height: int
    width: int
    step: tuple[int, int]
    pitch: int
    phases: np.ndarray  # (phases, 2) int64, of the planes that are read
    columns: np.ndarray  # (phases,) int64: numbers in a row of each
    taps: np.ndarray  # (taps, 3) int64: phase, shift - low, and the number of the kernel's element
    low: int  # the least shift
    high: int  # the greatest
    rows: int
    row: int  # places in a row
    spread: tuple[int, int]
    origin: tuple[int, int]
    out_height: int
    out_width: int

    @property
    def places(self) -> int:
        """Places with those that are dropped, from the first to the last that is not."""
        return (self.rows - 1) * self.pitch + self.row if self.rows > 0 and self.row > 0 else 0


def _lattice(
    sizes: tuple[int, int],
    step: tuple[int, int],
    reaches: list[tuple[int, int, int]],
    places: tuple[int, int],
    spread: tuple[int, int],
    origin: tuple[int, int],
    out: tuple[int, int],
) -> Lattice:
    """The lattice whose kernel's elements meet the place (h, w) at (h·step + y, w·step + x) of the planes, `reaches`
    being triples of y, x and the element's number."""
    parts = [(y % step[0], x % step[1], y // step[0], x // step[1], number) for y, x, number in reaches]
    phases = sorted({part[:2] for part in parts})
    columns = [max(0, -(-(sizes[1] - b) // step[1])) for _, b in phases]
    left, right = max(0, *(-part[3] for part in parts)), max(0, *(part[3] for part in parts))
    pitch = max(max(columns) + left, places[1] + right, 1)
    shifts = [part[2] * pitch + part[3] for part in parts]
    low, high = min(shifts), max(shifts)
    taps = [(phases.index(part[:2]), shift - low, part[4]) for part, shift in zip(parts, shifts, strict=True)]
    found = (np.array(numbers, np.int64) for numbers in (phases, columns, taps))
    return Lattice(*sizes, step, pitch, *found, low, high, *places, spread, origin, *out)


@functools.lru_cache(256)
def forward_lattice(window: Window) -> Lattice:
    """From images to outputs."""
    reaches = [
        (i * window.dh - window.ph, j * window.dw - window.pw, i * window.kw + j)
        for i in range(window.kh)
        for j in range(window.kw)
    ]
    places = window.out_height, window.out_width
    return _lattice((window.height, window.width), (window.sh, window.sw), reaches, places, (1, 1), (0, 0), places)


@functools.lru_cache(256)
def backward_lattices(window: Window) -> list[Lattice]:
    """From the outputs' gradients to the images', one for each of their phases that a kernel's element meets."""
    found = []
    size, sizes = (window.out_height, window.out_width), (window.height, window.width)
    for a in range(min(window.sh, window.height)):
        for b in range(min(window.sw, window.width)):
            reaches = [
                (y // window.sh, x // window.sw, i * window.kw + j)
                for i in range(window.kh)
                for j in range(window.kw)
                if (y := a + window.ph - i * window.dh) % window.sh == 0
                and (x := b + window.pw - j * window.dw) % window.sw == 0
            ]
            if reaches:
                places = -(-(window.height - a) // window.sh), -(-(window.width - b) // window.sw)
                spread = window.sh, window.sw
                found.append(_lattice(size, (1, 1), reaches, places, spread, (a, b), sizes))
    return found


@functools.lru_cache(256)
def places_lattice(window: Window, compact: bool) -> Lattice:
    """Of the outputs' own planes, with the places between their rows that `forward_lattice` has, unless `compact`."""
    size = window.out_height, window.out_width
    found = _lattice(size, (1, 1), [(0, 0, 0)], size, (1, 1), (0, 0), size)
    return found if compact else found._replace(pitch=forward_lattice(window).pitch)
