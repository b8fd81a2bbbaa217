"""GPT-2 (Radford et al., 2019): norms before, learnt positions, one projection for queries, keys and values."""

import math
from collections.abc import Mapping

from nblora.backends.protocol import Array
from nblora.layers import Embedding, Layer
from nblora.layers.attention import Attention
from nblora.layers.functions import Dropout, join, rejoin
from nblora.layers.run import Run

from ..blocks import Block, Narrow, Split, Stack, gathered
from ..config import Config
from ..rows import Tokens
from ..source import Source
from .family import Family, TextBody


class DecoderLayer(Block, abstract=True):
    """x + c_proj(attention(c_attn(norm(x)))), then x + c_proj(act(c_fc(norm(x)))); weights are stored (in, out)."""

    NAMES = {
        "norm": "ln_1",
        "qkv": "attn.c_attn",
        "output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }

    def __init__(self, config: Config, source: Source, name: str) -> None:
        width, heads = config.heads("n_embd", "n_head")
        inner, eps = config.integer("n_inner", 4 * width), config.number("layer_norm_epsilon", 1e-5)
        activation = config.activation("activation_function", "gelu_new")
        self.norm = source.layer_norm(f"{name}.ln_1", width, eps)
        self.qkv = source.turned_linear(f"{name}.attn.c_attn", width, 3 * width)
        self.output = source.turned_linear(f"{name}.attn.c_proj", width, width)
        self.mlp_norm = source.layer_norm(f"{name}.ln_2", width, eps)
        self.up = source.turned_linear(f"{name}.mlp.c_fc", width, inner, activation=activation)
        self.down = source.turned_linear(f"{name}.mlp.c_proj", inner, width)
        scale = 1 / math.sqrt(width // heads) if config.flag("scale_attn_weights", True) else 1.0
        dropout, of_outputs = config.share("attn_pdrop", 0.1), config.share("resid_pdrop", 0.1)
        self._split, self._narrow = Split(3), Narrow()
        self._attention = Attention(heads, causal=True, scale=scale, dropout=dropout)
        self._after_attention, self._after_mlp = Dropout(of_outputs), Dropout(of_outputs)
        self._begin()

    def _forward(self, x: Array, run: Run) -> Array:
        q, k, v = self._split._forward(self.qkv._forward(self.norm._forward(x, run), run), run)
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
        below = self._split._backward(self._attention._backward(below, run), run)
        return rejoin(self.norm._backward(self.qkv._backward(below, run), run), rejoined, run)


class Decoder(TextBody, abstract=True):
    """Tables of words and positions, layers and last norm."""

    NAMES = {"words": "wte", "positions": "wpe", "layers": "h", "norm": "ln_f"}

    def __init__(self, config: Config, source: Source, name: str) -> None:
        config.expect("scale_attn_by_inverse_layer_idx", False, None)
        width, places, count = config.integer("n_embd"), config.integer("n_positions"), config.integer("n_layer")
        self.words = source.table(f"{name}.wte", config.integer("vocab_size"), width)
        self.positions = source.table(f"{name}.wpe", places, width)
        self.layers = Stack(DecoderLayer(config, source, f"{name}.h.{i}") for i in range(count))
        self.norm = source.layer_norm(f"{name}.ln_f", width, config.number("layer_norm_epsilon", 1e-5))
        self._dropout = Dropout(config.share("embd_pdrop", 0.1))
        self._begin()
        self.longest = places

    @property
    def table(self) -> Embedding:
        return self.words

    def _forward(self, tokens: Tokens, run: Run) -> Array:
        places = run.sequences.positions  # type: ignore[union-attr]  # set by the model
        x = gathered({self.words: tokens.ids, self.positions: places}, run)
        x = self._dropout._forward(x, run, self._rng)
        return self.norm._forward(self.layers._forward(x, run), run)

    def _backward(self, grad: Array, run: Run) -> None:
        below = self.layers._backward(self.norm._backward(grad, run), run)
        below = self._dropout._backward(below, run)
        if below is not None:
            self.positions._backward(below, run)
            self.words._backward(below, run)


def classifier(config: Config, source: Source, labels: int) -> Mapping[str, Layer]:
    """The head, which reads a sequence's last row."""
    return {"score": source.linear("score", config.integer("n_embd"), labels, bias=False)}


FAMILY = Family(
    called="GPT2",
    prefix="transformer",
    body=Decoder,
    tasks=("causal-lm", "sequence-classification", "embedding"),
    classifier=classifier,
    head=("score",),
    place="last",
    tied=True,
    buffers=(r"\.attn\.(masked_)?bias$",),
)
