"""BERT (Devlin et al., 2019): encoder with norms after each residual. RoBERTa is one with other positions and head."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nblora.backends.protocol import Array
from nblora.layers import Embedding, Layer
from nblora.layers.attention import Attention
from nblora.layers.functions import Dropout, fan_in, fan_out, join, rejoin
from nblora.layers.run import Run

from ..blocks import Block, Narrow, Stack, gathered
from ..config import Config
from ..rows import Tokens
from ..source import Source
from .family import Family, TextBody


class Embeddings(Block, abstract=True):
    """The sum of the rows of a word, a position and a type, normalised.

    Parameters
    ----------
    padding : int or None
        Where positions are counted as RoBERTa does: from padding + 1 on, tokens of that number not counted.
    """

    NAMES = {
        "words": "word_embeddings",
        "positions": "position_embeddings",
        "types": "token_type_embeddings",
        "norm": "LayerNorm",
    }

    def __init__(self, config: Config, source: Source, name: str, padding: int | None) -> None:
        features, places = config.integer("hidden_size"), config.integer("max_position_embeddings")
        self.words = source.table(f"{name}.word_embeddings", config.integer("vocab_size"), features)
        self.positions = source.table(f"{name}.position_embeddings", places, features)
        types = config.integer("type_vocab_size", 2)
        self.types = source.table(f"{name}.token_type_embeddings", types, features)
        self.norm = source.layer_norm(f"{name}.LayerNorm", features, config.number("layer_norm_eps", 1e-12))
        self.padding = padding
        self._dropout = Dropout(config.share("hidden_dropout_prob", 0.1))
        self.longest = places if padding is None else places - padding - 1
        self._begin()

    def _forward(self, tokens: Tokens, run: Run) -> Array:
        places = run.sequences.positions  # type: ignore[union-attr]  # set by the model
        if self.padding is not None:
            places = counted_past(tokens, self.padding)
        kinds = np.zeros(len(tokens.ids), np.int64) if tokens.kinds is None else tokens.kinds
        tables = {self.words: tokens.ids, self.positions: places, self.types: kinds}
        y = self.norm._forward(gathered(tables, run), run)
        return self._dropout._forward(y, run, self._rng)

    def _backward(self, grad: Array, run: Run) -> None:
        below = self.norm._backward(self._dropout._backward(grad, run), run)
        for table in (self.types, self.positions, self.words):
            table._backward(below, run)


def counted_past(tokens: Tokens, padding: int) -> np.ndarray:
    """RoBERTa's positions: padding + 1, padding + 2, ... of the tokens that are not padding, whose own is padding."""
    real = tokens.ids != padding
    total = np.concatenate([[0], np.cumsum(real)])
    before = np.repeat(total[tokens.begins[:-1]], np.diff(tokens.begins))
    return np.where(real, total[1:] - before, 0) + padding


