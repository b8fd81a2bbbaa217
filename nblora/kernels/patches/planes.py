"""Planes of images copied into rows with padding between them, as a `Lattice` has them, and what places meet there."""

from typing import NamedTuple

from nblora.kernels.common.jit import part
from nblora.kernels.common.microkernel import lanes, once
from nblora.kernels.common.vectors import copy_vector

COPY = 15
"""What copying a vector costs, in multiply-adds of vectors."""


@part
def compacts(lattice, outputs, vector):
    """Whether what the places meet is copied together: where it costs less than computing, for so many outputs, the
    places that are dropped, since rows are short. At 14 x 14 they would be one in eight."""
    places, used = (lattice.rows - 1) * lattice.pitch + lattice.row, lattice.rows * lattice.row
    dropped = (places + vector - 1) // vector * vector - used
    return dropped * outputs > COPY * vector * lattice.rows * ((lattice.row + vector - 1) // vector)


class Plane(NamedTuple):
    """One phase of a plane: of `height` rows of `width` every `down`-th from `a` on, and of a row every `across`-th
    number from `b` on, which are `columns`; rows lie `pitch` apart where they are copied to."""

    height: int
    width: int
    down: int
    across: int
    a: int
    b: int
    columns: int
    pitch: int


@part
def plane_of(lattice, phase):
    """The phase of this number."""
    down, across = lattice.step
    a, b = lattice.phases[phase, 0], lattice.phases[phase, 1]
    return Plane(lattice.height, lattice.width, down, across, a, b, lattice.columns[phase], lattice.pitch)


@part
def fill(target, at, images, begin, plane, first, count):
    """target[at : at + count] = the numbers from position `first` on of a phase of the plane that begins at `begin` in
    the flat `images`; zeros where there are none."""
    once()
    height, width, down, across, a, b, columns, pitch = plane
    row = first // pitch
    x, done = first - row * pitch, 0
    while done < count:
        run = min(pitch - x, count - done)
        y, to = row * down + a, at + done
        live = max(0, min(run, columns - x)) if 0 <= y < height else 0
        line = begin + y * width + x * across + b
        if across == 1:
            copied, source = target[to : to + live], images[line : line + live]
            for i in range(copied.shape[0]):
                copied[i] = source[i]
        else:
            for i in range(live):
                target[to + i] = images[line + i * across]
        for i in range(live, run):
            target[to + i] = 0
        done += run
        row, x = row + 1, 0


@part
def copy_places(target, to, planes, at, row, pitch, q0, q1):
    """target[to + i] = what place q0 + i meets, for places counted without those that are dropped, `row` in a row: of
    planes from the row of q0 on, `at` being where its first place's number is. Whole vectors, beyond the end too."""
    once()
    vector = lanes(target)
    w = q0 % row
    done, total = 0, q1 - q0
    while done < total:
        run = min(row - w, total - done)
        for i in range(0, run, vector):
            copy_vector(target, to + done + i, planes, at + w + i)
        done += run
        at += pitch
        w = 0
