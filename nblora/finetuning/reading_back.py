"""What is done with an adapter that was written: it is loaded again, compared, drawn, and said how to go on with."""

import contextlib
import shlex
import warnings
from pathlib import Path
from typing import cast

import numpy as np

from nblora.errors import MissingExtraError, NbloraError
from nblora.pretrained import TextModel, load_pretrained

from .folder import FIGURE, HISTORY, Folder
from .settings import Settings
from .task import CLASSES, Task

_COMPARED, _LENGTH = 4, 64
"""Examples whose outputs are compared, and how many tokens of each: logits of a language model are large."""
_TOLERANCE = 1e-4
"""How far they may lie apart, as a share of the largest: rounding, in another order of sums."""


def load_finetuned(settings: Settings, kind: str, classes: list[str] | None) -> TextModel:
    """The model that an output folder describes, from its files."""
    count = None if classes is None else len(classes)
    full = settings.method == "full"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # heads of other tasks
        loaded = load_pretrained(settings.output if full else settings.model, task=kind, num_labels=count, seed=0)
    model = cast(TextModel, loaded)
    return model if full else model.load_adapter(settings.output)


def compare(task: Task, reloaded: TextModel, folder: Folder) -> float:
    """How far the outputs of what was reloaded lie from those of the model, as a share of the largest.

    Raises
    ------
    NbloraError
        Where that is more than rounding. Of a folded delta it is an approximation's, and only said.
    """
    examples = task.examples.get("valid", task.examples["train"])
    first = examples.part(range(min(_COMPARED, len(examples)))).inputs
    inputs = {name: [each[:_LENGTH] for each in values] for name, values in first.items()}
    wanted, found = task.model(**inputs), reloaded(**inputs)
    apart = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))
    if task.settings.method != "delta" and not apart <= _TOLERANCE:
        raise NbloraError(
            f"{folder.path}: what was written computes something else than what was trained: outputs differ by "
            f"{apart:.3g} of the largest. This is a fault of nblora or of the disk; the folder should not be used"
        )
    return apart


def draw_history(folder: Folder) -> None:
    """The learning curve, where matplotlib is."""
    from nblora.plots import draw_file, style
    from nblora.storage.atomic import replace_whole

    with contextlib.suppress(MissingExtraError):
        figure = draw_file(folder.path / HISTORY)
        with style(), replace_whole(folder.path / FIGURE) as file:
            figure.savefig(file, format="png")


def next_commands(task: Task, folder: Path) -> list[str]:
    """What to do next."""
    settings, output = task.settings, shlex.quote(str(folder))
    full, base = settings.method == "full", shlex.quote(settings.model)
    model = f"--model {output}" if full else f"--model {base} --adapter {output}"
    called = f"predict {model} --data FILE" if task.kind == CLASSES else f"generate {model} --prompt TEXT"
    merging = [] if full else [f"nblora merge {base} --adapter {output} --output MERGED"]
    return [f"nblora {called}", *merging]
