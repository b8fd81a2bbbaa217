"""RoBERTa (Liu et al., 2019): BERT's encoder; positions begin behind that of padding, and the head has two layers."""

from collections.abc import Mapping

from nblora.layers import Layer

from ..config import Config
from ..source import Source
from . import bert
from .family import Family


def body(config: Config, source: Source, name: str) -> bert.Encoder:
    """The encoder."""
    return bert.Encoder(config, source, name, config.integer("pad_token_id", 1, 0))


def classifier(config: Config, source: Source, labels: int) -> Mapping[str, Layer]:
    """The layers of the head."""
    width = config.integer("hidden_size")
    dense = source.linear("classifier.dense", width, width, activation="tanh")
    return {"classifier.dense": dense, "classifier.out_proj": source.linear("classifier.out_proj", width, labels)}


def dropouts(config: Config) -> Mapping[str, float]:
    """What is dropped before the head's layers."""
    return dict.fromkeys(FAMILY.head, bert.head_dropout(config))


def idle(config: Config, source: Source) -> Mapping[str, Layer]:
    """The pooler, which an embedding does not compute, where the file has it."""
    name = "roberta.pooler.dense"
    return bert.pooler(config, source, name) if source.has(f"{name}.weight") else {}


FAMILY = Family(
    called="Roberta",
    prefix="roberta",
    body=body,
    tasks=("sequence-classification", "embedding"),
    classifier=classifier,
    head=("classifier.dense", "classifier.out_proj"),
    dropouts=dropouts,
    place="first",
    idle=idle,
    unused=(r"roberta\.pooler\.",),
)
