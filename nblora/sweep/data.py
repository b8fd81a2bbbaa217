"""Where a sweep's arrays come from: tables and arrays of your own, scikit-learn's data sets; and how they are split."""

import csv
import importlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.errors import FormatError, MissingExtraError
from nblora.storage.bounded import open_named

from .task import Data

SCIKIT_LEARN = ("breast_cancer", "diabetes", "digits", "iris", "wine")
TABLES = (".csv", ".tsv", ".parquet")
LABELS = ("label", "target", "y", "class")
"""What the column to predict is called where nobody says."""
FORMS = (
    "an .npz file of x and y, or of x, y, x_validation, y_validation and perhaps x_test, y_test; or a .csv, .tsv or "
    ".parquet table with a named column for each feature and one for the label"
)
SPLIT = {"validation": 0.2, "test": 0.2, "split_seed": 0}
"""Shares of the samples, and the seed by which they are drawn."""
SMALL = 64 << 20
EXPANSION = 200
"""Arrays of more than SMALL bytes may be this many times as large as the .npz file that they are packed into."""
BLOCK = 4096
"""Rows of a table that are read at a time."""
NO_ROWS = "must have a line of column names and at least one line of values"
MOST_NAMES = 1 << 24
"""Characters of a table's first line."""

Column = Sequence[Any] | np.ndarray


def read_data(
    path: str | os.PathLike[str],
    *,
    loss: str = "cross_entropy",
    label: str | None = None,
    features: Sequence[str] | None = None,
    standardise: bool | None = None,
    **split: Any,
) -> Data:
    """Read a file of your own, and split it into training, validation and test samples.

    Parameters
    ----------
    path : path
        A `.csv` (or `.tsv`) file whose first line names its columns, a `.parquet` file (needs pyarrow), or an `.npz` of
        `x` and `y`, or of all parts by the names of `Data`, which is not split again.
    loss : str
        For "cross_entropy" the label may be text: classes are then numbered in sorted order. For other losses it is a
        number.
    label : str, optional
        The column to predict; by default the one called "label", "target", "y" or "class".
    features : list of str, optional
        The columns to predict from; by default all others.
    standardise : bool, optional
        Bring each feature to mean 0 and standard deviation 1 by the training samples. By default tables are, arrays are
        not.
    **split
        `validation` and `test`, the shares of the samples (0.2 and 0.2), and `split_seed` (0).

    Raises
    ------
    FormatError
        For a file that holds something else; the message names the column and the row.
    """
    name = Path(path)
    suffix = name.suffix.lower()
    if suffix == ".npz":
        return _read_arrays(name, {"label": label, "features": features} | split, standardise, loss)
    if suffix not in TABLES:
        raise FormatError(f"{name}: must be {FORMS}")
    try:
        columns = _read_parquet(name) if suffix == ".parquet" else _read_csv(name)
        target = _label_column(columns, label)
        chosen = [key for key in columns if key != target] if features is None else list(features)
        if not chosen:
            raise ValueError(f"has no column to predict {target!r} from")
        x = np.stack([_numbers(key, _column(columns, key)) for key in chosen], axis=1).astype(np.float32)
        y = _classes(target, columns[target]) if loss == "cross_entropy" else _numbers(target, columns[target])
        return split_data(x, y, standardise=standardise is not False, **split)
    except (MissingExtraError, FormatError):
        raise
    except (TypeError, ValueError) as error:
        raise FormatError(f"{name}: {error}") from error


