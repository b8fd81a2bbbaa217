"""ONNX files: a graph built node by node, and written whole or not at all. Knows arrays, nothing of layers."""

import importlib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from nblora._version import __version__
from nblora.errors import MissingExtraError

from .atomic import replace_whole

OPSET = 17
IR_VERSION = 8
LARGEST = 2**31 - 2**20  # protobuf's limit, less room for what is not weights

_CHEBYSHEV_DEGREE = 27  # erfc to 2e-16 on the whole line


class OnnxGraph:
    """A graph from `x` to `y`, samples first, in one floating dtype.

    Values are known by name; `node` and `constant` return the names of what they make.
    """

    def __init__(self, dtype: np.dtype) -> None:
        try:
            self._onnx = importlib.import_module("onnx")
        except ImportError as error:
            raise MissingExtraError("to_onnx needs onnx, which is not installed: pip install 'nblora[onnx]'") from error
        self.dtype = dtype
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, value: Any, name: str = "constant") -> str:
        """Add an array or a number."""
        unique = f"{name}_{len(self._constants)}"
        array = np.asarray(value, self.dtype, order="C")
        self._constants.append(self._onnx.numpy_helper.from_array(array, unique))
        return unique

    def integers(self, *values: int) -> str:
        """Add integers, such as a shape."""
        unique = f"integers_{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(np.array(values, np.int64), unique))
        return unique

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        name = f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def activation(self, z: str, name: str) -> str:
        """Add an activation function by its name in nblora."""
        if name == "identity":
            return z
        if name == "gelu":
            half = self.node("Mul", z, self.constant(0.5))
            return self.node("Mul", half, self._one_plus_erf(self.node("Mul", z, self.constant(math.sqrt(0.5)))))
        if name in ("silu", "gelu_tanh", "quick_gelu"):
            return self.node("Mul", z, self.node("Sigmoid", self._gate(z, name)))
        return self.node(name.capitalize(), z)

    def _gate(self, z: str, name: str) -> str:
        """What the three whose form is z σ(w) have as w; 0.5 (1 + tanh(u)) is σ(2u)."""
        if name == "silu":
            return z
        if name == "quick_gelu":
            return self.node("Mul", z, self.constant(1.702))
        slope = 2 * math.sqrt(2 / math.pi)
        cubic = self.node("Mul", self.node("Mul", z, z), self.constant(0.044715 * slope))
        return self.node("Mul", z, self.node("Add", cubic, self.constant(slope)))

    def _one_plus_erf(self, v: str) -> str:
        """1 + erf(v). ONNX Runtime has Erf in float32 only, so float64 takes 1 + erf(v) = erfc(-v) from `Exp`."""
        if self.dtype == np.float32:
            return self.node("Add", self.node("Erf", v), self.constant(1))
        size, two = self.node("Abs", v), self.constant(2)
        tail = self._erfc_of_positive(size, two)
        return self.node("Where", self.node("Less", v, self.constant(0)), tail, self.node("Sub", two, tail))

    def _erfc_of_positive(self, size: str, two: str) -> str:
        """erfc(z) = t exp(p(2t - 1) - z²) with t = 2/(2 + z), p a Chebyshev series summed by Clenshaw's recurrence."""
        t = self.node("Div", two, self.node("Add", two, size))
        u = self.node("Sub", self.node("Mul", t, two), self.constant(1))
        twice = self.node("Mul", u, two)
        first, *rest = _chebyshev_of_erfc()
        later = last = self.constant(0)
        for coefficient in reversed(rest):
            step = self.node("Sub", self.node("Mul", twice, last), later)
            later, last = last, self.node("Add", step, self.constant(coefficient))
        series = self.node("Add", self.node("Sub", self.node("Mul", u, last), later), self.constant(first))
        return self.node("Mul", t, self.node("Exp", self.node("Sub", series, self.node("Mul", size, size))))

    def write(
        self,
        path: str | os.PathLike[str],
        output: str,
        axes: Sequence[int | str],
        out_axes: Sequence[int | str],
        integers: bool = False,
    ) -> None:
        """Check the graph that ends in the value `output`, and write it.

        `axes` and `out_axes` are those of x and y: sizes, and names of what is open. x holds integers, or what y does.

        Raises
        ------
        ValueError
            For weights beyond the 2 GiB that one ONNX file can hold.
        """
        size = sum(len(constant.raw_data) for constant in self._constants)
        if size > LARGEST:
            raise ValueError(f"one ONNX file holds at most {LARGEST} bytes of weights, and these are {size}")
        helper = self._onnx.helper
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        self._nodes.append(helper.make_node("Identity", [output], ["y"], "y"))
        graph = helper.make_graph(
            self._nodes,
            "nblora",
            [helper.make_tensor_value_info("x", self._onnx.TensorProto.INT64 if integers else kind, list(axes))],
            [helper.make_tensor_value_info("y", kind, list(out_axes))],
            self._constants,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, producer_name="nblora", producer_version=__version__, opset_imports=opsets, ir_version=IR_VERSION
        )
        self._onnx.checker.check_model(model)
        with replace_whole(path) as file:
            file.write(model.SerializeToString())


def _chebyshev_of_erfc() -> np.ndarray:
    """Coefficients of p(u) = log(erfc(z) exp(z²) / t), u = 2t - 1, t = 2/(2 + z)."""
    from scipy.special import erfcx

    def p(u: np.ndarray) -> np.ndarray:
        t = (u + 1) / 2
        return np.log(erfcx(2 / t - 2) / t)

    return np.polynomial.chebyshev.chebinterpolate(p, _CHEBYSHEV_DEGREE)
