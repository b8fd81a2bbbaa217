"""Sweeps on texts: their data, and one run, which is a `TextClassifier`'s."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.adapters import ADAPTERS
from nblora.errors import FormatError
from nblora.text.predicting import inputs_of, longest_text
from nblora.text.records import Records, read_parts
from nblora.training import evaluate

from .data import split_places
from .task import HISTORY, Data

_OF_ALL = ("method", "seed", "lr", "weight_decay", "schedule", "epochs", "batch_size", "rank")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class TextTask:
    """Everything that a run on texts needs besides its settings.

    Attributes
    ----------
    data : Data
        `x` are texts, (samples,), or pairs of them, (samples, 2); `y` labels of any type.
    model : str
        A folder or GGUF file, at the same place for every worker.
    target : str or list of str
        As in `PretrainedModel.adapt`.
    max_length : int or None
        Tokens that texts are cut at.
    threads : int
        Of each run.
    """

    data: Data
    model: str
    target: Any
    max_length: int | None
    threads: int

    def check(self, runs: Any) -> None:
        """ValueError for labels that training lacks, and for a setting that is not for texts."""
        known = set(self.data.y.tolist())
        for name in ("y_validation", "y_test"):
            labels = getattr(self.data, name)
            strange = [] if labels is None else [label for label in labels.tolist() if label not in known]
            if strange:
                raise ValueError(f"{name} holds the label {strange[0]!r}, which no text to train on has")
        for settings in runs:
            for name in settings:
                if name not in allowed(settings["method"]) and (name, settings[name]) != ("optimizer", "adamw"):
                    raise ValueError(f"{name} is no setting of method {settings['method']!r} on texts")

    def data_digest(self) -> str:
        """Return a name of the data's contents."""
        return str(self.data.hashed().hexdigest()[:16])

    def digest(self) -> str:
        """Return a name of data, model and what else decides a run's result."""
        digest = self.data.hashed()
        place = Path(self.model)
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if path.is_file():
                digest.update(path.name.encode())
                with open(path, "rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
        digest.update(repr((self.target, self.max_length, self.threads)).encode())
        return digest.hexdigest()[:16]

    def train(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Tune and measure with one combination of settings; return what its record says."""
        from nblora.estimators import TextClassifier

        chosen = {name: value for name, value in settings.items() if name not in ("seed", "optimizer")}
        classifier = TextClassifier(
            self.model, target=self.target, max_length=self.max_length, random_state=settings["seed"], **chosen
        )
        classifier.fit(self.data.x, self.data.y)
        metrics = self._metrics(classifier, "val", self.data.x_validation, self.data.y_validation)
        if self.data.x_test is not None:
            metrics |= self._metrics(classifier, "test", self.data.x_test, self.data.y_test)
        model, history = classifier.model_, classifier.history_
        return {
            "metrics": metrics,
            "trainable_parameters": model.parameter_count,
            "parameters_digest": hashlib.sha256(model.get_parameters().tobytes()).hexdigest(),
            "delta_lr": history.delta_lr,
            "history": {name: values for name, values in history.to_dict().items() if name in HISTORY},
        }

    def _metrics(self, classifier: Any, part: str, x: Any, y: Any) -> dict[str, float]:
        model, tokenizer = classifier.model_, classifier.tokenizer_
        texts, pairs = (x.tolist(), None) if x.ndim == 1 else (x[:, 0].tolist(), x[:, 1].tolist())
        longest = longest_text(model, tokenizer, self.max_length)
        inputs = inputs_of(model, tokenizer.encode(texts, pairs, max_length=longest))
        found = evaluate(model, inputs, np.searchsorted(classifier.classes_, y), batch_size=32)
        return {f"{part}_{name}": value for name, value in found.items()}


def allowed(method: str) -> tuple[str, ...]:
    """The settings that a run on texts can have."""
    from nblora.estimators import TextClassifier

    taken = TextClassifier().get_params(deep=False)
    adapter = ADAPTERS.get(method)
    of_method = () if adapter is None else (*adapter.settings(), *adapter.trained_by)
    return (*_OF_ALL, *(name for name in of_method if name in taken))


def read_texts(
    path: str | os.PathLike[str], *, validation: float = 0.2, test: float = 0.2, split_seed: int = 0
) -> Data:
    """Read labelled texts, and split them into parts to train on, to choose by, and to report on.

    Parameters
    ----------
    path : path
        A `.jsonl`, `.csv` or `.tsv` file of records with `text` and `label`, perhaps `text_pair`. Or a folder with
        `train`, `valid` and perhaps `test` in one of these forms, which are taken as they are.
    validation, test : float
        Shares of a file's records; `test` may be 0.
    split_seed : int
        The same seed, the same parts.

    Raises
    ------
    FormatError
        That names the file and the line; and for records without labels.
    """
    parts = read_parts(path)
    if parts["train"].kind != "labelled":
        raise FormatError(f"{parts['train'].path}: its records have no label: a sweep on texts needs text and label")
    if Path(path).is_dir():
        if "valid" not in parts:
            raise FormatError(f"{path}: holds no valid.jsonl (or .csv), which runs are chosen by")
        chosen = [_arrays(parts[name]) for name in ("train", "valid", "test") if name in parts]
    else:
        x, y = _arrays(parts["train"])
        places = split_places(len(x), validation, test, split_seed)
        chosen = [(x[part], y[part]) for part in places if len(part)]
    return Data(*(array for pair in chosen for array in pair))


def _arrays(records: Records) -> tuple[np.ndarray, np.ndarray]:
    texts, pairs = records.column("text") or [], records.column("text_pair")
    rows = texts if pairs is None else list(zip(texts, pairs, strict=True))
    return np.array(rows, dtype=object), np.array(records.column("label"))


def make_task(data: Data, model: str | os.PathLike[str], target: Any, max_length: Any, threads: int) -> TextTask:
    """A task of arrays or lists that are checked.

    Raises
    ------
    TypeError, ValueError
        For what is no texts, and arrays of different lengths.
    """
    arrays: dict[str, Any] = {name: None if value is None else np.array(value, dtype=object if name[0] == "x" else None)
              for name, value in vars(data).items()}  # fmt: skip
    for name, array in arrays.items():
        if array is None or name[0] == "y":
            continue
        if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 2) or not len(array):
            raise ValueError(f"{name} must hold texts, or pairs of them in each row, got shape {array.shape}")
        wrong = next((text for text in array.ravel().tolist() if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"{name} must hold texts for a model of text, got {wrong!r}")
        labels = arrays[f"y{name[1:]}"]
        if labels is None or labels.shape != array.shape[:1]:
            raise ValueError(f"y{name[1:]} must hold a label for each of the {len(array)} texts of {name}")
    length = None if max_length is None else checks.check_integer("max_length", max_length, 1)
    return TextTask(Data(**arrays), os.fspath(model), target, length, threads)
