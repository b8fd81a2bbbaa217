"""ViT (Dosovitskiy et al., 2021): an encoder with norms before, on patches of images and a token for their class."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, cast

import numpy as np

from nblora import checks
from nblora.backends import default_backend
from nblora.backends.protocol import Array, Rows
from nblora.kernels.patches.window import pointwise
from nblora.layers import Layer
from nblora.layers.attention import Attention
from nblora.layers.diagnostics import describe_own
from nblora.layers.functions import Dropout, fan_in, fan_out, join, rejoin
from nblora.layers.parameters import Parameter
from nblora.layers.run import Run, Sequences
from nblora.storage.checkpoint import take_tensor

from ..blocks import Block, Narrow, Stack
from ..config import Config
from ..source import Source
from .family import Family

MOST_KNOWN = 4
"""Batch sizes whose rows are kept: training has two, that of a whole batch and that of the last."""

FIRST = np.zeros(1, np.int64)


class _Places(NamedTuple):
    """Which rows of `count` images are what, all int64: the position of each row; the first of every image, and a zero
    for each; the others; and which rows are summed for the gradient of a position."""

    positions: np.ndarray
    first: np.ndarray
    none: np.ndarray
    others: np.ndarray
    samples: Rows

    @classmethod
    def of(cls, count: int, size: int) -> "_Places":
        """Those of images of `size` rows."""
        rows = np.arange(count * size).reshape(count, size)
        first, others = np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1:]).reshape(-1)
        samples = Rows(np.ascontiguousarray(rows.T).reshape(-1), np.arange(size + 1) * count)
        return cls(np.tile(np.arange(size), count), first, np.zeros(count, np.int64), others, samples)


class ClassToken(Layer):
    """Images of features (N, features, height, width) as rows: a learnt one first, then those of all places, each with
    the row of its position added.

    Parameters
    ----------
    token : array, shape (1, 1, features)
    positions : array, shape (1, places + 1, features)
    """

    def __init__(self, token: Any, positions: Any) -> None:
        stored = checks.as_parameter("positions", positions, (1, None, None))
        self.dtype, self.in_features, self.out_features = stored.dtype, stored.shape[2], stored.shape[2]
        shape = (1, 1, self.in_features)
        self._token = Parameter(checks.as_parameter("token", token, shape, self.dtype))
        self._positions = Parameter(stored)
        self._known: dict[int, _Places] = {}
        self._open(default_backend())

    def _own_parameters(self) -> dict[str, Parameter]:
        return {"cls_token": self._token, "position_embeddings": self._positions}

    def _places(self, count: int) -> _Places:
        """The rows of `count` images; the same arrays again, whose copies a GPU finds."""
        if count not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[count] = _Places.of(count, self._positions.shape[1])
        return self._known[count]

    def _forward(self, x: Array, run: Run) -> Array:
        backend, (count, features) = cast(Any, run.backend), x.shape[:2]
        places, positions = self._places(count), self._positions.array.reshape(-1, features)
        rows, tokens = (backend.empty((len(found), features), x.dtype) for found in (places.positions, places.first))
        window = pointwise(features, len(positions) - 1)
        patches = backend.unfold(x.reshape(count, features, 1, window.width), window, 0, count * window.width)
        backend.take_rows([positions], [1.0], places.positions, rows, False)
        backend.take_rows([self._token.array.reshape(1, features)], [1.0], places.none, tokens, False)
        backend.scatter(rows, places.first, tokens, add=True)
        backend.scatter(rows, places.others, patches, add=True)
        if run.training:
            trained = self.trainable and not run.frozen
            run.keep(self, (x.shape, run.live, trained) if run.live or trained else None)
            run.live = run.live or trained
        run.passed(self, rows)
        return rows

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept = run.recall(self)
        if kept is None:
            return None
        shape, live, trained = kept
        backend, places = cast(Any, run.backend), self._places(shape[0])
        if trained:
            total = backend.empty(self._positions.shape[1:], grad.dtype)
            backend.sum_rows(grad, places.samples, 1.0, total)
            run.sink.put(self._positions, total.reshape(self._positions.shape), run)
            run.sink.put(self._token, backend.gather(total, FIRST).reshape(self._token.shape), run)
        if not live:
            return None
        gx, window = backend.empty(shape, grad.dtype), pointwise(shape[1], self._positions.shape[1] - 1)
        lines = gx.reshape(shape[0], shape[1], 1, window.width)
        backend.fold(backend.gather(grad, places.others), window, 0, lines, False)
        return gx

    def diagnostics(self) -> dict[str, Any]:
        return describe_own(self, {"trainable": self.trainable})

    def _config(self) -> dict[str, Any]:
        sizes = {"positions": self._positions.shape[1], "features": self.in_features, "dtype": self.dtype.name}
        return {**sizes, "trainable": self.trainable, "training": self.training}

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        dtype, features = checks.check_dtype(config["dtype"]), config["features"]
        token = take_tensor(tensors, "cls_token", dtype, (1, 1, features))
        layer = cls(token, take_tensor(tensors, "position_embeddings", dtype, (1, config["positions"], features)))
        layer.trainable = checks.check_flag("trainable", config["trainable"])
        return layer.train() if config["training"] else layer.eval()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features})" if not self._closed else f"{type(self).__name__}(closed)"


class Embeddings(Block, abstract=True):
    """Patches as rows."""

    NAMES = {"patches": "patch_embeddings.projection", "token": ""}

    def __init__(self, config: Config, source: Source, name: str) -> None:
        width, image, patch = config.integer("hidden_size"), config.pair("image_size"), config.pair("patch_size")
        channels, places = config.integer("num_channels", 3), (image[0] // patch[0]) * (image[1] // patch[1])
        if not places:
            raise config.fault(f"patch_size is {patch}, larger than image_size, {image}")
        self.image = channels, *image
        self.patches = source.convolution(
            f"{name}.patch_embeddings.projection", channels, width, patch, stride=patch, bias=True
        )
        token = source.take(f"{name}.cls_token", 1, 1, width)
        self.token = ClassToken(token, source.take(f"{name}.position_embeddings", 1, places + 1, width))
        self._dropout = Dropout(config.share("hidden_dropout_prob", 0.0))
        self._begin()
        self.places = places + 1

    def _forward(self, images: Array, run: Run) -> Array:
        y = self.token._forward(self.patches._forward(images, run), run)
        return self._dropout._forward(y, run, self._rng)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        return self.patches._backward(self.token._backward(self._dropout._backward(grad, run), run), run)


class EncoderLayer(Block, abstract=True):
    """x + output(attention(norm(x))), then x + down(act(up(norm(x))))."""

    NAMES = {
        "norm": "layernorm_before",
        "query": "attention.attention.query",
        "key": "attention.attention.key",
        "value": "attention.attention.value",
        "output": "attention.output.dense",
        "mlp_norm": "layernorm_after",
        "up": "intermediate.dense",
        "down": "output.dense",
    }

    def __init__(self, config: Config, source: Source, name: str) -> None:
        width, heads = config.heads("hidden_size", "num_attention_heads")
        inner, eps = config.integer("intermediate_size"), config.number("layer_norm_eps", 1e-12)
        activation, bias = config.activation("hidden_act", "gelu"), config.flag("qkv_bias", True)
        self.norm, self.mlp_norm = (
            source.layer_norm(f"{name}.{self.NAMES[key]}", width, eps) for key in ("norm", "mlp_norm")
        )
        self.query, self.key, self.value = (
            source.linear(f"{name}.{self.NAMES[key]}", width, width, bias=bias) for key in ("query", "key", "value")
        )
        self.output = source.linear(f"{name}.{self.NAMES['output']}", width, width)
        self.up = source.linear(f"{name}.{self.NAMES['up']}", width, inner, activation=activation)
        self.down = source.linear(f"{name}.{self.NAMES['down']}", inner, width)
        self._attention = Attention(heads, dropout=config.share("attention_probs_dropout_prob", 0.0))
        self._narrow = Narrow()
        hidden = config.share("hidden_dropout_prob", 0.0)
        self._after_attention, self._after_mlp = Dropout(hidden), Dropout(hidden)
        self._begin()

    def _forward(self, x: Array, run: Run) -> Array:
        q, k, v = fan_out((self.query, self.key, self.value), self.norm._forward(x, run), run)
        a, x = self._narrow._forward(self._attention._forward(q, k, v, run, self._rng), x, run)
        y = self.output._forward(a, run)
        x = join(self._after_attention._forward(y, run, self._rng), x, run)
        y = self.down._forward(self.up._forward(self.mlp_norm._forward(x, run), run), run)
        return join(self._after_mlp._forward(y, run, self._rng), x, run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        below = self.down._backward(self._after_mlp._backward(grad, run), run)
        rejoined = rejoin(self.mlp_norm._backward(self.up._backward(below, run), run), grad, run)
        below = self.output._backward(self._after_attention._backward(rejoined, run), run)
        below, rejoined = self._narrow._backward(below, rejoined, run)
        below = self._attention._backward(below, run)
        return rejoin(self.norm._backward(fan_in((self.query, self.key, self.value), below, run), run), rejoined, run)


class Encoder(Block, abstract=True):
    """Patches, layers and last norm."""

    NAMES = {"layers": "encoder.layer", "norm": "layernorm"}

    def __init__(self, config: Config, source: Source, name: str) -> None:
        self.embeddings = Embeddings(config, source, f"{name}.embeddings")
        count = config.integer("num_hidden_layers")
        self.layers = Stack(EncoderLayer(config, source, f"{name}.encoder.layer.{i}") for i in range(count))
        width, eps = config.integer("hidden_size"), config.number("layer_norm_eps", 1e-12)
        self.norm = source.layer_norm(f"{name}.layernorm", width, eps)
        self._begin()
        self.image = self.embeddings.image

    def _forward(self, images: Array, run: Run) -> Array:
        run.sequences = Sequences.of(np.full(len(images), self.embeddings.places))
        return self.norm._forward(self.layers._forward(self.embeddings._forward(images, run), run), run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        below = self.layers._backward(self.norm._backward(grad, run), run)
        return None if below is None else self.embeddings._backward(below, run)


def classifier(config: Config, source: Source, labels: int) -> Mapping[str, Layer]:
    """The head, which reads the row of the class."""
    return {"classifier": source.linear("classifier", config.integer("hidden_size"), labels)}


_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
"""What checkpoints call a layer's parts, and what transformers 5 does."""

FAMILY = Family(
    called="ViT",
    prefix="vit",
    body=Encoder,
    tasks=("image-classification",),
    classifier=classifier,
    head=("classifier",),
    place="first",
    renames=(
        *((rf"(^|\.)layers\.(\d+)\.{re.escape(new)}(?=\.|$)", rf"\1encoder.layer.\2.{old}") for old, new in _RENAMED),
        (r"(^|\.)layers\.(\d+)\.layernorm_", r"\1encoder.layer.\2.layernorm_"),
    ),
    adapter_names=(
        *((rf"encoder\.layer\.(\d+)\.{re.escape(old)}(?=\.|$)", rf"layers.\1.{new}") for old, new in _RENAMED),
        (r"encoder\.layer\.(\d+)\.layernorm_", r"layers.\1.layernorm_"),
    ),
    unused=(r"vit\.pooler\.",),
)
