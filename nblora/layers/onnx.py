"""ONNX: a forward traced on names instead of arrays, whatever the tree that computes it."""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nblora.backends.protocol import Backend, Operands, Slide
from nblora.storage.onnx_graph import OnnxGraph

from .activations import ACTIVATIONS
from .onnx_blocks import BlockTracer
from .run import Run

if TYPE_CHECKING:
    from .base import Layer


class Symbol:
    """A value of the graph under construction, where a forward has an array.

    Its shape is that of one example: axes that are open have some size.
    """

    flags = SimpleNamespace(c_contiguous=True, aligned=True)
    size = 0  # there are no numbers to look at

    def __init__(self, graph: OnnxGraph, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.name, self.shape, self.dtype, self._graph = name, shape, dtype, graph

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def reshape(self, *shape: Any) -> "Symbol":
        """Between sequences and images of one row, and to the shape that it has."""
        wanted = shape[0] if isinstance(shape[0], tuple) else shape
        if wanted == self.shape:
            return self
        sizes = (0, 0, 1, -1) if len(wanted) == 4 else (0, 0, -1)
        name = self._graph.node("Reshape", self.name, self._graph.integers(*sizes))
        return Symbol(self._graph, name, wanted, self.dtype)


class Tracer(BlockTracer):
    """A backend that writes down what it is asked to compute."""

    def __init__(self, graph: OnnxGraph, backend: Backend) -> None:
        self.graph, self.fetch = graph, backend.to_host

    def forward(self, x: Symbol, operands: Operands, mask: None, keep: bool) -> tuple[Symbol, None]:
        """Write y = act(x W + b + s (x A) B + c (x D)) down."""
        base, low_rank, delta, code, _ = operands
        graph, transposed = self.graph, base is not None and base.transposed

        def product(value: str, matrix: Any, name: str, turned: bool = False) -> str:
            host = self.fetch(matrix)
            return graph.node("MatMul", value, graph.constant(host.T if turned else host, name))

        terms = []
        if base is not None:
            terms.append(product(x.name, base.weight, "weight", transposed))
            if base.bias is not None:
                terms.append(graph.constant(self.fetch(base.bias), "bias"))
        if low_rank is not None:
            low = product(product(x.name, low_rank.A, "lora_A"), low_rank.B, "lora_B")
            terms.append(graph.node("Mul", low, graph.constant(low_rank.scaling, "scaling")))
        if delta is not None:
            dense = product(x.name, delta.delta, "delta", transposed)
            terms.append(graph.node("Mul", dense, graph.constant(delta.scaling, "delta_scaling")))
        z = terms[0]
        for term in terms[1:]:
            z = graph.node("Add", z, term)
        features = _outputs(base) if low_rank is None else low_rank.B.shape[1]
        return self.symbol(graph.activation(z, ACTIVATIONS[code]), (*x.shape[:-1], features)), None

    def symbol(self, name: str, shape: tuple[int, ...]) -> Symbol:
        """A value that a node made."""
        return Symbol(self.graph, name, shape, self.graph.dtype)

    def convolution(self, slide: Slide) -> Any:
        """The product of patches, written down as ONNX's convolution."""
        return TracedConvolution(self, slide)

    def embedding(self) -> Any:
        """The product of rows that integers name, written down as ONNX's `Gather`."""
        return TracedEmbedding(self)

    def add(self, target: Symbol, source: Symbol) -> None:
        """Write target += source down."""
        target.name = self.graph.node("Add", target.name, source.name)


class TracedConvolution:
    """A convolution's step, written down."""

    def __init__(self, tracer: Tracer, slide: Slide) -> None:
        self._tracer, self._slide = tracer, slide

    def forward(self, x: Symbol, operands: Operands, mask: None, keep: bool) -> tuple[Symbol, None]:
        """Write y = act(x∗W + b + s (x∗A)∗B + c (x∗D)) down."""
        base, low_rank, delta, code, _ = operands
        assert base is not None  # a convolution has a weight
        graph, fetch, slide, channels = self._tracer.graph, self._tracer.fetch, self._slide, x.shape[1]
        settings = {"strides": slide.stride, "pads": slide.padding * 2, "dilations": slide.dilation}

        def convolve(matrix: Any, name: str, *bias: str) -> str:
            weight = fetch(matrix).reshape(-1, channels, *slide.kernel)
            return graph.node("Conv", x.name, graph.constant(weight, name), *bias, **settings)

        z = convolve(base.weight, "weight", *(() if base.bias is None else [graph.constant(fetch(base.bias), "bias")]))
        terms = []
        if low_rank is not None:
            low = convolve(fetch(low_rank.A).T, "lora_A")
            up = graph.constant(fetch(low_rank.B).T[..., None, None], "lora_B")
            terms.append((graph.node("Conv", low, up), low_rank.scaling))
        if delta is not None:
            terms.append((convolve(delta.delta, "delta"), delta.scaling))
        for term, factor in terms:
            z = graph.node("Add", z, graph.node("Mul", term, graph.constant(factor, "scaling")))
        shape = len(base.weight), *slide.reach(*x.shape[2:])
        return self._tracer.symbol(graph.activation(z, ACTIVATIONS[code]), (x.shape[0], *shape)), None


class TracedEmbedding:
    """An embedding's step, written down."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def forward(self, x: Symbol, operands: Operands, mask: None, keep: bool) -> tuple[Symbol, None]:
        """Write y = W[x] + s A[x] B + c D[x] down."""
        base, low_rank, delta, _, _ = operands
        assert base is not None  # an embedding has a table
        graph, fetch = self._tracer.graph, self._tracer.fetch

        def take(table: Any, name: str) -> str:
            return graph.node("Gather", graph.constant(fetch(table), name), x.name)

        y, terms = take(base.weight, "weight"), []
        if low_rank is not None:
            low = graph.node("MatMul", take(low_rank.A, "lora_A"), graph.constant(fetch(low_rank.B), "lora_B"))
            terms.append((low, low_rank.scaling))
        if delta is not None:
            terms.append((take(delta.delta, "delta"), delta.scaling))
        for term, factor in terms:
            y = graph.node("Add", y, graph.node("Mul", term, graph.constant(factor, "scaling")))
        return self._tracer.symbol(y, (*x.shape, base.weight.shape[1])), None


def _outputs(base: Any) -> int:
    return base.weight.shape[0 if base.transposed else 1]


def write_graph(layer: "Layer", path: str | os.PathLike[str]) -> None:
    """Write a layer's forward, as it is in evaluation mode, to an ONNX file."""
    graph = OnnxGraph(layer.dtype)
    run = Run(cast(Backend, Tracer(graph, layer._backend)))
    example = layer._example(1)
    y = layer._forward(Symbol(graph, "x", example.shape, example.dtype), run)
    places = (f"place_{axis}" for axis in range(2, y.ndim))
    graph.write(path, y.name, layer._axes(), ("batch", y.shape[1], *places), example.dtype.kind != "f")