class EncoderLayer(Block, abstract=True):
    """x = norm(x + attention(x)), then norm(x + down(act(up(x))))."""

    NAMES = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }

    def __init__(self, config: Config, source: Source, name: str) -> None:
        width, heads, inner, eps, activation = self.settings(config)

        def linear(key: str, inputs: int, outputs: int, activation: str = "identity") -> Layer:
            return source.linear(f"{name}.{self.NAMES[key]}", inputs, outputs, activation=activation)

        self.query, self.key, self.value, self.output = (
            linear(key, width, width) for key in ("query", "key", "value", "output")
        )
        self.attention_norm = source.layer_norm(f"{name}.{self.NAMES['attention_norm']}", width, eps)
        self.up = linear("up", width, inner, activation)
        self.down = linear("down", inner, width)
        self.norm = source.layer_norm(f"{name}.{self.NAMES['norm']}", width, eps)
        of_weights, after_attention, after_mlp = self.dropouts(config)
        self._attention, self._narrow = Attention(heads, dropout=of_weights), Narrow()
        self._after_attention, self._after_mlp = Dropout(after_attention), Dropout(after_mlp)
        self._begin()

    @classmethod
    def settings(cls, config: Config) -> tuple[int, int, int, float, str]:
        """Features, heads, features inside the MLP, eps of the norms, and the activation."""
        width, heads = config.heads("hidden_size", "num_attention_heads")
        inner, eps = config.integer("intermediate_size"), config.number("layer_norm_eps", 1e-12)
        return width, heads, inner, eps, config.activation("hidden_act", "gelu")

    @classmethod
    def dropouts(cls, config: Config) -> tuple[float, float, float]:
        """Dropout of the weights of attention, of its output and of that of the MLP."""
        hidden = config.share("hidden_dropout_prob", 0.1)
        return config.share("attention_probs_dropout_prob", 0.1), hidden, hidden

    def _forward(self, x: Array, run: Run) -> Array:
        q, k, v = fan_out((self.query, self.key, self.value), x, run)
        a, x = self._narrow._forward(self._attention._forward(q, k, v, run, self._rng), x, run)
        y = self._after_attention._forward(self.output._forward(a, run), run, self._rng)
        x = self.attention_norm._forward(join(y, x, run), run)
        y = self._after_mlp._forward(self.down._forward(self.up._forward(x, run), run), run, self._rng)
        return self.norm._forward(join(y, x, run), run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        grad = self.norm._backward(grad, run)
        below = self.down._backward(self._after_mlp._backward(grad, run), run)
        grad = self.attention_norm._backward(rejoin(self.up._backward(below, run), grad, run), run)
        below = self.output._backward(self._after_attention._backward(grad, run), run)
        below, grad = self._narrow._backward(below, grad, run)
        below = self._attention._backward(below, run)
        return rejoin(fan_in((self.query, self.key, self.value), below, run), grad, run)


class Encoder(TextBody, abstract=True):
    """BERT without its pooler, which belongs to the head."""

    NAMES = {"layers": "encoder.layer"}

    embeddings: Any

    def __init__(self, config: Config, source: Source, name: str, padding: int | None = None) -> None:
        config.expect("position_embedding_type", "absolute", None)
        config.expect("is_decoder", False, None)
        self.embeddings = Embeddings(config, source, f"{name}.embeddings", padding)
        count = config.integer("num_hidden_layers")
        self.layers = Stack(EncoderLayer(config, source, f"{name}.encoder.layer.{i}") for i in range(count))
        self._begin()
        self.longest = self.embeddings.longest

    @property
    def table(self) -> Embedding:
        return self.embeddings.words

    def _forward(self, tokens: Tokens, run: Run) -> Array:
        return self.layers._forward(self.embeddings._forward(tokens, run), run)

    def _backward(self, grad: Array, run: Run) -> None:
        below = self.layers._backward(grad, run)
        if below is not None:
            self.embeddings._backward(below, run)


def pooler(config: Config, source: Source, name: str) -> dict[str, Layer]:
    """The dense layer on a sequence's first row, where the model's class has one."""
    width = config.integer("hidden_size")
    return {name: source.linear(name, width, width, activation="tanh")}


def classifier(config: Config, source: Source, labels: int) -> Mapping[str, Layer]:
    """The layers of the head."""
    head = {"classifier": source.linear("classifier", config.integer("hidden_size"), labels)}
    return pooler(config, source, "bert.pooler.dense") | head


def dropouts(config: Config) -> Mapping[str, float]:
    """What is dropped before the head's layers."""
    return {"classifier": head_dropout(config)}


def head_dropout(config: Config) -> float:
    """The head's own, or that of the rest."""
    return config.share("classifier_dropout", config.share("hidden_dropout_prob", 0.1))


def idle(config: Config, source: Source) -> Mapping[str, Layer]:
    """The pooler, which an embedding does not compute, where the file has it."""
    return pooler(config, source, "bert.pooler.dense") if source.has("bert.pooler.dense.weight") else {}


FAMILY = Family(
    called="Bert",
    prefix="bert",
    body=Encoder,
    classifier=classifier,
    head=("classifier",),
    dropouts=dropouts,
    idle=idle,
    tasks=("sequence-classification", "embedding"),
    place="first",
    pooler="bert.pooler.dense",
    unused=(r"bert\.pooler\.",),
)
