"""`TextClassifier`: a pretrained model of text, tuned to labelled texts."""

import os
from typing import Any, Self, cast

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted, column_or_1d

from nblora import checks
from nblora.adapters import ADAPTERS, DEFAULT_ADAPTER
from nblora.formats.peft_export import ExportedModule
from nblora.linalg import softmax
from nblora.pretrained import TextModel, load_pretrained
from nblora.pretrained.labels import name_labels
from nblora.text import Encoding, Tokenizer, load_tokenizer
from nblora.text.labels import write_labels
from nblora.text.predicting import inputs_of, longest_text, outputs_of
from nblora.training import AdamW, EarlyStopping, fit
from nblora.training.calibration import AUTO
from nblora.training.weighted import Weighted

from .common import draw_seed

METHODS = ("head", *ADAPTERS, "full")


class TextClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of texts: a pretrained model and a head for the labels, trained by any method.

    `X` is a list, array or Series of texts, or of pairs of texts (shape (samples, 2)); labels are of any type. Needs
    the extras `sklearn` and `text`.

    Parameters
    ----------
    model : path
        A folder as transformers or sentence-transformers save it, or a GGUF file: what `nblora.load_pretrained` reads,
        with its tokenizer. A head that the folder has for as many labels is trained on; otherwise a new one is drawn.
    method : str
        An adapter's name in `nblora.adapters.ADAPTERS`, such as "lora", or "delta", whose dense delta is as large as
        the weights; "head" for the head alone; "full" for every weight. The head is trained by each.
    rank, alpha, lora_dropout, delta_scaling, momentum_factor
        Of the adapters, as in `DeltaLoRAAdapter`; what is no setting of the method does nothing.
    target : str, or list of str
        Which layers are adapted, as in `PretrainedModel.adapt`.
    epochs : int
        Passes over the texts.
    lr, weight_decay : float
        AdamW's.
    delta_lr : "auto", float or None
        The delta's learning rate, as in `nblora.fit`.
    schedule : {"constant", "cosine"}, or None
        As in `nblora.fit`.
    batch_size : int
        Texts of a step.
    max_length : int or None
        Texts are cut at so many tokens, special ones included, and at the model's positions.
    early_stopping, validation_fraction, n_iter_no_change : bool, float, int
        Go by the loss on a part of the texts that is held out, stop when it has not become better for so many epochs,
        and return to the best one.
    random_state : int, RandomState or None
        Of the head, the adapters, the order of texts and the part held out.
    verbose : int
        1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray
        The labels, sorted.
    model_ : TextModel
        The tuned model, whose outputs are logits; `model_.merge()` is a plain one.
    tokenizer_ : Tokenizer
    n_iter_, t_ : int
        Epochs and steps of the last `fit`.
    loss_curve_ : list of float
        Mean loss of each epoch; `validation_loss_curve_` that of the part held out.
    history_ : History
        What `nblora.fit` returned: a row an epoch.

    Examples
    --------
    >>> from nblora.estimators import TextClassifier
    >>> classifier = TextClassifier("minilm", rank=8, epochs=3, random_state=0)
    >>> classifier.fit(texts, labels).predict(["You have won a prize"])  # doctest: +SKIP
    array(['spam'], dtype='<U4')
    """

    def __init__(
        self,
        model: Any = None,
        *,
        method: str = DEFAULT_ADAPTER,
        rank: int = 8,
        target: Any = "all-linear",
        alpha: float = 16.0,
        lora_dropout: float = 0.0,
        delta_scaling: float = 0.1,
        momentum_factor: float = 0.9,
        epochs: int = 3,
        lr: float = 2e-4,
        weight_decay: float = 0.01,
        delta_lr: float | str | None = AUTO,
        schedule: Any = None,
        batch_size: int = 16,
        max_length: int | None = 256,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 2,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.method = method
        self.rank = rank
        self.target = target
        self.alpha = alpha
        self.lora_dropout = lora_dropout
        self.delta_scaling = delta_scaling
        self.momentum_factor = momentum_factor
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.delta_lr = delta_lr
        self.schedule = schedule
        self.batch_size = batch_size
        self.max_length = max_length
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state
        self.verbose = verbose

    # --- training ----------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Tune a copy of the pretrained model to the texts, from its beginning.

        Parameters
        ----------
        X : array_like of str, shape (samples,), or (samples, 2) for pairs
        y : array_like, shape (samples,)
        sample_weight : array_like, shape (samples,), optional
            Not negative. How strongly each text pulls; only their ratios matter.

        Returns
        -------
        self
        """
        texts, pairs = _check_texts(X)
        classes, codes = self._check_labels(y, texts)
        random = check_random_state(self.random_state)
        model, tokenizer = self._prepare(classes, random)
        encoding = tokenizer.encode(texts, pairs, max_length=longest_text(model, tokenizer, self.max_length))
        targets, loss = codes, None
        if sample_weight is not None:
            loss = Weighted("cross_entropy")
            targets = loss.pack(codes, _check_sample_weight(sample_weight, codes.astype(np.float64)[:, None]))
        trained, held_out = self._split(codes, random)
        history = fit(
            model,
            inputs_of(model, _some(encoding, trained)),
            targets[trained],
            loss=loss,
            optimizer=AdamW(self.lr, weight_decay=self.weight_decay),
            epochs=self.epochs,
            batch_size=self.batch_size,
            validation=None if held_out is None else (inputs_of(model, _some(encoding, held_out)), targets[held_out]),
            callbacks=self._callbacks(),
            schedule=self.schedule,
            delta_lr=self.delta_lr,
            seed=draw_seed(random),
            progress=bool(self.verbose),
        )
        self.classes_, self.model_, self.tokenizer_ = classes, model, tokenizer
        self.n_iter_, self.t_ = len(history), int(history[-1]["step"])
        self.history_ = history
        self.loss_curve_ = history["loss"]
        self.validation_loss_curve_ = None if held_out is None else history["val_loss"]
        return self

    def _check_labels(self, y: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The classes, sorted, and the class of each text."""
        if y is None:
            raise ValueError("TextClassifier requires y to be passed, a label for each text, but the target y is None")
        labels = column_or_1d(y, warn=True)
        check_consistent_length(texts, labels)
        check_classification_targets(labels)
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must have at least 2 classes, got 1 class: {classes.tolist()[0]!r}")
        return classes, codes.reshape(-1)

    def _prepare(self, classes: np.ndarray, random: Any) -> tuple[TextModel, Tokenizer]:
        """A new model with what the method trains set to be trained, and its tokenizer."""
        if not isinstance(self.model, str | os.PathLike):
            raise TypeError(f"model must be the path of a pretrained model, got {self.model!r}")
        checks.check_choice("method", self.method, METHODS)
        names = [str(label) for label in classes.tolist()]
        model = load_pretrained(
            self.model, task="sequence-classification", num_labels=len(names), seed=draw_seed(random)
        )
        name_labels(model, names)
        if self.method in ADAPTERS:
            taken = {"rank", *ADAPTERS[self.method].settings()}
            settings = {name: value for name, value in self.get_params(deep=False).items() if name in taken}
            model.adapt(self.target, self.method, seed=draw_seed(random), **settings)
        else:
            model.unfreeze("*" if self.method == "full" else list(model.head.own))
        return cast(TextModel, model), load_tokenizer(self.model)  # of another task nothing else is loaded

    def _split(self, codes: np.ndarray, random: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Which texts are trained on, and which are held out."""
        places = np.arange(len(codes))
        if not self.early_stopping:
            return places, None
        trained, held_out = train_test_split(
            places, test_size=self.validation_fraction, random_state=draw_seed(random), stratify=codes
        )
        return trained, held_out

    def _callbacks(self) -> list[EarlyStopping]:
        if not self.early_stopping:
            return []
        return [EarlyStopping("val_loss", patience=self.n_iter_no_change, restore_best=True)]

    # --- predicting --------------------------------------------------------------------------------------------

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the logits, shape (samples, classes); of two classes how far the second's exceeds the first's."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict(self, X: Any) -> np.ndarray:
        """Return the label of each text's largest logit."""
        chosen = self._logits(X).argmax(axis=1)  # before classes_: it says when there was no fit
        return self.classes_[chosen]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the softmax of the logits, ndarray of float64, shape (samples, classes)."""
        return softmax(self._logits(X))

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "model_")
        texts, pairs = _check_texts(X)
        longest = longest_text(self.model_, self.tokenizer_, self.max_length)
        return outputs_of(self.model_, self.tokenizer_.encode(texts, pairs, max_length=longest))

    # --- files -------------------------------------------------------------------------------------------------

    def save_adapter(
        self, folder: Any, *, fold_delta: int | None = None, dtype: str | None = None, force: bool = False
    ) -> list[ExportedModule]:
        """Write the adapter, the head and the labels to a folder, for PEFT and for `nblora predict --adapter`.

        Parameters
        ----------
        folder, fold_delta, dtype, force
            As in `PretrainedModel.save_adapter`.

        Raises
        ------
        ValueError
            For the method "full", which has no adapter: `save_pretrained` writes the model. For labels that are the
            same as texts.
        """
        check_is_fitted(self, "model_")
        if self.method == "full":
            raise ValueError("the method 'full' makes no adapter: save_pretrained(folder) writes the model")
        names = self._names()
        exported = self.model_.save_adapter(folder, fold_delta=fold_delta, dtype=dtype, force=force)
        write_labels(folder, names)
        return exported

    def save_pretrained(self, folder: Any, *, dtype: str | None = None, force: bool = False) -> None:
        """Write the merged model, its tokenizer and the labels to a folder, for transformers and `nblora predict`.

        Parameters
        ----------
        folder, dtype, force
            As in `PretrainedModel.save_pretrained`.

        Raises
        ------
        ValueError
            For labels that are the same as texts.
        """
        check_is_fitted(self, "model_")
        names = self._names()
        self.model_.merge().save_pretrained(folder, dtype=dtype, force=force)
        write_labels(folder, names)

    def _names(self) -> list[str]:
        return [str(label) for label in self.classes_.tolist()]

    # --- scikit-learn ------------------------------------------------------------------------------------------

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.one_d_array, tags.input_tags.two_d_array = True, True, False
        return tags

    def _more_tags(self) -> dict[str, Any]:  # scikit-learn before 1.6
        return {"X_types": ["string"]}


def _check_texts(X: Any) -> tuple[list[str], list[str] | None]:
    """Texts, and the second one of each where there are pairs.

    Raises
    ------
    TypeError
        For what is no text.
    ValueError
        For another shape, and without any.
    """
    if isinstance(X, str | bytes) or not hasattr(X, "__len__"):
        raise TypeError(f"X must be a list of texts, got {type(X).__name__}: one text is a list of one")
    rows = X.tolist() if hasattr(X, "tolist") else X.to_numpy().tolist() if hasattr(X, "to_numpy") else list(X)
    if not rows:
        raise ValueError("X must hold at least one text, got none")
    if all(isinstance(row, str) for row in rows):
        return rows, None
    if all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
        first, second = [row[0] for row in rows], [row[1] for row in rows]
        if all(isinstance(text, str) for text in (*first, *second)):
            return first, second
    wrong = next(row for row in rows if not isinstance(row, str))
    raise TypeError(f"X must hold texts, or a pair of texts in each row, got {wrong!r}")


def _some(encoding: Encoding, places: np.ndarray) -> Encoding:
    return Encoding([encoding.ids[place] for place in places], [encoding.kinds[place] for place in places])
