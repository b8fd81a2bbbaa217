"""`finetune`: from a file of texts to an adapter that was reloaded and compared."""

import errno
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nblora.errors import FormatError
from nblora.text.labels import write_labels
from nblora.training import AdamW, Callback, EarlyStopping, History, evaluate, fit

from .folder import DESCRIPTION, HISTORY, Folder, digest, versions
from .rates import choose_rate
from .reading_back import compare, draw_history, load_finetuned, next_commands
from .settings import AUTO, EPOCHS, Settings
from .task import Task, as_fit, count_labels, make_task, read_data

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tuning made.

    Attributes
    ----------
    folder : Path
        The adapter's, or of `method="full"` the model's.
    task : str
    labels : list of str or None
    history : History
    metrics : dict
        "valid" and "test", where there are such records: the loss and, of a classification, the accuracy of what was
        saved; "best_step", the update after which it was.
    lr : float
    notes : list of str
        What the user should know.
    commands : list of str
        What to do next.
    description : dict
        The content of `finetune.json`.
    """

    folder: Path
    task: str
    labels: list[str] | None
    history: History
    metrics: dict[str, Any]
    lr: float
    notes: list[str]
    commands: list[str]
    description: dict[str, Any] = field(repr=False)


def finetune(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    task: str | None = None,
    method: str = "lora",
    rank: int = 8,
    alpha: float = 16.0,
    target: Any = "all-linear",
    lr: float | str = 2e-4,
    epochs: int = EPOCHS,
    iters: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    max_length: int = 512,
    long: str = "cut",
    valid: str | os.PathLike[str] | float | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    patience: int | None = None,
    learn_prompt: bool = False,
    seed: int = 0,
    resume: bool = False,
    progress: bool | None = None,
    tell: Tell | None = None,
) -> Finetuned:
    """Fine-tune a pretrained model on a file of texts, and write the adapter to a folder.

    Parameters
    ----------
    model : path-like
        A folder as transformers saves it, or a GGUF file, with its tokenizer.
    data : path-like
        A `.jsonl`, `.csv` or `.tsv` file, or a folder with `train`, `valid` and `test`. Records are {"text", "label"}
        (and "text_pair"), {"prompt", "completion"}, {"messages"} or {"text"}.
    output : path-like
        A new folder: the adapter as PEFT saves it, `labels.json`, `history.csv`, `finetune.json` (settings, versions,
        digests, metrics) and, where matplotlib is, `history.png`.
    task : {"sequence-classification", "causal-lm"}, optional
        By default what the records are for.
    method : str
        An adapter's name in `nblora.adapters.ADAPTERS`, such as "lora" or "dora", or "delta", of whose dense delta the
        file holds the best approximation of rank `rank`; "head", the head alone; "full", every parameter, which writes
        a model instead of an adapter.
    rank, alpha, target
        Of the adapters, as in `model.adapt`.
    lr : float or "auto"
        "auto" tries a short run at each of four rates.
    epochs : int
    iters : int, optional
        Updates, in place of epochs.
    batch_size, accumulate : int
        Records of a batch, and batches of an update.
    max_length : int
        Tokens of a record, special ones included.
    long : {"cut", "refuse"}
        What to do with longer ones.
    valid : path-like or float, optional
        Records held out, or their share of all; by default the folder's `valid`, or else a tenth. 0 holds out none.
    eval_every, save_every : int, optional
        Updates after which to validate, and to save what a killed run goes on from; by default an epoch.
    patience : int, optional
        Validations without improvement after which training ends.
    learn_prompt : bool
        Learn prompts too, and every turn of a conversation.
    seed : int
        Of a new head, of adapters, of what is held out, and of the order.
    resume : bool
        Go on with the run in the output folder, which was killed or interrupted. The same data and settings give the
        same adapter and history, bit for bit, as a run that was not. Where there is none yet, it begins.
    progress : bool, optional
        As in `fit`.
    tell : callable, optional
        Called with a line of text for whatever the user may want to know meanwhile.

    Returns
    -------
    Finetuned

    Raises
    ------
    FormatError
        For data, a model or an output folder that cannot be used; nothing is written then.
    TypeError, ValueError
        For arguments out of range.
    NonFiniteError
        Where training does not stay finite.
    OSError
        For what cannot be read or written.
    """
    settings = Settings.checked(
        model=model, data=data, output=output, task=task, method=method, rank=rank, alpha=alpha, target=target, lr=lr,
        epochs=epochs, iters=iters, batch_size=batch_size, accumulate=accumulate, max_length=max_length, long=long,
        valid=valid, eval_every=eval_every, save_every=save_every, patience=patience, learn_prompt=learn_prompt,
        seed=seed,
    )  # fmt: skip
    return run(settings, resume=resume, progress=progress, tell=tell or (lambda line: None))


def run(settings: Settings, *, resume: bool = False, progress: bool | None = None, tell: Tell) -> Finetuned:
    """See `finetune`."""
    folder = Folder(settings.output)
    _check_place(settings, folder)
    parts = read_data(settings)
    with folder.held():
        before = folder.description()
        digests = {"model": digest(settings.model), **{name: digest(each.path) for name, each in parts.items()}}
        _check_before(before, settings, digests, folder, resume)
        if before is None and resume:
            tell(f"there is no run in {folder.path} yet: it begins")
        task = make_task(settings, parts)
        for note in task.notes:
            tell(f"note: {note}")
        description = _describe(task, digests) if before is None else before
        if before is None:
            folder.describe(description)
        try:
            return _train(task, folder, description, progress, tell)
        except BaseException as error:
            if not folder.checkpoint.is_file():  # nothing was trained that could be lost
                folder.forget()
            elif isinstance(error, KeyboardInterrupt | OSError):
                tell("what was trained until the last saving is kept: --resume goes on, with the same --output")
            raise


def _check_place(settings: Settings, folder: Folder) -> None:
    """FormatError for an output that would write among what is read, OSError without a model."""
    if not Path(settings.model).exists():
        raise FileNotFoundError(errno.ENOENT, "no such model folder or file", settings.model)
    place = Path(os.path.realpath(folder.path))
    for given in (settings.model, settings.data):
        read = Path(os.path.realpath(given))
        if place == read or place in read.parents:
            raise FormatError(f"{folder.path}: is the output, and {given} is read from there; choose another output")


def _check_before(
    before: dict[str, Any] | None, settings: Settings, digests: dict[str, str], folder: Folder, resume: bool
) -> None:
    """FormatError for a folder with another run in it, and for a run that is to go on with something else."""
    if before is None:
        return
    if not resume:
        how = "goes on with it" if before["status"] == "running" else "prints what it made"
        raise FormatError(
            f"{folder.path}: holds a run already ({before['status']}): choose a new folder; --resume {how}"
        )
    if names := settings.differing(before["settings"]):
        was = before["settings"].get(names[0])
        raise FormatError(
            f"{folder.path / DESCRIPTION}: the run was started with {names[0]} {was!r}, and this one has "
            f"{settings.as_dict()[names[0]]!r}: resume with the same settings, or start anew in another folder"
        )
    for name, found in digests.items():
        if before["digests"].get(name) != found:
            what = settings.model if name == "model" else f"{settings.data} ({name})"
            raise FormatError(f"{what}: has changed since the run in {folder.path} was started")


def _describe(task: Task, digests: dict[str, str]) -> dict[str, Any]:
    model = task.model
    total = sum(int(np.prod(named.shape)) for named in model._parameters() if not named.parameter.state)
    data = {
        part: {
            "file": str(task.records[part].path),
            "records": len(task.records[part]),
            "tokens": examples.tokens,
            "longest": max(map(len, examples.ids)),
            "cut": examples.cut,
            "left_out": len(examples.dropped),
        }
        for part, examples in task.examples.items()
    }
    return {
        "status": "running",
        "task": task.kind,
        "records": task.records["train"].kind,
        "settings": task.settings.as_dict(),
        "versions": versions(),
        "digests": digests,
        "model_type": model.model_type,
        "parameters": total,
        "trainable_parameters": model.parameter_count,
        "data": data,
        "labels": count_labels(task),
        "notes": task.notes,
    }


def _train(task: Task, folder: Folder, description: dict[str, Any], progress: bool | None, tell: Tell) -> Finetuned:
    settings, model = task.settings, task.model
    if description["status"] == "finished":
        return _finished(task, folder, description)
    if "lr" not in description:
        rate: float | str = settings.lr
        if rate == AUTO:
            rate, trials, why = choose_rate(task)
            description["rates"] = [
                {"lr": trial.lr, "loss": trial.loss if math.isfinite(trial.loss) else None} for trial in trials
            ]
            description["why"] = why
            tell(why)
        description["lr"] = rate
        folder.describe(description)
    best = EarlyStopping("val_loss", patience=settings.patience, restore_best=True)
    held_out = "valid" in task.examples
    if settings.patience is not None and not held_out:
        raise ValueError("patience needs records held out for validation, and there are none")
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        history = fit(
            model,
            *as_fit(task.examples["train"]),
            optimizer=AdamW(description["lr"]),
            epochs=settings.epochs,
            steps=settings.iters,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            validation=as_fit(task.examples["valid"]) if held_out else None,
            eval_every=settings.eval_every,
            save_every=settings.save_every,
            callbacks=[*([best] if held_out else []), _Telling(tell)],
            length_grouping=True,
            seed=settings.seed,
            progress=progress,
            checkpoint=folder.checkpoint,
            resume=folder.checkpoint if folder.checkpoint.is_file() else None,
        )
    for warning in told:
        tell(f"note: {warning.message}")
    seconds = description.get("seconds", 0.0) + time.perf_counter() - began
    return _write(task, folder, description, history, best if held_out else None, seconds, tell)


class _Telling(Callback):
    """Says what each evaluation found."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        names = ("loss", "accuracy", "val_loss", "val_accuracy")
        figures = ", ".join(f"{name} {logs[name]:.4g}" for name in names if name in logs)
        self._tell(f"epoch {logs['epoch']:.0f}, update {logs['step']:.0f}: {figures}")


