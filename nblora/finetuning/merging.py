"""Merging what `finetune` wrote by loading the model: into a GGUF file, or a base that lacks the head."""

import os
import warnings
from typing import Any, cast

from nblora.adapters import Adapter
from nblora.errors import FormatError
from nblora.formats.peft import PeftAdapter
from nblora.pretrained import TextModel, load_pretrained
from nblora.pretrained.labels import name_labels
from nblora.text.labels import read_labels, write_labels

from .task import CLASSES, LANGUAGE

PathLike = str | os.PathLike[str]
TASKS = {"SEQ_CLS": CLASSES, "CAUSAL_LM": LANGUAGE}
"""What PEFT calls the tasks of text."""


def merge_model(
    base: PathLike, adapter: PathLike, output: PathLike, *, dtype: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Load a model and its adapter, merge, and write a folder that transformers loads.

    Parameters
    ----------
    base : path-like
        A model's folder, or a GGUF file.
    adapter : path-like
        A PEFT adapter of a task of text.
    output, dtype, force
        As in `PretrainedModel.save_pretrained`.

    Returns
    -------
    dict
        "output", "task", "layers" (names of those that were adapted), "whole" (that the adapter brought) and "labels".

    Raises
    ------
    FormatError
        For files that are broken or do not fit each other.
    """
    with PeftAdapter(adapter) as opened:
        said = opened.config.raw.get("task_type")
        kind = TASKS.get(said or "CAUSAL_LM")
        matrices = [info.shape for info in opened.replaced.values() if len(info.shape) == 2]
    if kind is None:
        raise FormatError(f"{adapter}: is for the task {said!r}; known are {', '.join(TASKS)}")
    labels = read_labels(adapter) if kind == CLASSES else None
    count = None if kind != CLASSES else len(labels) if labels else min(shape[0] for shape in matrices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # heads of other tasks
        model = cast(TextModel, load_pretrained(base, task=kind, num_labels=count, seed=0))
    model.load_adapter(adapter)
    if labels:
        name_labels(model, labels)
    layers = dict(model.named_layers())
    model.merge().save_pretrained(output, dtype=dtype, force=force)
    if labels:
        write_labels(output, labels)
    adapted = [name for name, layer in layers.items() if isinstance(layer, Adapter)]
    whole = [name for name, layer in layers.items() if name not in adapted and layer.trainable and name != ""]
    return {"output": str(output), "task": kind, "layers": adapted, "whole": whole, "labels": labels}
