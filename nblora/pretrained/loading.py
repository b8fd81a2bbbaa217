"""`load_pretrained`: a folder as transformers or sentence-transformers save it, as a model."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.errors import FormatError
from nblora.formats.model_files import MAX_JSON, ModelFiles, open_model
from nblora.storage.bounded import read_bounded

from . import gguf
from .config import Config, shortened
from .families import FAMILIES, Family
from .families.family import TASKS
from .image import ImageModel
from .model import Origin, Pooling
from .source import Checkpoint
from .text import TextModel

PathLike = str | os.PathLike[str]


def load_pretrained(
    path: PathLike,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    dtype: Any = "float32",
    seed: int | None = None,
    mmap: bool = False,
) -> TextModel | ImageModel:
    """Load a pretrained model from its folder.

    Parameters
    ----------
    path : path-like
        A folder as transformers or sentence-transformers save it: `config.json` and safetensors, in one file or sharded
        with its index. Or a `.gguf` file (extra `gguf`) of a Llama, Qwen2 or GPT-2 in F32, F16, BF16, Q8_0, Q4_1 or
        Q4_0, whose numbers are widened.
    task : {"sequence-classification", "causal-lm", "image-classification", "embedding"}, optional
        By default what `architectures` in `config.json` names; of a bare encoder "embedding".
    num_labels : int, optional
        Outputs of a classification; by default as many as `config.json` has labels, or 2.
    dtype : {"float32", "float64"}
        Of every parameter and computation. Narrower numbers are widened exactly.
    seed : int, optional
        Of a head that the file lacks, drawn from a normal distribution of `initializer_range`.
    mmap : bool
        Map float32 tensors of safetensors files and copy what is written to, where they are read as a rule. A file that
        is cut while it is mapped ends the process.

    Returns
    -------
    TextModel or ImageModel
        In evaluation mode. Only a head that the file lacked is trained; `adapt`, `load_adapter` and `unfreeze` choose
        more.

    Raises
    ------
    MissingExtraError
        For a GGUF file without the `gguf` package.
    FormatError
        For a folder that is broken, of an unknown `model_type`, with tensors missing or of wrong shapes, or whose
        `config.json` asks for an arithmetic that is not supported; the message names file, field or tensor.
    OSError
        For a file that cannot be read.
    """
    kind = checks.check_dtype(dtype)
    if task is not None:
        checks.check_choice("task", task, tuple(TASKS))
    labels = None if num_labels is None else checks.check_integer("num_labels", num_labels, 1)
    folder = Path(path)
    if folder.suffix.lower() == gguf.SUFFIX and not folder.is_dir():
        with gguf.open_gguf(folder) as model:
            return _load(model, Config(model.config, folder), task, labels, kind, seed, mmap)
    if not folder.is_dir():
        if not folder.exists():
            raise FileNotFoundError(2, "no such model folder", str(folder))
        raise FormatError(f"{folder}: expected a folder with config.json and its weights")
    _check_weights(folder)
    with open_model(folder) as model:
        if not model.config:
            raise FormatError(f"{folder}: holds no config.json; expected a folder as transformers saves it")
        return _load(model, Config(model.config, folder / "config.json"), task, labels, kind, seed, mmap)


def _load(
    model: ModelFiles, config: Config, task: str | None, labels: int | None, dtype: np.dtype, seed: Any, mmap: bool
) -> TextModel | ImageModel:
    family = _family(config)
    chosen, pooling = _task(model.path, config, family, task)
    if labels is not None and "classification" not in chosen:
        raise ValueError(f"num_labels is for a classification, and the task is {chosen!r}")
    bare = family.is_bare(list(model.tensors))
    names = {family.own_name(name, bare): name for name in model.tensors}
    source = Checkpoint(model, names, dtype, mmap)
    count = labels or config.labels() or 2
    drawn: set[str] = set()
    if "classification" in chosen:
        drawn = _draw_head(source, family, config, seed, labels)
    raw = _with_labels(config.raw, count) if labels not in (None, config.labels()) or drawn else dict(config.raw)
    origin = Origin(config.raw["model_type"], chosen, raw, count, pooling, str(model.path), names, tuple(sorted(drawn)))
    loaded = (ImageModel if family.of_images else TextModel)(origin, source)
    source.check()
    _check_left(source.left(), family, chosen, config)
    return loaded


def _draw_head(source: Checkpoint, family: Family, config: Config, seed: Any, labels: int | None) -> set[str]:
    """Have the layers of a head drawn that the file lacks, or that has not as many labels as were asked for."""
    last = family.head[-1]
    other = labels is not None and source.has(f"{last}.weight") and source.shape(f"{last}.weight")[0] != labels
    layers = [*family.head, family.pooler] if family.pooler else family.head
    rng = np.random.default_rng(seed)
    return source.draw(sorted(layers), config.number("initializer_range", 0.02), rng, (last,) if other else ())


def _family(config: Config) -> Family:
    kind = config.raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise config.fault(f"model_type is {shortened(kind)}; the families that can be loaded are {known}")
    return FAMILIES[kind]


def _task(folder: Path, config: Config, family: Family, task: str | None) -> tuple[str, Pooling]:
    """What to load for, and how an embedding is pooled."""
    modules = _modules(folder)
    if task is None:
        task = "embedding" if modules is not None else _named_task(config, family)
    if task not in family.tasks:
        kinds = ", ".join(map(repr, family.tasks))
        raise config.fault(f"a {config.raw['model_type']} can be loaded for {kinds}, not for {task!r}")
    pooling = modules if modules is not None else Pooling()
    return task, pooling


def _named_task(config: Config, family: Family) -> str:
    named = config.raw.get("architectures")
    if not named:
        if "embedding" in family.tasks:
            return "embedding"
        return family.tasks[0]
    name = named[0] if isinstance(named, list) else named
    for task in family.tasks:
        if name == family.architecture(task):
            return task
    if family.of_images and name == f"{family.called}Model":
        return "image-classification"
    raise config.fault(
        f"architectures names {shortened(name)}, which is none of "
        f"{', '.join(map(family.architecture, family.tasks))}: choose by task={'|'.join(map(repr, family.tasks))}"
    )


def _modules(folder: Path) -> Pooling | None:
    """What sentence-transformers' `modules.json` says of pooling, None without the file."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    entries = _read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FormatError(f"{path}: expected a list of modules")
    rows, normalised = "mean", False
    for entry in entries:
        kind, place = str(entry.get("type", "")).rpartition(".")[2], entry.get("path")
        if kind == "Transformer" and place in ("", None):
            continue
        if kind == "Pooling" and isinstance(place, str):
            rows = _pooled_rows(_inside(folder, place, path) / "config.json")
        elif kind == "Normalize":
            normalised = True
        else:
            known = "Transformer, Pooling, Normalize"
            raise FormatError(f"{path}: the module {shortened(entry)} is not supported; known are {known}")
    return Pooling(rows, normalised)


