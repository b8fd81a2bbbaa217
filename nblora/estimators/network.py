"""`LoRAClassifier` and `LoRARegressor`: networks on rows of numbers."""

import os
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from nblora import Dense, Sequential, checks, load
from nblora.adapters import ADAPTERS, DEFAULT_ADAPTER, Adapter
from nblora.layers import Layer, tree
from nblora.linalg import softmax
from nblora.models.targets import match_names
from nblora.training import SGD, AdamW, Constant, EarlyStopping, Loss, Optimizer, fit
from nblora.training.calibration import AUTO, Bound, check_delta_lr
from nblora.training.data import check_samples
from nblora.training.fit import Run, check_model
from nblora.training.losses import as_loss
from nblora.training.step import Step
from nblora.training.weighted import Weighted

from .common import draw_seed

_PREDICTION_ROWS = 4096  # bounds the memory of a prediction's hidden outputs


def _validate(estimator: Any, X: Any, y: Any = "no_validation", *, reset: bool, **options: Any) -> Any:
    try:
        from sklearn.utils.validation import validate_data
    except ImportError:  # scikit-learn before 1.6
        return estimator._validate_data(X, y, reset=reset, **options)
    return validate_data(estimator, X, y, reset=reset, **options)


class _LoRAEstimator(BaseEstimator):
    """What both estimators share: settings, the model, training and its state."""

    _loss: ClassVar[str]

    def __init__(
        self,
        base: Any = None,
        *,
        method: str = DEFAULT_ADAPTER,
        rank: int = 4,
        alpha: float = -1.0,
        delta_scaling: float = 0.1,
        momentum_factor: float = 0.9,
        lora_dropout: float = 0.0,
        target: Any = "*",
        head: str = "auto",
        hidden_layer_sizes: tuple[int, ...] = (32,),
        optimizer: str = "adamw",
        learning_rate: float = 0.003,
        delta_learning_rate: float | str | None = AUTO,
        weight_decay: float = 0.01,
        max_iter: int = 100,
        batch_size: int = 32,
        tol: float = 1e-4,
        n_iter_no_change: int = 10,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.base = base
        self.method = method
        self.rank = rank
        self.alpha = alpha
        self.delta_scaling = delta_scaling
        self.momentum_factor = momentum_factor
        self.lora_dropout = lora_dropout
        self.target = target
        self.head = head
        self.hidden_layer_sizes = hidden_layer_sizes
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.delta_learning_rate = delta_learning_rate
        self.weight_decay = weight_decay
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.tol = tol
        self.n_iter_no_change = n_iter_no_change
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    # --- training ----------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Adapt a copy of the base to the samples, from its beginning unless `warm_start`.

        Parameters
        ----------
        X : array_like, shape (samples, features)
        y : array_like, shape (samples,), or (samples, outputs) for a regressor
        sample_weight : array_like, shape (samples,), optional
            Not negative. How strongly each sample pulls; only their ratios matter.

        Returns
        -------
        self
        """
        again = self.warm_start and hasattr(self, "model_")
        X, y = self._check_X_y(X, y, reset=not again)
        self._check_outputs(y, None, reset=not again)
        targets, loss = self._targets_and_loss(X, y, sample_weight)
        random = check_random_state(self.random_state)
        if not again:
            self._build(X, random)
        self._slots: dict[str, list[np.ndarray]] = {}
        self._delta_rates: dict[str, float] = {}
        self._delta_bound: Bound | None = None
        self.t_ = 0
        X, targets, validation = self._split(X, targets, random)
        monitor = "loss" if validation is None else "val_loss"
        stopping = EarlyStopping(
            monitor, patience=self.n_iter_no_change, min_delta=self.tol, restore_best=validation is not None
        )
        history = fit(
            self.model_,
            X,
            targets,
            loss=loss,
            optimizer=self._optimizer(),
            epochs=self.max_iter,
            batch_size=self.batch_size,
            validation=validation,
            callbacks=[stopping],
            delta_lr=self.delta_learning_rate,
            seed=draw_seed(random),
            progress=bool(self.verbose),
        )
        self.n_iter_ = len(history)
        self.t_ = int(history[-1]["step"])
        self.loss_curve_ = history["loss"]
        self.validation_loss_curve_ = None if validation is None else history["val_loss"]
        self.model_.eval()
        return self

    def _partial_fit(self, X: Any, y: Any, classes: Any, sample_weight: Any) -> None:
        for rows, targets, weights in _blocks(X, y, sample_weight):
            self._pass(rows, targets, classes, weights)

    def _pass(self, X: Any, y: Any, classes: Any, sample_weight: Any) -> None:
        """Train once over samples that fit in memory; the optimiser's state goes on from the last pass."""
        first = not hasattr(self, "model_")
        X, y = self._check_X_y(X, y, reset=first)
        self._check_outputs(y, classes, reset=first)
        targets, loss = self._targets_and_loss(X, y, sample_weight)
        if first:
            self._shuffles = check_random_state(self.random_state)
            self._build(X, self._shuffles)
            self._slots, self._delta_rates, self.t_, self.n_iter_, self.loss_curve_ = {}, {}, 0, 0, []
            self._delta_bound = None
        elif not hasattr(self, "_shuffles"):
            self._shuffles = check_random_state(self.random_state)
        step = self._step(loss)
        samples = check_samples(("X", "y"), X, targets, self.model_, loss)
        size = checks.check_integer("batch_size", self.batch_size, 1)
        rng = np.random.default_rng(draw_seed(self._shuffles))
        run = Run(self.model_, samples, None, step, Constant(), epochs=1, batch_size=size, rng=rng, checkpoint=None)
        history = run.start(None, bool(self.verbose))
        to_host = self.model_._backend.to_host
        self._slots = {trained.name: [np.array(to_host(slot)) for slot in trained.slots] for trained in step.trained}
        self._delta_rates, self._delta_bound = step.delta_rates, step.delta_bound
        self.t_ = step.count
        self.n_iter_ += 1
        self.loss_curve_ = [*self.loss_curve_, *history["loss"]]
        self.model_.eval()

    def _step(self, loss: Loss) -> Step:
        """A step that goes on with the optimiser's kept state."""
        optimizer = self._optimizer()
        rate = check_delta_lr("delta_learning_rate", self.delta_learning_rate)
        step = Step(self.model_, loss, optimizer, rate, None)
        step.take_delta_rates(self._delta_rates, getattr(self, "_delta_bound", None))  # files of before have none
        for trained in step.trained:
            for slot, kept in zip(trained.slots, self._slots.get(trained.name, ()), strict=False):
                slot[...] = self.model_._backend.from_host(kept)
        step.count = self.t_
        return step

    def _optimizer(self) -> Optimizer:
        kind = checks.check_choice("optimizer", self.optimizer, ("adamw", "sgd"))
        return AdamW(self.learning_rate, weight_decay=self.weight_decay) if kind == "adamw" else SGD(self.learning_rate)

    def _split(self, X: np.ndarray, targets: np.ndarray, random: Any) -> tuple[np.ndarray, np.ndarray, Any]:
        if not self.early_stopping:
            return X, targets, None
        labels = self._strata(targets)
        parts = train_test_split(
            X, targets, test_size=self.validation_fraction, random_state=draw_seed(random), stratify=labels
        )
        return parts[0], parts[2], (parts[1], parts[3])

    # --- the data ----------------------------------------------------------------------------------------------

    def _check_X_y(self, X: Any, y: Any, *, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _check_outputs(self, y: np.ndarray, classes: Any, *, reset: bool) -> None:
        """Learn from `y` what the model must put out, or check that it still fits."""
        raise NotImplementedError

    def _encode(self, y: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _strata(self, targets: np.ndarray) -> np.ndarray | None:
        return None

    def _targets_and_loss(self, X: np.ndarray, y: np.ndarray, sample_weight: Any) -> tuple[np.ndarray, Loss]:
        targets = self._encode(y)
        if sample_weight is None:
            return targets, as_loss(self._loss)
        weighted = Weighted(self._loss)
        return weighted.pack(targets, _check_sample_weight(sample_weight, X)), weighted

    # --- the model ---------------------------------------------------------------------------------------------

    def _build(self, X: np.ndarray, random: Any) -> None:
        """Make `model_`: a plain copy of the base, or a new network, in adapters."""
        checks.check_choice("method", self.method, tuple(ADAPTERS))
        checks.check_integer("rank", self.rank, 1)
        rng = np.random.default_rng(draw_seed(random))
        if self.base is None:
            model, head = self._new_network(X, rng), None
        else:
            model, head = self._copied_base(X.shape[1], rng)
        names = [name for name, _ in tree.units(model) if name != head]
        self._adapt(model, match_names("target", self.target, names), head, rng)
        self.model_ = model

    def _new_network(self, X: np.ndarray, rng: np.random.Generator) -> Sequential:
        widths = [X.shape[1], *self.hidden_layer_sizes]
        layers: dict[str, Layer] = {}
        for place, width in enumerate(widths[:-1]):
            layers[f"hidden{place + 1}"] = Dense.random(
                width, widths[place + 1], activation="relu", dtype=X.dtype, seed=rng
            )
        layers["head"] = Dense.random(widths[-1], self._outputs, dtype=X.dtype, seed=rng)
        return Sequential(layers)

    def _copied_base(self, features: int, rng: np.random.Generator) -> tuple[Sequential, str | None]:
        """A plain copy of the base, and the name of its last layer where that is a new one."""
        base = load(self.base) if isinstance(self.base, str | os.PathLike) else self.base
        check_model(base)
        model = base if isinstance(base, Sequential) else Sequential({"base": base})
        adapted = any(isinstance(layer, Adapter) for _, layer in tree.units(model))
        model = model.merge() if adapted else model.clone()
        if model.in_features != features:
            raise ValueError(f"base takes {model.in_features} features, but X has {features} features")
        wanted = checks.check_choice("head", self.head, ("auto", "keep", "new"))
        if wanted == "keep" and model.out_features != self._outputs:
            raise ValueError(
                f"base has {model.out_features} outputs, but y needs {self._outputs}: "
                "head='auto' or 'new' replaces its last layer"
            )
        if wanted == "keep" or (wanted == "auto" and model.out_features == self._outputs):
            return model, None
        layers = dict(model.named_layers())
        name, last = layers.popitem()
        if not isinstance(last, Dense):
            raise ValueError(f"base's last layer must be a Dense or FullyConnected to be replaced, got {last!r}")
        layers[name] = type(last).random(last.in_features, self._outputs, dtype=last.dtype, seed=rng)
        return Sequential(layers), name

    def _adapt(self, model: Sequential, names: list[str], head: str | None, rng: np.random.Generator) -> None:
        taken = ADAPTERS[self.method].settings()
        settings = {name: value for name, value in self.get_params(deep=False).items() if name in taken}
        settings["freeze_base_layer"] = self.base is not None
        layers = dict(tree.units(model))
        by_rank: dict[int, list[str]] = {}
        for name in names:
            largest = min(layers[name].in_features, layers[name].out_features)
            by_rank.setdefault(min(self.rank, largest), []).append(name)
        for rank, chosen in by_rank.items():
            model.adapt(chosen, self.method, rank=rank, modules_to_save=head, seed=rng, **settings)

    # --- predicting --------------------------------------------------------------------------------------------

    @property
    def _outputs(self) -> int:
        """How many outputs the model must have."""
        raise NotImplementedError

    def _forward(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "model_")
        X = _validate(self, X, reset=False, dtype=(np.float64, np.float32))
        parts = [
            self.model_.forward(X[start : start + _PREDICTION_ROWS]) for start in range(0, len(X), _PREDICTION_ROWS)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class LoRAClassifier(ClassifierMixin, _LoRAEstimator):
    """A classifier that adapts a pretrained network; classes may have labels of any type.

    Parameters
    ----------
    base : Sequential, other layer, path of a saved one, or None
        The pretrained network. It is copied, never changed; adapters that it holds are merged in the copy. None draws a
        small network and trains its weights together with the adapters.
    method : str
        A name in `nblora.adapters.ADAPTERS`, such as "lora", or "delta", whose dense delta is as large as the weights.
    rank : int
        Of the low-rank factors. A layer that is too small for it takes the largest rank that it can.
    alpha, delta_scaling, momentum_factor, lora_dropout
        As in `DeltaLoRAAdapter`; what is no setting of the method does nothing.
    target : str, or list of str
        Which layers are adapted, as in `Sequential.adapt`; all of them by default.
    head : {"auto", "keep", "new"}
        The base's last layer: "auto" keeps it where it has as many outputs as `y` needs, and otherwise puts a new one
        in its place, which is trained as it is.
    hidden_layer_sizes : tuple of int
        Of the network that is drawn for `base=None`.
    optimizer : {"adamw", "sgd"}
        Of all trained parameters but the delta.
    learning_rate, weight_decay : float
        The optimiser's.
    delta_learning_rate : "auto", float or None
        The delta's, as `delta_lr` in `nblora.fit`: found on the first batches, given, or `learning_rate`.
    max_iter : int
        Epochs, at most.
    batch_size : int
        Samples of a step.
    tol, n_iter_no_change : float, int
        Training ends when the loss has not become better by more than `tol` for `n_iter_no_change` epochs.
    early_stopping, validation_fraction : bool, float
        Go by the loss on a part of the samples that is held out, and return to the best epoch.
    warm_start : bool
        `fit` goes on from the present weights.
    random_state : int, RandomState or None
        Of the network, the adapters, the order of samples and the part held out.
    verbose : int
        1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray
        The labels, sorted.
    model_ : Sequential
        The adapted network, whose outputs are logits; `model_.merge()` is a plain one.
    n_iter_, t_ : int
        Epochs and steps of the last `fit`, or of all calls of `partial_fit`.
    loss_curve_ : list of float
        Mean loss of each epoch; `validation_loss_curve_` that of the part held out.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from nblora.estimators import LoRAClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> pipeline = make_pipeline(StandardScaler(), LoRAClassifier(rank=2, random_state=0))
    >>> bool(pipeline.fit(X, y).score(X, y) > 0.9)
    True
    """

    _loss = "cross_entropy"

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train once over the given samples, going on from the present weights and optimiser state.

        Parameters
        ----------
        X : array_like or dask.array.Array, shape (samples, features)
            Of a Dask array one block of rows after the other is computed and trained on, so that it may be larger than
            memory; `y` and `sample_weight` may be Dask arrays too.
        y : array_like, shape (samples,)
        classes : array_like
            All labels that there will be; needed in the first call only.
        sample_weight : array_like, shape (samples,), optional
            As in `fit`.

        Returns
        -------
        self
        """
        self._partial_fit(X, y, classes, sample_weight)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the label of each sample's largest logit."""
        chosen = self._forward(X).argmax(axis=1)  # before classes_: it says when there was no fit
        return self.classes_[chosen]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the softmax of the logits, ndarray of float64, shape (samples, classes)."""
        return softmax(self._forward(X))

    @property
    def _outputs(self) -> int:
        return len(self.classes_)

    def _check_X_y(self, X: Any, y: Any, *, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        X, y = _validate(self, X, y, reset=reset, dtype=(np.float64, np.float32))
        check_classification_targets(y)
        return X, y

    def _check_outputs(self, y: np.ndarray, classes: Any, *, reset: bool) -> None:
        if reset:
            found = np.unique(y if classes is None else classes)
            if len(found) < 2:
                raise ValueError(f"y must have at least 2 classes, got 1 class: {found[0]!r}")
            self.classes_ = found
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, got {np.unique(classes)}")
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y must hold labels among classes_, {self.classes_}, got {unknown}")

    def _encode(self, y: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.classes_, y)

    def _strata(self, targets: np.ndarray) -> np.ndarray | None:
        return targets if targets.ndim == 1 else targets[:, 0]


class LoRARegressor(RegressorMixin, _LoRAEstimator):
    """A regressor that adapts a pretrained network, by squared error; `y` may have several columns.

    `y` is taken as it is: where it is far from the scale of 1, wrap the regressor in
    `sklearn.compose.TransformedTargetRegressor`.

    Parameters
    ----------
    base, method, rank, ...
        As in `LoRAClassifier`.

    Attributes
    ----------
    model_ : Sequential
        The adapted network; `model_.merge()` is a plain one.
    n_iter_, t_ : int
        Epochs and steps of the last `fit`, or of all calls of `partial_fit`.
    loss_curve_ : list of float
        Mean loss of each epoch; `validation_loss_curve_` that of the part held out.
    n_outputs_ : int
        Columns of `y`.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.
    """

    _loss = "mse"

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train once over the given samples, going on from the present weights and optimiser state.

        Parameters
        ----------
        X : array_like or dask.array.Array, shape (samples, features)
            Of a Dask array one block of rows after the other is computed and trained on, so that it may be larger than
            memory; `y` and `sample_weight` may be Dask arrays too.
        y : array_like, shape (samples,) or (samples, outputs)
        sample_weight : array_like, shape (samples,), optional
            As in `fit`.

        Returns
        -------
        self
        """
        self._partial_fit(X, y, None, sample_weight)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the outputs, shape (samples,) or (samples, outputs) as `y` was."""
        output = self._forward(X)
        return output[:, 0] if self._flat else output

    @property
    def _outputs(self) -> int:
        return self.n_outputs_

    def _check_X_y(self, X: Any, y: Any, *, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        options = {"dtype": (np.float64, np.float32), "multi_output": True, "y_numeric": True}
        X, y = _validate(self, X, y, reset=reset, **options)
        return X, y

    def _check_outputs(self, y: np.ndarray, classes: Any, *, reset: bool) -> None:
        columns = 1 if y.ndim == 1 else y.shape[1]
        if reset:
            self.n_outputs_, self._flat = columns, y.ndim == 1
        elif columns != self.n_outputs_:
            raise ValueError(f"y must have {self.n_outputs_} columns, as in the first call, got {columns}")

    def _encode(self, y: np.ndarray) -> np.ndarray:
        return y.reshape(len(y), -1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _is_lazy(array: Any) -> bool:
    return hasattr(array, "__dask_graph__")


def _blocks(X: Any, y: Any, sample_weight: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The rows of each block of a Dask array, computed one after the other; what is no Dask array is one block."""
    if not _is_lazy(X):
        compute = [array.compute() if _is_lazy(array) else array for array in (y, sample_weight)]
        yield X, compute[0], compute[1]
        return
    import dask

    ends = np.cumsum(X.chunks[0])
    for stop, count in zip(ends.tolist(), X.chunks[0], strict=True):
        rows = slice(stop - count, stop)
        parts = [None if array is None else array[rows] for array in (X, y, sample_weight)]
        yield dask.compute(*parts)
