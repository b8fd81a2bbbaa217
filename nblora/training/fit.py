"""`fit`: train a model on arrays."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from nblora import checks
from nblora.layers import Layer, tree

from .calibration import AUTO, check_delta_lr
from .callbacks import check_callbacks
from .data import Samples, check_samples
from .history import History
from .losses import Loss, as_loss
from .optimizers import as_optimizer
from .run import EVALUATION_BATCH, Run, mean_figures, restore_modes
from .schedules import as_schedule
from .step import Step


def fit(
    model: Layer,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    optimizer: Any = "adamw",
    lr: float | None = None,
    epochs: int = 10,
    steps: int | None = None,
    batch_size: int = 32,
    validation: tuple[Any, Any] | None = None,
    eval_every: int | None = None,
    callbacks: Any = (),
    schedule: Any = None,
    clip_norm: float | None = None,
    delta_lr: float | str | None = AUTO,
    accumulate: int = 1,
    recompute: bool = False,
    length_grouping: bool = False,
    base_dropout: bool = False,
    shuffle: bool = True,
    seed: int | np.random.Generator | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> History:
    """Train the trainable parameters of a model, in place.

    Parameters
    ----------
    model : Layer
        A layer, an adapter or a `Sequential`. It trains in training mode and is evaluated in evaluation mode; at the
        end it is in the mode it came in.
    x : array_like of real numbers, shape (samples, ..., in_features)
        Batches are cast to the model's dtype as they are cut, so float16 and integers take no more memory than they do.
        Of a pretrained model: what it is called with, texts as a list of sequences of token ids, an array, or a dict of
        `input_ids`, `attention_mask` and `token_type_ids`; images as an array.
    y : array_like
        What the loss compares with: outputs for "mse", integer labels for "cross_entropy", 0 and 1 for
        "binary_cross_entropy". Of a causal model: labels like the token ids, -100 where nothing is to be learnt (the
        model shifts them by one), or None to learn every token.
    loss : {"mse", "cross_entropy", "binary_cross_entropy"} or Loss
        A pretrained model has a default: what its task learns by.
    optimizer : {"adamw", "sgd"} or Optimizer
        A name takes the optimiser's defaults; `AdamW(weight_decay=0.1)` and the like set them.
    lr : float, optional
        Learning rate of an optimiser given by name; default: its own, 0.001 for "adamw" and 0.01 for "sgd".
    epochs : int
        Passes over the data, those before `resume` included.
    steps : int, optional
        Updates after which training ends, in place of `epochs`.
    batch_size : int
        Samples of a step; the last batch of an epoch may be smaller.
    validation : tuple (x, y), optional
        Evaluated after each epoch, and where training ends.
    eval_every : int, optional
        Evaluate, and begin a new row of the history, after so many updates instead; callbacks' `on_epoch_end` is called
        then.
    callbacks : list of Callback
        `EarlyStopping` and your own.
    schedule : {"constant", "cosine"} or Schedule, optional
        Factor on all learning rates, the delta's included, at each step.
    clip_norm : float, optional
        Scale the gradient of each step, the delta's included, so that its global norm is at most this. A norm must be
        known before the update, so this takes the unfused path, which holds dense gradients.
    delta_lr : "auto", float or None
        Learning rate of deltas, which keep their own momentum rule whatever the optimiser: V = m V + (1 - m) dD,
        D -= delta_lr V. "auto" finds one for each layer on the first batches, without training on them: such that the
        steps of all deltas together move their layers' outputs by a tenth, whatever m, c, the width and the loss's
        scale are. Where steps come to promise a larger part of the loss than at first, it lowers them.
        `History.delta_lr` has what they are at the end, a number near it is where to begin by hand, and None takes the
        optimiser's, which rarely suits. Where a run does not stay finite, "auto" halves these rates and trains the
        epoch again; a warning tells of it.
    accumulate : int
        Batches whose gradients are added up for one step, which then equals one batch of all their samples: a smaller
        `batch_size` takes less memory.
    recompute : bool
        Of a pretrained model: keep only what enters its blocks, and compute each again on the way back. Takes less
        memory, and more time.
    length_grouping : bool
        Make batches of texts of like length.
    base_dropout : bool
        Of a pretrained model: drop elements and weights of attention in training, as its `config.json` says
        (`hidden_dropout_prob`, `attention_dropout` and the like). Without it only adapters drop (`lora_dropout`).
    shuffle : bool
        Draw a new order of the samples for each epoch.
    seed : int or Generator, optional
        Of that order, and of the base's dropout. That of adapters has random states of its own.
    progress : bool, optional
        Show a bar with the loss, samples/s (of texts tokens/s) and the time left; default: where standard error is a
        terminal.
    checkpoint : path, optional
        After each epoch, write what is trained, a digest of the rest, and the run's state to this file, atomically.
        `nblora.load(file, base=model)` makes the model of it and of its frozen base.
    save_every : int, optional
        Write it after so many updates instead, and where training ends. Where `delta_lr` is "auto" an epoch may have to
        start again, and it is written after whole epochs all the same.
    resume : path, optional
        Go on from such a file: model, optimiser, callbacks, schedule's position and random states are brought to where
        they were, and the run then equals an uninterrupted one bit for bit, given the same data and arguments. Where
        the file's run has `epochs` epochs already, nothing more is trained.

    Returns
    -------
    History
        One row an epoch, or for each `eval_every` updates.

    Raises
    ------
    NonFiniteError
        When the loss, a gradient or a parameter is not finite; the message names layer and step.
    FormatError
        For a file to resume from that is broken or of another model or optimiser.
    TypeError, ValueError
        For arguments of the wrong kind or out of range; nothing has been changed.

    Notes
    -----
    When training ends with an error or is interrupted (Ctrl-C), parameters, velocities and random states are brought
    back to the end of the last whole epoch (with `eval_every` or `save_every`: to where the last of these was).
    This takes two copies of the trained parameters and velocities, since one must stay whole while the other is
    written: memory for them twice more.

    Layers take the fused sweep, which never holds a dense gradient, unless `clip_norm` is set or the optimiser needs
    the dense gradient of a trained weight: AdamW, and SGD with momentum, for a layer whose own weight is trained.

    Examples
    --------
    >>> import numpy as np, nblora
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(64, 4)).astype("float32")
    >>> adapter = nblora.LoRAAdapter(nblora.Dense.random(4, 3, seed=0), rank=2, seed=0)
    >>> history = nblora.fit(adapter, x, x[:, :3], loss="mse", epochs=5, seed=0)
    >>> history["loss"][-1] < history["loss"][0]
    True
    """
    check_model(model)
    objective = as_loss(model._loss_name() if loss is None else loss)
    rates = as_optimizer(optimizer, lr)
    several = checks.check_integer("accumulate", accumulate, 1)
    grouped = checks.check_flag("length_grouping", length_grouping)
    samples = check_samples(("x", "y"), x, y, model, objective)
    if grouped and isinstance(samples.x, np.ndarray):
        raise ValueError("length_grouping is for texts, and the samples of x are all of one size: leave it out")
    drops = checks.check_flag("base_dropout", base_dropout)
    shuffles = checks.check_flag("shuffle", shuffle)
    rng = _generator(seed) if shuffles or drops else None
    run = Run(
        model,
        samples,
        _check_validation(validation, model, objective),
        Step(
            model,
            objective,
            rates,
            check_delta_lr("delta_lr", delta_lr),
            None if clip_norm is None else checks.check_positive("clip_norm", clip_norm),
            accumulates=several > 1,
            recompute=checks.check_flag("recompute", recompute),
        ),
        as_schedule(schedule),
        epochs=checks.check_integer("epochs", epochs, 1),
        batch_size=checks.check_integer("batch_size", batch_size, 1),
        rng=rng if shuffles else None,
        checkpoint=None if checkpoint is None else _check_target(checkpoint),
        accumulate=several,
        grouped=grouped,
        steps=_check_count("steps", steps),
        eval_every=_check_count("eval_every", eval_every),
        save_every=_check_count("save_every", save_every),
    )
    run.callbacks = check_callbacks(callbacks, run.columns())
    shown = None if progress is None else checks.check_flag("progress", progress)
    source = None if resume is None else _check_path("resume", resume)
    model._check_writeable()
    if not drops:
        return run.start(source, shown)
    model._drop_base(rng)
    try:
        return run.start(source, shown)
    finally:
        model._drop_base(None)


def evaluate(
    model: Layer, x: Any, y: Any = None, *, loss: Any = None, batch_size: int = EVALUATION_BATCH
) -> dict[str, float]:
    """Compute a model's mean loss, and the accuracy of a classification loss, in evaluation mode.

    Parameters
    ----------
    model, x, y, loss
        As in `fit`.
    batch_size : int
        Samples computed together.

    Returns
    -------
    dict
        `{"loss": ...}` or `{"loss": ..., "accuracy": ...}`. The model's mode is left as it was.
    """
    check_model(model)
    objective = as_loss(model._loss_name() if loss is None else loss)
    samples = check_samples(("x", "y"), x, y, model, objective)
    size = checks.check_integer("batch_size", batch_size, 1)
    modes = tree.modes(model)
    model.eval()
    try:
        with model._backend.lending():
            return mean_figures(model, samples, objective, size)
    finally:
        restore_modes(modes)


def check_model(model: Any) -> None:
    """TypeError for what is no layer, RuntimeError for a closed one."""
    if not isinstance(model, Layer):
        got = "None" if model is None else f"an object of type {type(model).__name__}"
        raise TypeError(f"model must be a layer, an adapter or a Sequential, got {got}")
    model._require_open()


def _check_validation(validation: Any, model: Layer, loss: Loss) -> Samples | None:
    if validation is None:
        return None
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise TypeError(f"validation must be a pair (x, y), got an object of type {type(validation).__name__}")
    x, y = validation
    return check_samples(("validation x", "validation y"), x, y, model, loss)


def _check_count(name: str, value: Any) -> int | None:
    return None if value is None else checks.check_integer(name, value, 1)


def _generator(seed: Any) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):  # a child of known kind, whose state a checkpoint can hold
        return np.random.default_rng(int(seed.integers(2**63)))
    if seed is not None:
        seed = checks.check_integer("seed", seed, 0)
    return np.random.default_rng(seed)


def _check_path(name: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {path!r}")
    return Path(os.fspath(path))


def _check_target(path: Any) -> Path:
    target = _check_path("checkpoint", path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"checkpoint: the folder {str(target.parent)!r} does not exist")
    return target
