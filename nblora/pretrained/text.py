"""`TextModel`: models that read tokens, of which padding is never computed."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array
from nblora.layers.run import Run

from .model import PretrainedModel
from .rows import Ragged, Tokens, read_tokens

PIECE = 1 << 22
"""Logits that are held at once in training, 16 MB of float32, times the backend's breadth."""
IGNORED = -100
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TextModel(PretrainedModel):
    """A model of text: token ids to logits, or to features of each text.

    Made by `nblora.load_pretrained`. `model(input_ids, attention_mask=None, token_type_ids=None)` computes.
    """

    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> np.ndarray:
        """Compute the outputs of some texts.

        Parameters
        ----------
        input_ids : array_like of integers, shape (batch, length), or a list of sequences of different lengths
        attention_mask : array_like of 0 and 1, shape (batch, length), optional
            1 at tokens, 0 at padding, which must lie at the right. Padding is never computed.
        token_type_ids : like input_ids, optional
            Which of two texts a token is of, where the family tells them apart.

        Returns
        -------
        ndarray of the model's dtype
            (batch, labels); of a causal model (batch, length, vocabulary), zeros at padding; of an embedding
            (batch, features).

        Raises
        ------
        TypeError
            For ids that are no integers.
        IndexError
            For ids beyond the vocabulary.
        ValueError
            For an empty batch or text, a mask with holes or with padding at the left, and a text that is longer than
            the model has positions.
        """
        tokens = self._check_tokens(read_tokens(input_ids, attention_mask, token_type_ids))
        y = super().forward(tokens)
        if self._run is not None:
            self._run.tokens = tokens
        return tokens.padded(y) if self.head.by_token else y

    def __call__(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> np.ndarray:
        """The same as `forward`."""
        return self.forward(input_ids, attention_mask, token_type_ids)

    def _check_tokens(self, tokens: Tokens) -> Tokens:
        """IndexError for ids beyond the vocabulary, ValueError for a text that is too long."""
        tables = [("input_ids", tokens.ids, self.body.table.in_features)]
        if tokens.kinds is not None:
            kinds = getattr(getattr(self.body, "embeddings", None), "types", None)
            if kinds is None:
                raise ValueError(
                    f"token_type_ids is not for a {self.model_type}, which has no token types: leave it out"
                )
            tables.append(("token_type_ids", tokens.kinds, kinds.in_features))
        for name, values, count in tables:
            wrong = (values < 0) | (values >= count)
            if wrong.any():
                row = int(np.argmax(wrong))
                text = int(np.searchsorted(tokens.begins, row, "right")) - 1
                raise IndexError(
                    f"{name} must hold integers from 0 to {count - 1}, got {int(values[row])} at "
                    f"({text}, {row - int(tokens.begins[text])})"
                )
        lengths = np.diff(tokens.begins)
        longest = self.body.longest
        if longest is not None and lengths.max() > longest:
            raise ValueError(
                f"input_ids holds {int(lengths.max())} tokens in sequence {int(lengths.argmax())}, and the model has "
                f"{longest} positions: cut the text, or part it"
            )
        return tokens

    # --- as layers compute -------------------------------------------------------------------------------------

    def _forward(self, x: Tokens, run: Run) -> Array:
        run.sequences = x.sequences
        if run.training:
            run.keep(self, True)
        return super()._forward(x, run)

    def _backward(self, grad: Array, run: Run) -> None:
        if run.recall(self):
            super()._backward(grad, run)
        else:  # `_learn` has been through the head
            self.body._backward(grad, run)

    def _enter(self, name: str, value: Any, check: Callable[[str, Any], Array]) -> tuple[Any, bool]:
        if isinstance(value, Tokens):
            return value, False
        return super()._enter(name, value, check)

    def _as_input(self, name: str, value: Any) -> Any:
        return self._check_tokens(read_tokens(value))

    def _as_output(self, name: str, value: Any) -> Array:
        return checks.as_samples(name, value, self.out_features, self.dtype)

    def _go_back(self, grad_output: Any) -> tuple[Run, Array, bool]:
        tokens = None if self._run is None else self._run.tokens
        if tokens is not None and self.head.by_token:
            array = checks.as_samples("grad_output", grad_output, self.out_features, self.dtype)
            shape = len(tokens), tokens.width, self.out_features
            if array.shape != shape:
                raise ValueError(f"grad_output must have the output's shape {shape}, got {array.shape}")
            grad_output = tokens.rows_of(array)
        return super()._go_back(grad_output)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, self.out_features) if self.head.by_token else (*shape[:-1], self.out_features)

    def _axes(self) -> tuple[int | str, ...]:
        return "batch", "length"

    def _example(self, samples: int) -> Any:
        length = min(self.body.longest or 64, 64)
        return np.arange(samples * length).reshape(samples, length)[: max(1, samples // length)] % self.in_features

    def _probe(self) -> Any:
        rng = np.random.default_rng(0)
        lengths = [min(length, self.body.longest or length) for length in (7, 3)]
        return [rng.integers(0, self.body.table.in_features, length) for length in lengths]

    # --- learning ----------------------------------------------------------------------------------------------

    def _as_samples(self, name: str, x: Any) -> Tokens:
        if isinstance(x, Mapping):
            unknown = [key for key in x if key not in INPUTS]
            if unknown or "input_ids" not in x:
                raise ValueError(f"{name} must be a dict of {', '.join(INPUTS)}, got the keys {', '.join(map(str, x))}")
            return self._check_tokens(read_tokens(*(x.get(key) for key in INPUTS)))
        return self._check_tokens(x if isinstance(x, Tokens) else read_tokens(x))

    def _as_targets(self, name: str, y: Any, x: Tokens, loss: Any) -> Any:
        if not self.head.by_token:
            if y is None:
                raise ValueError(f"{name} is needed: a {self.task} model learns a label for each text")
            return loss.check_target(name, y, (len(x), self.out_features))
        return next_tokens(x, x.ids if y is None else _labels(name, y, x, self.out_features))

    def _learn(self, x: Tokens, target: Any, loss: Any, run: Run) -> tuple[Any, Array | None, dict[str, Any]]:
        """As `Layer._learn`; of a causal model logits are made only where there is a label, and in pieces."""
        if not self.head.by_token:
            return super()._learn(x, target, loss, run)
        run.sequences, learnt = x.sequences, np.flatnonzero(target.values != IGNORED)
        run.reads = lambda _: learnt
        rows = self.body._forward(x, run)
        if run.training:
            run.keep(self, False)
        wanted = run.training and run.live
        grad = run.backend.zeros_like(rows) if wanted else None
        value: Any = 0.0
        figures: dict[str, Any] = dict.fromkeys(loss.metrics, 0.0)
        size = max(1, run.backend.breadth * PIECE // self.out_features)
        for start in range(0, len(learnt), size):
            places = slice(start, start + size)
            piece = run.inner()
            piece.in_pieces = True
            logits, labels = self.head._forward(rows[places], piece), target.values[learnt[places]]
            part, slopes = loss.value_and_gradient(logits, labels, run.backend)
            share = len(labels) / len(learnt)
            value = value + share * part
            found = loss._figures(logits, labels, run.backend) if loss.metrics else {}
            for metric, figure in found.items():
                figures[metric] = figures[metric] + share * figure
            if run.training and piece.live:
                if share < 1:
                    run.backend.scale(slopes, share)
                below = self.head._backward(slopes, piece.back(run.sink))
                if grad is not None and below is not None:
                    grad[places] = below
        return value, grad, figures


def next_tokens(x: Tokens, labels: np.ndarray) -> Ragged:
    """What each token is to be followed by: the label of the next, nothing after the last."""
    following = np.append(labels[1:], IGNORED)
    following[x.begins[1:] - 1] = IGNORED
    return Ragged(following, x.begins)


def _labels(name: str, y: Any, x: Tokens, classes: int) -> np.ndarray:
    """Labels of all tokens, which come as the tokens did: padded, or a list."""
    lengths = np.diff(x.begins)
    rows = list(y) if isinstance(y, list | tuple | Ragged) else list(checks.as_indices(name, y))
    if len(rows) != len(x):
        raise ValueError(f"{name} must have one row of labels for each of the {len(x)} texts, got {len(rows)}")
    parts = []
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        part = checks.as_indices(f"{name}[{place}]", row)
        if part.ndim != 1 or len(part) not in (length, x.width):
            raise ValueError(
                f"{name}[{place}] must hold one label for each of the {length} tokens, {IGNORED} where nothing is "
                f"to be learnt, got shape {part.shape}"
            )
        parts.append(part[:length])
    found = np.concatenate(parts).astype(np.int64)
    wrong = ((found < 0) & (found != IGNORED)) | (found >= classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        text = int(np.searchsorted(x.begins, row, "right")) - 1
        raise ValueError(
            f"{name} must hold tokens from 0 to {classes - 1}, or {IGNORED} where nothing is to be learnt, got "
            f"{found[row]} at ({text}, {row - int(x.begins[text])})"
        )
    return found
