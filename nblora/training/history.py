"""`History`: what a run recorded, one row an epoch."""

import csv
import io
import os
from collections.abc import Iterator
from typing import Any, overload

from nblora.storage.atomic import replace_whole

Row = dict[str, float]


def tally(sums: Row, figures: Row, counts: dict[str, int], norm: float, factor: float) -> None:
    """Add one update to the sums of a row, in place: figures by how much they are the mean of."""
    added = {name: value * counts["learnt"] for name, value in figures.items()}
    for name, value in {**added, **counts, "norms": norm, "updates": 1}.items():
        sums[name] = sums.get(name, 0) + value
    sums["factor"] = factor


class History:
    """One row for each epoch, as dicts of one set of keys.

    Columns: `epoch` and `step` (both counted from 1: the epoch, and the updates made by its end), `loss` (the mean over
    the epoch's batches, taken before each update), `accuracy` for classification losses, `val_loss` and
    `val_accuracy` with validation data, `lr` (of the epoch's last step), `grad_norm` (with clipping: the mean norm
    before it), `seconds` (training alone), `samples_per_second`, and of texts `tokens_per_second`. With
    `fit(eval_every=...)` a row is for so many updates, and `epoch` is the one that it ended in.

    Attributes
    ----------
    rows : list of dict
    delta_lr : dict of str to float
        The learning rate of each trained delta at the end, by the delta's name, before a schedule's factor: the one
        given, or the one that `fit` found.

    Notes
    -----
    `history["loss"]` is a column as a list, `history[-1]` a row; iteration goes over rows.
    """

    def __init__(self, rows: list[Row] | None = None, delta_lr: dict[str, float] | None = None) -> None:
        self.rows: list[Row] = [] if rows is None else rows
        self.delta_lr: dict[str, float] = {} if delta_lr is None else delta_lr

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        names: dict[str, None] = {}
        for row in self.rows:
            names.update(dict.fromkeys(row))
        return list(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, key: str) -> list[float | None]: ...
    @overload
    def __getitem__(self, key: int) -> Row: ...
    def __getitem__(self, key: int | str) -> Any:
        if not isinstance(key, str):
            return self.rows[key]
        if key not in self.columns:
            raise KeyError(f"no column {key!r}; there are {', '.join(self.columns) or 'none, no epoch has ended'}")
        return [row.get(key) for row in self.rows]

    def __contains__(self, key: object) -> bool:
        return key in self.columns

    def to_dict(self) -> dict[str, list[float | None]]:
        """Return {column: values}, None where a row has no such value."""
        return {name: self[name] for name in self.columns}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a header and one line an epoch, with every digit; an existing file is replaced whole."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        with replace_whole(path) as file:
            file.write(text.getvalue().encode())

    def __repr__(self) -> str:
        last = ", ".join(f"{name}={value:.6g}" for name, value in self.rows[-1].items()) if self.rows else "no epochs"
        return f"History({last})"