def split_data(
    x: Any, y: Any, *, validation: float = 0.2, test: float = 0.2, split_seed: int = 0, standardise: bool = False
) -> Data:
    """Split samples at random into training, validation and test parts.

    Parameters
    ----------
    x : array_like, shape (samples, features)
    y : array_like, shape (samples,) or (samples, outputs)
    validation, test : float
        Their shares of the samples; `test` may be 0.
    split_seed : int
        The same seed, the same parts.
    standardise : bool
        Bring each feature to mean 0 and standard deviation 1 by the training samples.

    Raises
    ------
    ValueError
        For shares that leave a part without samples.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim < 2 or len(x) != len(y):
        raise ValueError(f"x must have shape (samples, features), y as many samples; got {x.shape} and {y.shape}")
    trained, chosen, tested = split_places(len(x), validation, test, split_seed)
    if standardise:
        mean, deviation = x[trained].mean(0), x[trained].std(0)
        x = ((x - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    if y.dtype.kind == "f" and y.ndim == 1:
        y = y.astype(np.float32)[:, None]
    held_out = (x[tested], y[tested]) if len(tested) else (None, None)
    return Data(x[trained], y[trained], x[chosen], y[chosen], *held_out)


def split_places(count: int, validation: float, test: float, split_seed: int) -> tuple[np.ndarray, ...]:
    """Which of so many samples are to train on, to choose by and to report on; ValueError for a part without any."""
    shares = [checks.check_fraction("validation", validation), checks.check_fraction("test", test)]
    if not 0 < shares[0] < 1 - shares[1]:
        raise ValueError(f"validation and test must leave samples for training, got {validation} and {test}")
    order = np.random.default_rng(checks.check_integer("split_seed", split_seed, 0)).permutation(count)
    chosen, tested, trained = np.split(order, np.cumsum([round(share * count) for share in shares]))
    if not (len(chosen) and len(trained)):
        raise ValueError(f"{count} samples are too few to hold out {validation:g} of them for validation")
    return trained, chosen, tested


def load_scikit_learn(name: Any, **split: Any) -> Data:
    """One of the data sets that come with scikit-learn, standardised by its training part, split at random."""
    name = checks.check_choice("data.sklearn", name, SCIKIT_LEARN)
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"the data set {name!r} comes with scikit-learn: pip install 'nblora[sklearn]'"
        ) from error
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return split_data(x, y if y.dtype.kind == "f" else y.astype(np.int64), standardise=True, **split)


# --- arrays ----------------------------------------------------------------------------------------------------------


def _read_arrays(path: Path, options: Mapping[str, Any], standardise: bool | None, loss: str) -> Data:
    """An .npz file: of x and y alone, or with arrays named like the fields of `Data`."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        of_tables = sorted({"label", "features"} & given.keys())
        if of_tables:
            raise ValueError(f"{' and '.join(of_tables)} name columns of a table, and an .npz has arrays")
        arrays = _arrays(path)
        for name, array in arrays.items():
            if name.startswith("x") or loss != "cross_entropy":
                _check_numbers(name, array)
        if set(arrays) == {"x", "y"}:
            y = arrays["y"]
            if loss == "cross_entropy" and y.ndim == 1:
                y = _classes("y", y)
            return split_data(arrays["x"], y, standardise=bool(standardise), **given)
        if given or standardise:
            raise ValueError("an .npz with parts of its own is taken as it is, neither split nor standardised")
        return Data(**arrays)
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise FormatError(f"{path}: must be {FORMS}; this one is not: {error}") from error


