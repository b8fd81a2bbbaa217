"""`Task`: records, a model and a tokenizer that fit each other, and what of the model is trained."""

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from nblora.adapters import ADAPTERS
from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON
from nblora.pretrained import TextModel, load_pretrained
from nblora.pretrained.labels import name_labels
from nblora.storage.bounded import parse_object, read_bounded
from nblora.text.examples import Examples, check_vocabulary, class_examples, language_examples
from nblora.text.labels import read_labels
from nblora.text.records import Records, check_same_fields, read_parts, read_records
from nblora.text.tokens import Tokenizer, load_tokenizer

from .settings import SHARE, Settings

CLASSES, LANGUAGE = "sequence-classification", "causal-lm"


@dataclass
class Task:
    """What is trained, on what.

    Attributes
    ----------
    settings : Settings
    kind : str
        "sequence-classification" or "causal-lm".
    records : dict of str to Records
        "train", and "valid" and "test" where they are there.
    examples : dict of str to Examples
        The same.
    classes : list of str or None
    model : TextModel
        Its parameters are those of the file, and what is to be trained is trainable.
    tokenizer : Tokenizer
    notes : list of str
        What the user should know.
    """

    settings: Settings
    kind: str
    records: dict[str, Records]
    examples: dict[str, Examples]
    classes: list[str] | None
    model: TextModel
    tokenizer: Tokenizer
    notes: list[str]


def read_data(settings: Settings) -> dict[str, Records]:
    """The parts of the data; those held out are taken from "train" where there is no file of them.

    Raises
    ------
    FormatError
        For data that are broken or do not fit each other.
    """
    parts = read_parts(settings.data)
    valid = settings.valid
    if isinstance(valid, str):
        if "valid" in parts:
            raise FormatError(f"{parts['valid'].path}: is there, and --valid names {valid}: choose one of them")
        parts["valid"] = read_records(valid)
        check_same_fields(parts["valid"], parts["train"])
        return parts
    if "valid" in parts:
        if valid is not None:
            raise FormatError(f"{parts['valid'].path}: is there, and --valid asks for a share of the others")
        return parts
    share = SHARE if valid is None else valid
    if share:
        chosen = held_out(parts["train"], share, settings.seed)
        if valid and not len(chosen):
            raise FormatError(
                f"{parts['train'].path}: its {len(parts['train'])} records are too few to hold out {share:g} of them"
            )
        if len(chosen):
            rest = np.setdiff1d(np.arange(len(parts["train"])), chosen)
            parts["train"], parts["valid"] = parts["train"].part(rest), parts["train"].part(chosen)
    return parts


def held_out(records: Records, share: float, seed: int) -> np.ndarray:
    """Places of so large a share of the records, of each label alike; of a label that occurs once, none."""
    rng = np.random.default_rng(seed)
    labels = np.array(records.column("label") if records.kind == "labelled" else [""] * len(records))
    chosen = []
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        count = min(round(share * len(places)), len(places) - 1)
        chosen.append(places[:count])
    return np.sort(np.concatenate(chosen))


def make_task(settings: Settings, parts: dict[str, Records]) -> Task:
    """Load model and tokenizer, and make examples of the records.

    Raises
    ------
    FormatError
        For data, a tokenizer or a model that do not fit each other, as far as that is a file's fault.
    ValueError
        For settings that do not suit the data or the model.
    """
    kind = _kind(settings, parts["train"])
    classes = _classes(parts["train"], settings.model) if kind == CLASSES else None
    notes: list[str] = []
    if "valid" not in parts:
        notes.append("no records are held out for validation: what is kept is the state after the last update")
    model = _load(settings, kind, classes)
    tokenizer = load_tokenizer(settings.model)
    length = settings.max_length
    if model.body.longest is not None and model.body.longest < length:
        length = model.body.longest
        notes.append(f"the model has {length} positions: texts are cut there, and not at {settings.max_length} tokens")
    examples = {}
    for part, records in parts.items():
        if classes is not None:
            kinds = getattr(getattr(model.body, "embeddings", None), "types", None) is not None
            found = class_examples(records, tokenizer, classes, length, kinds=kinds)
        else:
            found = language_examples(records, tokenizer, length, learn_prompt=settings.learn_prompt)
        _check_long(found, records, part, length, settings, notes)
        check_vocabulary(found, records, tokenizer, model.body.table.in_features)
        examples[part] = found
    _choose_trained(model, settings)
    return Task(settings, kind, parts, examples, classes, model, tokenizer, notes)