def _write(
    task: Task, folder: Folder, description: dict[str, Any], history: History, best: EarlyStopping | None,
    seconds: float, tell: Tell,
) -> Finetuned:  # fmt: skip
    """Write what was trained and what is known of it, read it back, and compare."""
    settings, model = task.settings, task.model
    with folder.put() as place, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        if settings.method == "full":
            model.save_pretrained(place)
        else:
            model.save_adapter(place, fold_delta=settings.rank if settings.method == "delta" else None)
    for warning in told:
        tell(f"note: {warning.message}")
    if task.classes is not None:
        write_labels(folder.path, task.classes)
    history.to_csv(folder.path / HISTORY)
    draw_history(folder)
    reloaded = load_finetuned(settings, task.kind, task.classes)
    description["reloaded_apart"] = apart = compare(task, reloaded, folder)
    if settings.method == "delta":
        tell(
            f"the adapter's file holds the dense deltas to rank {settings.rank}: its outputs lie {apart:.2g} of the "
            "largest from those of the whole, and the figures are those of the file"
        )
    saved = reloaded if settings.method == "delta" else model
    metrics: dict[str, Any] = {
        part: evaluate(saved, *as_fit(task.examples[part])) for part in ("valid", "test") if part in task.examples
    }
    metrics["best_step"] = history[-1 if best is None or not best.best_epoch else best.best_epoch - 1]["step"]
    description.update(metrics=metrics, status="finished", seconds=seconds)
    folder.describe(description)
    folder.checkpoint.unlink(missing_ok=True)
    return _result(task, folder, description, history)


def _finished(task: Task, folder: Folder, description: dict[str, Any]) -> Finetuned:
    """A run that is over: what it made."""
    folder.checkpoint.unlink(missing_ok=True)
    return _result(task, folder, description, _read_history(folder.path / HISTORY))


def _read_history(path: Path) -> History:
    import csv

    with open(path, encoding="utf-8", newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return History(rows)


def _result(task: Task, folder: Folder, description: dict[str, Any], history: History) -> Finetuned:
    commands = next_commands(task, folder.path)
    return Finetuned(
        folder.path, task.kind, task.classes, history, description["metrics"], description["lr"],
        description["notes"], commands, description,
    )  # fmt: skip