def _check_numbers(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "biuf" or not array.size:
        raise ValueError(f"{name} must hold real numbers, got shape {array.shape} of {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must hold finite numbers, got NaN or infinity")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an .npz file; ValueError for what is none, for one that is damaged, and for a bomb."""
    with os.fdopen(open_named(path), "rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                unpacked = sum(entry.file_size for entry in file.zip.infolist())
                if unpacked > max(SMALL, EXPANSION * os.fstat(opened.fileno()).st_size):
                    raise ValueError(f"its arrays are more than {EXPANSION} times as large as the file")
                return {name: file[name] for name in file.files}
        except MemoryError:
            raise ValueError("its arrays are larger than the memory") from None
        except Exception as error:  # of zipfile, zlib, NumPy: a damaged archive raises what it likes
            raise ValueError(f"{type(error).__name__}: {error}") from error


# --- tables ----------------------------------------------------------------------------------------------------------


class _Text(Sequence[str]):
    """A column of text, kept in as little memory as the file: the cells of a block of rows are one string."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._length = 0

    def extend(self, cells: Sequence[str]) -> None:
        """Add the cells of at most BLOCK rows, of fewer in the last block only."""
        block = "\0".join(cells)
        if block.count("\0") >= len(cells):
            raise ValueError("not a table of UTF-8 text: holds the character NUL")
        self._blocks.append(block)
        self._length += len(cells)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> Any:
        return self._blocks[place // BLOCK].split("\0")[place % BLOCK]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(block.split("\0") for block in self._blocks)


def _read_csv(path: Path) -> dict[str, Column]:
    """Columns of text by name. Commas, semicolons and tabs separate, whichever the first line has most of."""
    with open(open_named(path), newline="", encoding="utf-8-sig") as file:
        try:
            first = file.readline(MOST_NAMES)
            file.seek(0)
            rows = filter(None, csv.reader(file, delimiter=max(",;\t", key=first.count)))
            names = [name.strip() for name in next(rows, [])]
            if not names:
                raise ValueError(NO_ROWS)
            if len(set(names)) < len(names) or all(_is_number(name) for name in names):
                raise ValueError(f"its first line must name the columns, each once, got {', '.join(names)}")
            columns = [_Text() for _ in names]
            count = 0
            while block := list(itertools.islice(rows, BLOCK)):
                for number, row in enumerate(block, count + 1):
                    if len(row) != len(names):
                        raise ValueError(f"row {number} has {len(row)} values for {len(names)} columns")
                count += len(block)
                for column, cells in zip(columns, zip(*block, strict=True), strict=True):
                    column.extend(cells)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"not a table of UTF-8 text: {error}") from error
    if not count:
        raise ValueError(NO_ROWS)
    return dict(zip(names, columns, strict=True))


def _read_parquet(path: Path) -> dict[str, Column]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(f"{path}: Parquet files need pyarrow: pip install pyarrow") from error
    with os.fdopen(open_named(path), "rb") as file:
        table = parquet.read_table(file)  # pyarrow's errors are ValueErrors
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _label_column(columns: Mapping[str, Column], label: str | None) -> str:
    there = ", ".join(map(repr, columns))
    if label is not None:
        _column(columns, label)
        return label
    found = [name for name in columns if name.lower() in LABELS]
    if len(found) != 1:
        raise ValueError(
            f"label must name the column to predict: {'several' if found else 'none'} of the columns {there} "
            f"{'are' if found else 'is'} called {', '.join(map(repr, LABELS))}"
        )
    return found[0]


def _column(columns: Mapping[str, Column], name: str) -> Column:
    if name not in columns:
        raise ValueError(f"has no column {name!r}; there are {', '.join(map(repr, columns))}")
    return columns[name]


def _numbers(name: str, column: Column) -> np.ndarray:
    """A column as float64; ValueError that names the first value that is no finite number."""
    try:
        is_text = isinstance(column, _Text)
        values = np.fromiter(map(float, column), np.float64) if is_text else np.asarray(column).astype(np.float64)
    except (TypeError, ValueError):
        place = next(place for place, value in enumerate(column) if not _is_number(value))
        raise ValueError(
            f"column {name!r} must hold numbers, got {column[place]!r} in row {place + 1}: list the columns to use "
            "in features, or encode this one as numbers"
        ) from None
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"column {name!r} must hold finite numbers, got {column[place]!r} in row {place + 1}")
    return values


def _classes(name: str, column: Column) -> np.ndarray:
    """Labels as integers: those that are integers from 0 as they are, others numbered in sorted order."""
    if not all(map(_is_number, column)):
        if any(value is None or not str(value).strip() for value in column):
            raise ValueError(f"column {name!r} must hold a label in every row, got an empty one")
        numbers = {text: number for number, text in enumerate(sorted({str(value).strip() for value in column}))}
        return np.fromiter((numbers[str(value).strip()] for value in column), np.int64)
    values = _numbers(name, column)
    if np.any(values != np.round(values)):
        place = int(np.argmax(values != np.round(values)))
        raise ValueError(
            f'column {name!r} must hold classes for loss = "cross_entropy", got {column[place]!r} in row {place + 1}: '
            'for numbers take loss = "mse"'
        )
    whole = values.astype(np.int64)
    return whole if whole.min() >= 0 else np.unique(whole, return_inverse=True)[1].astype(np.int64)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
