"""ONNX: the operations of `backends.blocks` that layers with a forward of their own trace."""

import copy
from typing import Any

from nblora.storage.onnx_graph import OnnxGraph


class BlockTracer:
    """What a `Tracer` writes down beside the linear step."""

    graph: OnnxGraph
    fetch: Any

    def norm(self, x: Any, weight: Any, bias: Any, eps: float, centred: bool) -> tuple[Any, None]:
        """Write y = (x - m) / √(mean (x - m)² + eps)·weight + bias down."""
        graph, centre = self.graph, x.name
        if centred:
            centre = graph.node("Sub", centre, graph.node("ReduceMean", centre, axes=[-1]))
        square = graph.node("ReduceMean", graph.node("Mul", centre, centre), axes=[-1])
        spread = graph.node("Sqrt", graph.node("Add", square, graph.constant(eps, "eps")))
        y = graph.node("Mul", graph.node("Div", centre, spread), graph.constant(self.fetch(weight), "weight"))
        if bias is not None:
            y = graph.node("Add", y, graph.constant(self.fetch(bias), "bias"))
        return _named(x, y), None


def _named(like: Any, name: str) -> Any:
    """A symbol of the same shape."""
    symbol = copy.copy(like)
    symbol.name = name
    return symbol