def _kind(settings: Settings, records: Records) -> str:
    found = CLASSES if records.kind == "labelled" else LANGUAGE
    if settings.task not in (None, found):
        fields = ", ".join(records.rows[0])
        raise FormatError(
            f"{records.path}: has the fields {fields}, which are for {found!r}, not for {settings.task!r}"
        )
    if found == LANGUAGE and records.column("text_pair") is not None:
        raise FormatError(f"{records.path}: has text_pair without a label: pairs are for a classification")
    if settings.method == "head" and found == LANGUAGE:
        raise ValueError("method 'head' is for labelled texts: a language model has no head of its own to train")
    return found


def _classes(records: Records, model: str) -> list[str]:
    """Names of the classes: those of the model's own head, if it knows all of them, else as they sort."""
    labels = sorted(set(records.column("label") or []))
    if len(labels) < 2:
        raise FormatError(
            f"{records.path}: all {len(records)} records to train on have the label {labels[0]!r}; a classification "
            "needs at least two"
        )
    known = _known_classes(Path(model))
    if known is not None and set(labels) <= set(known):
        return known
    return sorted(labels, key=int) if all(label.isdecimal() and label.isascii() for label in labels) else labels


def _known_classes(model: Path) -> list[str] | None:
    """What the classes of a model's own head are called, by `labels.json` or else `config.json`."""
    if not model.is_dir():
        return None
    if (names := read_labels(model)) is not None:
        return names
    path = model / "config.json"
    named = parse_object(read_bounded(path, MAX_JSON), path).get("id2label") if path.is_file() else None
    if not isinstance(named, dict) or sorted(named) != sorted(map(str, range(len(named)))):
        return None
    return [str(named[str(place)]) for place in range(len(named))]


def _load(settings: Settings, kind: str, classes: list[str] | None) -> TextModel:
    with warnings.catch_warnings(record=True) as told:  # heads that are not used: nothing is lost by that
        warnings.simplefilter("always")
        count = None if classes is None else len(classes)
        model = cast(TextModel, load_pretrained(settings.model, task=kind, num_labels=count, seed=settings.seed))
    for warning in told:
        if not str(warning.message).partition("not used for")[1]:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if classes is not None:
        name_labels(model, classes)  # for other programs
    return model


def _check_long(
    found: Examples, records: Records, part: str, length: int, settings: Settings, notes: list[str]
) -> None:
    if not found.cut:
        return
    told = f"{found.cut} of {len(records)} records ({part}) have more than {length} tokens"
    if settings.long == "refuse":
        raise FormatError(f"{records.path}: {told}: raise --max-length, shorten them, or leave out --long refuse")
    notes.append(f"{told}, and were cut")
    if found.dropped:
        where = records.place(found.dropped[0])
        if not len(found):
            raise FormatError(f"{records.path}: nothing to learn is left of any record after {length} tokens")
        notes.append(
            f"of {len(found.dropped)} of them nothing to learn was left, and they are left out (first: {where})"
        )


def _choose_trained(model: TextModel, settings: Settings) -> None:
    if settings.method == "full":
        model.unfreeze("*")
    elif settings.method == "head":
        model.freeze()
        model.unfreeze([re.compile(re.escape(name)) for name in model.head.own])
    else:
        target = settings.target if isinstance(settings.target, str) else list(settings.target)
        scale: dict[str, Any] = {"alpha": settings.alpha} if "alpha" in ADAPTERS[settings.method].settings() else {}
        model.adapt(target, settings.method, rank=settings.rank, seed=settings.seed, **scale)


def count_labels(task: Task) -> dict[str, int] | None:
    """How many records to train on have each label."""
    if task.classes is None:
        return None
    found = Counter(np.asarray(task.examples["train"].targets).tolist())
    return {name: found.get(place, 0) for place, name in enumerate(task.classes)}


def as_fit(examples: Examples) -> tuple[Any, Any]:
    """What `fit` takes."""
    return examples.inputs, examples.targets
