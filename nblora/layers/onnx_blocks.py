"""ONNX: the operations of `backends.blocks` that layers with a forward of their own trace."""

import copy
from typing import Any

from nblora.backends.blocks import Pooling, ReferenceBlocks
from nblora.storage.onnx_graph import OnnxGraph

from .activations import ACTIVATIONS


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

    def pool(self, x: Any, shape: Pooling) -> tuple[Any, None]:
        """Write maxima or means of windows down."""
        attributes = {"kernel_shape": shape.kernel, "strides": shape.stride, "pads": (*shape.padding, *shape.padding)}
        if shape.maximum:
            name = self.graph.node("MaxPool", x.name, **attributes)
        else:
            name = self.graph.node("AveragePool", x.name, count_include_pad=1, **attributes)
        y = _named(x, name)
        y.shape = (*x.shape[:2], *shape.reach(*x.shape[2:]))
        return y, None

    def means(self, x: Any) -> Any:
        """Write the mean of every channel down."""
        y = _named(x, self.graph.node("ReduceMean", x.name, axes=[2, 3], keepdims=0))
        y.shape = x.shape[:2]
        return y

    def channel_scale(self, weight: Any, bias: Any, mean: Any, variance: Any, eps: float) -> tuple[Any, Any]:
        """Compute what `channels` takes: constants of the graph."""
        weight, bias, mean, variance = map(self.fetch, (weight, bias, mean, variance))
        return ReferenceBlocks().channel_scale(weight, bias, mean, variance, eps)

    def channels(self, x: Any, scale: Any, shift: Any, code: int) -> Any:
        """Write act(x scale + shift) down."""
        graph = self.graph
        across = (-1, *(1,) * (x.ndim - 2))
        factor, term = (graph.constant(self.fetch(array).reshape(across), "channels") for array in (scale, shift))
        z = graph.node("Add", graph.node("Mul", x.name, factor), term)
        return _named(x, graph.activation(z, ACTIVATIONS[code]))


def _named(like: Any, name: str) -> Any:
    """A symbol of the same shape."""
    symbol = copy.copy(like)
    symbol.name = name
    return symbol
