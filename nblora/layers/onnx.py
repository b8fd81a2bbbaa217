"""ONNX: a forward traced on names instead of arrays, whatever the tree that computes it."""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from nblora.backends.protocol import Backend, Operands
from nblora.storage.onnx_graph import OnnxGraph

from .activations import ACTIVATIONS
from .run import Run

if TYPE_CHECKING:
    from .base import Layer


class Symbol:
    """A value of the graph under construction, where a forward has an array."""

    flags = SimpleNamespace(c_contiguous=True, aligned=True)
    ndim = 2

    def __init__(self, name: str, features: int) -> None:
        self.name, self.shape = name, (1, features)  # of the batch, which is open, one sample


class Tracer:
    """A backend that writes down what it is asked to compute."""

    def __init__(self, graph: OnnxGraph, backend: Backend) -> None:
        self._graph, self._fetch = graph, backend.to_host

    def forward(self, x: Symbol, operands: Operands, mask: None, keep: bool) -> tuple[Symbol, None]:
        """Write y = act(x W + b + s (x A) B + c (x D)) down."""
        base, low_rank, delta, code, _ = operands
        graph, transposed = self._graph, base is not None and base.transposed

        def product(value: str, matrix: Any, name: str, turned: bool = False) -> str:
            host = self._fetch(matrix)
            return graph.node("MatMul", value, graph.constant(host.T if turned else host, name))

        terms = []
        if base is not None:
            terms.append(product(x.name, base.weight, "weight", transposed))
            if base.bias is not None:
                terms.append(graph.constant(self._fetch(base.bias), "bias"))
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
        return Symbol(graph.activation(z, ACTIVATIONS[code]), features), None

    def add(self, target: Symbol, source: Symbol) -> None:
        """Write target += source down."""
        target.name = self._graph.node("Add", target.name, source.name)


def _outputs(base: Any) -> int:
    return base.weight.shape[0 if base.transposed else 1]


def write_graph(layer: "Layer", path: str | os.PathLike[str]) -> None:
    """Write a layer's forward, as it is in evaluation mode, to an ONNX file."""
    graph = OnnxGraph(layer.dtype)
    run = Run(cast(Backend, Tracer(graph, layer._backend)))
    y = layer._forward(Symbol("x", layer.in_features), run)
    graph.write(path, y.name, layer.in_features, layer.out_features)
