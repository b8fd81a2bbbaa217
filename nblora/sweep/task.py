"""What all runs of a sweep share, and one run of it: the same record in any process, but for how long it took."""

import contextlib
import hashlib
import itertools
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from nblora import Dense, Sequential
from nblora.adapters import ADAPTERS, Adapter
from nblora.errors import NonFiniteError
from nblora.layers import Layer, tree
from nblora.training import SGD, AdamW, evaluate, fit
from nblora.training.losses import CrossEntropy, as_loss

DEFAULT_LOSS = "cross_entropy"
MOST_CLASSES = 1_000_000
"""Of a network that is drawn: its last layer has an output for each number up to the largest label."""
HISTORY = ("loss", "accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Data:
    """Arrays to train on, to choose by (validation), and, if given, to report on (test)."""

    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None

    def hashed(self) -> Any:
        """Return a SHA-256 of the contents, to which more may be added."""
        digest = hashlib.sha256()
        for field in fields(self):
            add_array(digest, field.name, getattr(self, field.name))
        return digest


@dataclass(frozen=True)
class Task:
    """Everything that a run needs besides its settings.

    Attributes
    ----------
    data : Data
    base : Layer or None
        The pretrained model, which every run clones; None draws a network from each run's seed.
    hidden : tuple of int
        Widths of that network's hidden layers.
    loss : str
        As in `nblora.fit`.
    target, modules_to_save
        As in `Sequential.adapt`.
    threads : int
        Of each run. One gives the same bits on every machine of a kind.
    """

    data: Data
    base: Layer | None
    hidden: tuple[int, ...]
    loss: str
    target: Any
    modules_to_save: Any
    threads: int

    def data_digest(self) -> str:
        """Return a name of the data's contents."""
        return str(self.data.hashed().hexdigest()[:16])

    def digest(self) -> str:
        """Return a name of data, base and what else decides a run's result."""
        digest = self.data.hashed()
        if self.base is not None:
            digest.update(repr(self.base._config()).encode())
            for name in self.base.parameter_names():
                add_array(digest, name, self.base.get_parameter(name))
        digest.update(repr((self.hidden, self.loss, self.target, self.modules_to_save, self.threads)).encode())
        return digest.hexdigest()[:16]

    def train(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Train and measure with one combination of settings; return what its record says."""
        return _train(self, settings)


def run_one(task: Any, key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train and measure one combination of settings, and return its record; `task` is a `Task` or a `TextTask`.

    A run whose loss stops being finite has the status "diverged", one whose settings cannot be used "failed"; both are
    results. Any other error is the machine's, and raised: the sweep tries again.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {"key": key, "status": "done", "settings": dict(settings)}
    with limit_threads(task.threads):
        try:
            record.update(task.train(settings))
        except NonFiniteError as error:
            record.update(status="diverged", error=str(error))
        except (TypeError, ValueError) as error:
            record.update(status="failed", error=str(error))
    place = {"host": platform.node(), "process": os.getpid()}
    return record | {"seconds": time.perf_counter() - start, **place}


def _train(task: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
    data = task.data
    model = prepare(task, settings)
    rates = {name: settings[name] for name in ("lr", "lora_plus_ratio", "weight_decay") if name in settings}
    optimizer = {"adamw": AdamW, "sgd": SGD}.get(settings.get("optimizer", "adamw"))
    if optimizer is None:
        raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {settings['optimizer']!r}")
    options = {
        name: settings[name]
        for name in ("epochs", "batch_size", "schedule", "clip_norm", "delta_lr")
        if name in settings
    }
    history = fit(
        model,
        data.x,
        data.y,
        loss=task.loss,
        optimizer=optimizer(**rates),
        validation=(data.x_validation, data.y_validation),
        seed=settings["seed"],
        progress=False,
        **options,
    )
    found = evaluate(model, data.x_validation, data.y_validation, loss=task.loss)
    metrics = {f"val_{name}": value for name, value in found.items()}
    if data.x_test is not None:
        found = evaluate(model, data.x_test, data.y_test, loss=task.loss)
        metrics.update({f"test_{name}": value for name, value in found.items()})
    return {
        "metrics": metrics,
        "trainable_parameters": model.parameter_count,
        "parameters_digest": hashlib.sha256(model.get_parameters().tobytes()).hexdigest(),
        "delta_lr": history.delta_lr,
        "history": {name: values for name, values in history.to_dict().items() if name in HISTORY},
    }


def prepare(task: Task, settings: Mapping[str, Any]) -> Sequential:
    """Return a new model with what the method trains set to be trained."""
    model = _plain_model(task, settings["seed"])
    method = settings["method"]
    if method in ADAPTERS:
        of_adapt = ("rank", "lower_rank", *ADAPTERS[method].settings())
        chosen = {name: settings[name] for name in of_adapt if name in settings}
        return model.adapt(task.target, method, modules_to_save=task.modules_to_save, seed=settings["seed"], **chosen)
    leaves = [layer for _, layer in tree.units(model)]
    for layer in leaves:
        layer.trainable = method == "full" or layer is leaves[-1]
    return model


def _plain_model(task: Task, seed: int) -> Sequential:
    if task.base is None:
        return _new_network(task, seed)
    model = task.base if isinstance(task.base, Sequential) else Sequential(task.base)
    adapted = any(isinstance(layer, Adapter) for _, layer in tree.units(model))
    return model.merge() if adapted else model.clone()


def _new_network(task: Task, seed: int) -> Sequential:
    data = task.data
    if isinstance(as_loss(task.loss), CrossEntropy):
        parts = [part for part in (data.y, data.y_validation, data.y_test) if part is not None]
        outputs = int(max(np.max(part) for part in parts)) + 1
        if outputs > MOST_CLASSES:
            raise ValueError(f"the largest label is {outputs - 1}; labels number the classes from 0: number them anew")
    else:
        outputs = data.y.shape[-1] if data.y.ndim > 1 else 1
    widths = [data.x.shape[-1], *task.hidden, outputs]
    rng = np.random.default_rng(seed)
    dtype = data.x.dtype if data.x.dtype in (np.float32, np.float64) else "float32"
    layers: dict[str, Layer] = {}
    for place, (width, following) in enumerate(itertools.pairwise(widths)):
        last = place == len(widths) - 2
        kind = "identity" if last else "relu"
        name = "head" if last else f"hidden{place + 1}"
        layers[name] = Dense.random(width, following, activation=kind, dtype=dtype, seed=rng)
    return Sequential(layers)


class limit_threads(contextlib.AbstractContextManager["limit_threads"]):
    """Compute with `count` threads, Numba's and the BLAS libraries', inside the `with` block.

    The limits of BLAS libraries are the process's, so when blocks overlap in several Python threads, the last one to
    end lifts them.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _inside: ClassVar[list["limit_threads"]] = []
    _blas: ClassVar[Any] = None

    def __init__(self, count: int) -> None:
        self.count = count
        self._thread = threading.get_ident()

    @classmethod
    def _after_fork(cls) -> None:
        """In a child only the thread that forked is left: of the others neither lock nor blocks."""
        cls._lock = threading.Lock()
        cls._inside = [block for block in cls._inside if block._thread == threading.get_ident()]

    def __enter__(self) -> "limit_threads":
        import numba
        from threadpoolctl import threadpool_limits

        with limit_threads._lock:
            if not limit_threads._inside:
                limit_threads._lift()  # what blocks of threads that a fork has ended left behind
                limit_threads._blas = threadpool_limits(self.count)
            limit_threads._inside.append(self)
        self._before = numba.get_num_threads()
        numba.set_num_threads(min(self.count, int(vars(numba.config)["NUMBA_NUM_THREADS"])))
        return self

    def __exit__(self, *exception: object) -> None:
        import numba

        numba.set_num_threads(self._before)
        with limit_threads._lock:
            limit_threads._inside.remove(self)
            if not limit_threads._inside:
                limit_threads._lift()

    @classmethod
    def _lift(cls) -> None:
        if cls._blas is not None:
            cls._blas.restore_original_limits()
            cls._blas = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=limit_threads._after_fork)


def add_array(digest: Any, name: str, array: Any) -> None:
    """Add an array's contents to a digest, and nothing where there is none."""
    if array is None:
        return
    digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
    if array.dtype.hasobject:  # texts, whose array holds addresses
        for text in array.ravel().tolist():
            digest.update(f"{len(text)} {text}".encode())
    else:
        digest.update(np.ascontiguousarray(array).tobytes())


def failed_record(key: str, settings: Mapping[str, Any], error: BaseException) -> dict[str, Any]:
    """Return the record of a run that the machine, not its settings, has ended each time it was tried."""
    text = f"{type(error).__name__}: {error}"
    return {"key": key, "status": "failed", "settings": dict(settings), "error": text, "seconds": 0.0}


Runs = Mapping[str, Mapping[str, Any]]
Records = Iterator[dict[str, Any]]
