"""DistilBERT (Sanh et al., 2019): BERT's layers under other names, without token types."""

from collections.abc import Mapping

from nblora.backends.protocol import Array
from nblora.layers import Layer
from nblora.layers.functions import Dropout
from nblora.layers.run import Run

from ..blocks import Block, Stack, gathered
from ..config import Config
from ..rows import Tokens
from ..source import Source
from . import bert
from .family import Family


class Embeddings(Block, abstract=True):
    """The sum of the rows of a word and a position, normalised."""

    NAMES = {"words": "word_embeddings", "positions": "position_embeddings", "norm": "LayerNorm"}

    def __init__(self, config: Config, source: Source, name: str) -> None:
        features, self.longest = config.integer("dim"), config.integer("max_position_embeddings")
        self.words = source.table(f"{name}.word_embeddings", config.integer("vocab_size"), features)
        self.positions = source.table(f"{name}.position_embeddings", self.longest, features)
        self.norm = source.layer_norm(f"{name}.LayerNorm", features, 1e-12)
        self._dropout = Dropout(config.share("dropout", 0.1))
        self._begin()

    def _forward(self, tokens: Tokens, run: Run) -> Array:
        places = run.sequences.positions  # type: ignore[union-attr]  # set by the model
        y = self.norm._forward(gathered({self.words: tokens.ids, self.positions: places}, run), run)
        return self._dropout._forward(y, run, self._rng)

    def _backward(self, grad: Array, run: Run) -> None:
        below = self.norm._backward(self._dropout._backward(grad, run), run)
        self.positions._backward(below, run)
        self.words._backward(below, run)


class EncoderLayer(bert.EncoderLayer, abstract=True):
    """BERT's layer."""

    NAMES = {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "output": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm": "output_layer_norm",
    }

    @classmethod
    def settings(cls, config: Config) -> tuple[int, int, int, float, str]:
        width, heads = config.heads("dim", "n_heads")
        return width, heads, config.integer("hidden_dim"), 1e-12, config.activation("activation", "gelu")

    @classmethod
    def dropouts(cls, config: Config) -> tuple[float, float, float]:
        return config.share("attention_dropout", 0.1), 0.0, config.share("dropout", 0.1)


class Encoder(bert.Encoder, abstract=True):
    """DistilBERT's body."""

    NAMES = {"layers": "transformer.layer"}

    def __init__(self, config: Config, source: Source, name: str) -> None:
        self.embeddings = Embeddings(config, source, f"{name}.embeddings")
        count = config.integer("n_layers")
        self.layers = Stack(EncoderLayer(config, source, f"{name}.transformer.layer.{i}") for i in range(count))
        self._begin()
        self.longest = self.embeddings.longest


def classifier(config: Config, source: Source, labels: int) -> Mapping[str, Layer]:
    """The layers of the head."""
    width = config.integer("dim")
    dense = source.linear("pre_classifier", width, width, activation="relu")
    return {"pre_classifier": dense, "classifier": source.linear("classifier", width, labels)}


def dropouts(config: Config) -> Mapping[str, float]:
    """What is dropped before the head's layers."""
    return {"classifier": config.share("seq_classif_dropout", 0.2)}


FAMILY = Family(
    called="DistilBert",
    prefix="distilbert",
    body=Encoder,
    tasks=("sequence-classification", "embedding"),
    classifier=classifier,
    head=("pre_classifier", "classifier"),
    dropouts=dropouts,
    place="first",
)