def _inside(folder: Path, place: str, path: Path) -> Path:
    if not re.fullmatch(r"[\w][\w.-]*", place):
        raise FormatError(f"{path}: names the folder {shortened(place)}, which is not a plain name")
    return folder / place


_POOLINGS = {"mean": "mean", "cls": "first", "lasttoken": "last"}


def _pooled_rows(path: Path) -> str:
    held = _read_json(path)
    if not isinstance(held, dict):
        raise FormatError(f"{path}: expected a JSON object")
    modes = [key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
             for key, value in held.items() if key.startswith("pooling_mode_") and value is True]  # fmt: skip
    if isinstance(held.get("pooling_mode"), str):
        modes = [held["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise FormatError(f"{path}: pools by {shortened(modes)}; supported is one of {', '.join(_POOLINGS)}")
    return _POOLINGS[modes[0]]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bounded(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is no JSON: {error}") from None


def _with_labels(raw: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A configuration of so many labels: named by numbers, where they were not as many."""
    result = dict(raw)
    if Config(raw, "").labels() != count:
        result["id2label"] = {str(label): f"LABEL_{label}" for label in range(count)}
        result["label2id"] = {f"LABEL_{label}": label for label in range(count)}
        result.pop("num_labels", None)
    return result


def _check_weights(folder: Path) -> None:
    """FormatError with the remedy where a folder's weights are pickles or GGUF files alone."""
    names = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return
    if files := [name for name in names if name.endswith(gguf.SUFFIX)]:
        raise FormatError(f"{folder}: holds no safetensors file but {files[0]}: pass that file, {folder / files[0]}")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".bin.index.json"))]
    if pickles:
        raise FormatError(
            f"{folder}: holds {pickles[0]}, a pickle, which could run foreign code: save it as safetensors with "
            "transformers, AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )


def _check_left(left: Mapping[str, str], family: Family, task: str, config: Config) -> None:
    """One warning for the heads of other tasks; FormatError for what nobody knows."""
    rest = {own: name for own, name in left.items() if not family.is_buffer(own)}
    if task == "causal-lm" and config.flag("tie_word_embeddings", family.tied):
        rest.pop("lm_head.weight", None)
    unknown = [name for own, name in rest.items() if not family.is_unused(own)]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise FormatError(
            f"{config.path}: the file holds tensors that a {config.raw['model_type']} does not have: "
            f"{', '.join(unknown[:5])}{more}"
        )
    if rest:
        warnings.warn(
            f"{config.path.parent if isinstance(config.path, Path) else config.path}: not used for {task!r}: "
            f"{', '.join(rest.values())}",
            UserWarning,
            stacklevel=4,
        )
