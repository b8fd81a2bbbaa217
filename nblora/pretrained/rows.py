"""Ragged data: sequences of different lengths whose values lie one after the other, so that no padding is computed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from nblora import checks
from nblora.layers.run import Sequences


class Ragged:
    """Sequences of integers, one after the other: sequence i is values[begins[i]:begins[i + 1]].

    Cut like an array along its first axis: by a slice, or by an array of places.
    """

    def __init__(self, values: np.ndarray, begins: np.ndarray) -> None:
        self.values, self.begins = values, begins

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> Self:
        """Sequences given one by one."""
        begins = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=begins[1:])
        return cls(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64, copy=False), begins)

    @property
    def lengths(self) -> np.ndarray:
        """Of each sequence."""
        return np.diff(self.begins)

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.values[a:b] for a, b in zip(self.begins[:-1], self.begins[1:], strict=True))

    def __getitem__(self, chosen: slice | np.ndarray) -> Self:
        rows, begins = chosen_rows(self.begins, chosen)
        return type(self)(self.values[rows], begins)


def chosen_rows(begins: np.ndarray, chosen: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of some of the sequences, and where these begin among them."""
    starts, lengths = begins[:-1][chosen], np.diff(begins)[chosen]
    found = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return np.arange(found[-1]) + np.repeat(starts - found[:-1], lengths), found


@dataclass(frozen=True)
class Tokens:
    """A batch of texts as models compute them, or a whole data set: integers of all real tokens, one after the other.

    `kinds` are BERT's token types, None where all are 0. `width` is the length that outputs are padded to: that of the
    array that the tokens came in, or of the longest sequence. Cut like an array along its first axis, by sequences.
    """

    ids: np.ndarray
    kinds: np.ndarray | None
    begins: np.ndarray
    width: int

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def sequences(self) -> Sequences:
        """Where they begin, for attention."""
        return Sequences.of(np.diff(self.begins))

    def __getitem__(self, chosen: slice | np.ndarray) -> "Tokens":
        rows, begins = chosen_rows(self.begins, chosen)
        kinds = None if self.kinds is None else self.kinds[rows]
        return Tokens(self.ids[rows], kinds, begins, int(np.diff(begins).max(initial=0)))

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of every token in a padded array (count, width)."""
        lengths = np.diff(self.begins)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        return rows, np.arange(len(self.ids)) - self.begins[rows]

    def padded(self, values: np.ndarray) -> np.ndarray:
        """Rows of all tokens as (count, width, features), zeros where there is no token."""
        result = np.zeros((len(self), self.width, values.shape[1]), values.dtype)
        result[self.places()] = values
        return result

    def rows_of(self, padded: np.ndarray) -> np.ndarray:
        """The rows of all tokens in what `padded` returned, or in an array like it."""
        return np.ascontiguousarray(padded[self.places()])


def read_tokens(input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Tokens:
    """Token ids as models take them from users.

    Parameters
    ----------
    input_ids : array_like of integers, shape (batch, length) or (length,), or a list of sequences
    attention_mask : array_like of 0 and 1, shape (batch, length), optional
        1 at tokens, 0 at padding, which must lie at the right.
    token_type_ids : like input_ids, optional

    Raises
    ------
    TypeError
        For what is no integer.
    ValueError
        For no sequences, one without tokens, a mask with holes, with padding at the left or of another shape.
    """
    parts = _parts("input_ids", input_ids)
    if not parts:
        raise ValueError("input_ids must hold at least one sequence, got none")
    width = max(map(len, parts))
    kinds = None if token_type_ids is None else _parts("token_type_ids", token_type_ids)
    if kinds is not None and [len(part) for part in kinds] != [len(part) for part in parts]:
        raise ValueError("token_type_ids must have the shape of input_ids: one number for each token")
    if attention_mask is not None:
        lengths = _lengths(attention_mask, [len(part) for part in parts])
        parts = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        kinds = kinds and [part[:length] for part, length in zip(kinds, lengths, strict=True)]
    for place, part in enumerate(parts):
        if not len(part):
            raise ValueError(f"input_ids must hold at least one token in every sequence, and sequence {place} has none")
    ragged = Ragged.of(parts)
    types = None if kinds is None else Ragged.of(kinds).values
    return Tokens(ragged.values, types if types is not None and types.any() else None, ragged.begins, width)


def _parts(name: str, value: Any) -> list[np.ndarray]:
    """Sequences of integers, each as an array."""
    if isinstance(value, Ragged):
        return list(value)
    if isinstance(value, list | tuple) and value and not np.isscalar(value[0]):
        parts = [checks.as_indices(f"{name}[{place}]", part) for place, part in enumerate(value)]
        for place, part in enumerate(parts):
            if part.ndim != 1:
                raise ValueError(f"{name}[{place}] must be one sequence of integers, got shape {part.shape}")
        return parts
    array = checks.as_indices(name, value)
    if array.ndim == 1 and array.size:
        array = array[None]
    if array.ndim != 2 and array.size:
        raise ValueError(f"{name} must have shape (batch, length), or be a list of sequences, got shape {array.shape}")
    return list(array)


def _lengths(mask: Any, widths: list[int]) -> np.ndarray:
    """How many tokens each row of a mask leaves, which must be its first ones."""
    if isinstance(mask, list | tuple) and mask and not np.isscalar(mask[0]):  # a list like that of the tokens
        rows = [checks.as_real("attention_mask", row) for row in mask]
    else:
        array = checks.as_real("attention_mask", mask)
        rows = list(array[None] if array.ndim == 1 else array)
    if [len(row) if row.ndim == 1 else -1 for row in rows] != widths:
        got = (len(rows), *rows[0].shape) if rows else (0,)
        raise ValueError(f"attention_mask must have the shape of input_ids, ({len(widths)}, {max(widths)}), got {got}")
    counts = []
    for place, row in enumerate(rows):
        flags = row != 0
        if ((row != 0) & (row != 1)).any():
            raise ValueError("attention_mask must hold 0 and 1: 1 at tokens, 0 at padding")
        count = int(flags.sum())
        if not flags[:count].all():
            where = "at the left" if flags.size and not flags[0] else "between tokens"
            raise ValueError(
                f"attention_mask must be 1 at tokens and 0 after them, and has 0 {where} in sequence {place}: pad at "
                "the right (padding_side='right'), or give a list of sequences without padding"
            )
        counts.append(count)
    return np.array(counts)
