"""`Cache`: keys and values of a sequence's earlier rows, so that a forward computes the new ones alone."""

from typing import Any

import numpy as np

from nblora.backends.protocol import Array

from .run import Sequences


class Cache:
    """Keys and values of sequences that grow, for each attention of a model.

    Each has one buffer for its keys and one for its values, in which every sequence has a place of its own with room
    for rows to come: nothing is moved when rows are added. Where sequences outgrow their places, new buffers are made,
    in which those have twice the room.

    Parameters
    ----------
    rooms : array_like of int, shape (sequences,)
        Rows that each sequence has room for at first.
    backend : Backend
        Where the model is.
    """

    def __init__(self, rooms: Any, backend: Any) -> None:
        self._backend = backend
        self._rooms = np.array(rooms, np.int64)
        self._lengths = np.zeros(len(self._rooms), np.int64)
        self._buffers: dict[Any, tuple[Array, Array]] = {}
        self._new = np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each sequence so far."""
        return self._lengths

    def next_rows(self, counts: Any) -> Sequences:
        """Begin a forward of so many new rows of each sequence, and say where they and their keys lie."""
        added = np.asarray(counts, np.int64)
        lengths = self._lengths + added
        if (lengths > self._rooms).any():
            self._grow(np.where(lengths > self._rooms, np.maximum(2 * self._rooms, lengths), self._rooms))
        sequences = Sequences.of(added)
        positions = sequences.positions + np.repeat(self._lengths, added)
        starts = _starts(self._rooms)
        self._new, self._lengths = positions + np.repeat(starts[:-1], added), lengths
        return Sequences(sequences.begins, starts, positions, starts[:-1] + lengths)

    def extended(self, attention: Any, k: Array, v: Array) -> tuple[Array, Array]:
        """The buffers of an attention, the new rows' keys and values among them."""
        kept = self._buffers.get(attention)
        if kept is None:
            rows = int(self._rooms.sum())
            new, columns = self._backend.empty, k.shape[1]
            kept = self._buffers[attention] = new((rows, columns), k.dtype), new((rows, columns), v.dtype)
        for buffer, values in zip(kept, (k, v), strict=True):
            self._backend.scatter(buffer, self._new, values)
        return kept

    def keep(self, chosen: np.ndarray) -> None:
        """Go on with these of the sequences alone, in their order; chosen by their places."""
        if len(chosen) < len(self._rooms):
            self._move(self._rooms[chosen], chosen)

    def _grow(self, rooms: np.ndarray) -> None:
        self._move(rooms, np.arange(len(rooms)))

    def _move(self, rooms: np.ndarray, chosen: np.ndarray) -> None:
        """Give the chosen sequences places of these sizes in new buffers."""
        lengths = self._lengths[chosen]
        within = Sequences.of(lengths).positions
        old = within + np.repeat(_starts(self._rooms)[:-1][chosen], lengths)
        new = within + np.repeat(_starts(rooms)[:-1], lengths)
        for attention, kept in self._buffers.items():
            moved = []
            for buffer in kept:
                larger = self._backend.empty((int(rooms.sum()), buffer.shape[1]), buffer.dtype)
                self._backend.scatter(larger, new, self._backend.gather(buffer, old))
                moved.append(larger)
            self._buffers[attention] = moved[0], moved[1]
        self._rooms, self._lengths = rooms, lengths


def _starts(rooms: np.ndarray) -> np.ndarray:
    """Where the places of sequences begin, and their end."""
    return np.concatenate([[0], np.cumsum(rooms)])
