"""Llama (Touvron et al., 2023): norms before, grouped heads, rotary positions, a gated MLP."""

from collections.abc import Mapping

from nblora.backends.protocol import Array
from nblora.layers import Embedding, Layer
from nblora.layers.attention import Attention, Rotary
from nblora.layers.functions import Gate, fan_in, fan_out, join, rejoin
from nblora.layers.run import Run

from ..blocks import Block, Narrow, Stack
from ..config import Config
from ..rows import Tokens
from ..source import Source
from .family import Family, TextBody


class DecoderLayer(Block, abstract=True):
    """x + o(attention(q, k, v of norm(x))), then x + down(act(gate(norm(x))) ∘ up(norm(x))).

    Parameters
    ----------
    biases : pair of bool
        Of q, k and v, and of o.
    """

    NAMES = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }

    def __init__(self, config: Config, source: Source, name: str, rotary: Rotary, biases: tuple[bool, bool]) -> None:
        width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        key_heads, size, inner = config.integer("num_key_value_heads", heads), rotary.size, "intermediate_size"
        if heads % key_heads:
            raise config.fault(f"num_key_value_heads is {key_heads}, which does not divide the {heads} heads")
        eps, mlp_bias = config.number("rms_norm_eps", 1e-6), config.flag("mlp_bias", False)

        def linear(key: str, inputs: int, outputs: int, bias: bool) -> Layer:
            return source.linear(f"{name}.{self.NAMES[key]}", inputs, outputs, bias=bias)

        self.norm = source.rms_norm(f"{name}.input_layernorm", width, eps)
        self.q = linear("q", width, heads * size, biases[0])
        self.k, self.v = (linear(key, width, key_heads * size, biases[0]) for key in ("k", "v"))
        self.o = linear("o", heads * size, width, biases[1])
        self.mlp_norm = source.rms_norm(f"{name}.post_attention_layernorm", width, eps)
        self.gate, self.up = (linear(key, width, config.integer(inner), mlp_bias) for key in ("gate", "up"))
        self.down = linear("down", config.integer(inner), width, mlp_bias)
        dropout = config.share("attention_dropout", 0.0)
        self._attention = Attention(heads, key_heads, causal=True, rotary=rotary, dropout=dropout)
        self._narrow, self._gated = Narrow(), Gate(config.activation("hidden_act", "silu"))
        self._begin()

    def _forward(self, x: Array, run: Run) -> Array:
        q, k, v = fan_out((self.q, self.k, self.v), self.norm._forward(x, run), run)
        a, x = self._narrow._forward(self._attention._forward(q, k, v, run, self._rng), x, run)
        x = join(self.o._forward(a, run), x, run)
        gate, up = fan_out((self.gate, self.up), self.mlp_norm._forward(x, run), run)
        return join(self.down._forward(self._gated._forward(gate, up, run), run), x, run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        gates = self._gated._backward(self.down._backward(grad, run), run)
        below = self.mlp_norm._backward(fan_in((self.gate, self.up), gates, run), run)
        rejoined = rejoin(below, grad, run)
        below, rejoined = self._narrow._backward(self.o._backward(rejoined, run), rejoined, run)
        heads = self._attention._backward(below, run)
        return rejoin(self.norm._backward(fan_in((self.q, self.k, self.v), heads, run), run), rejoined, run)


class Decoder(TextBody, abstract=True):
    """Table, layers and last norm."""

    NAMES = {"words": "embed_tokens"}

    def __init__(self, config: Config, source: Source, name: str, biases: tuple[bool, bool] | None = None) -> None:
        width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        size = config.integer("head_dim", width // heads or 1)
        if size % 2:
            raise config.fault(f"a head has {size} features, and rotary positions turn them in pairs")
        if biases is None:
            biases = (config.flag("attention_bias", False),) * 2
        rotary, count = Rotary(size, config.rope_theta()), config.integer("num_hidden_layers")
        self.words = source.table(f"{name}.embed_tokens", config.integer("vocab_size"), width)
        self.layers = Stack(DecoderLayer(config, source, f"{name}.layers.{i}", rotary, biases) for i in range(count))
        self.norm = source.rms_norm(f"{name}.norm", width, config.number("rms_norm_eps", 1e-6))
        self._begin()

    @property
    def table(self) -> Embedding:
        return self.words

    def _forward(self, tokens: Tokens, run: Run) -> Array:
        return self.norm._forward(self.layers._forward(self.words._forward(tokens.ids, run), run), run)

    def _backward(self, grad: Array, run: Run) -> None:
        below = self.layers._backward(self.norm._backward(grad, run), run)
        if below is not None:
            self.words._backward(below, run)


def classifier(config: Config, source: Source, labels: int) -> Mapping[str, Layer]:
    """The head, which reads a sequence's last row."""
    return {"score": source.linear("score", config.integer("hidden_size"), labels, bias=False)}


FAMILY = Family(
    called="Llama",
    prefix="model",
    body=Decoder,
    tasks=("causal-lm", "sequence-classification", "embedding"),
    classifier=classifier,
    head=("score",),
    place="last",
)
