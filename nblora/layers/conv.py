"""`Conv1d` and `Conv2d`: the linear step on the patches of images, and of sequences."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array, Backend, Product, Slide

from .weighted import Weighted, drawn


class Convolution(Weighted, abstract=True):
    """What `Conv1d` and `Conv2d` share: a sequence is an image with one row."""

    _transposed = True
    _open_axes: ClassVar[tuple[str, ...]]
    """The names of the open axes."""

    def __init__(
        self,
        weight: Any,
        bias: Any = None,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        activation: str = "identity",
    ) -> None:
        axes = len(self._open_axes)
        stored = checks.as_parameter("weight", weight, (None, None, *[None] * axes))
        if checks.check_integer("groups", groups, 1) != 1:
            raise ValueError(
                f"groups must be 1, got {groups}: {type(self).__name__} has no grouped or depthwise convolution"
            )
        self.kernel_size = stored.shape[2:]
        self.stride = checks.check_each("stride", stride, axes, 1)
        self.padding = checks.check_each("padding", padding, axes, 0)
        self.dilation = checks.check_each("dilation", dilation, axes, 1)
        self.in_channels, self.out_channels = stored.shape[1], stored.shape[0]
        self._slide = Slide(*map(_pair, self._sizes(), (1, 1, 0, 1)))
        self._hold(stored.reshape(len(stored), -1), bias, activation)

    def _sizes(self) -> tuple[tuple[int, ...], ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation

    @classmethod
    def random(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        activation: str = "identity",
        bias: bool = True,
        dtype: Any = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> Self:
        """Make a layer with weight and bias uniform in ±1/sqrt(in_features), as PyTorch's does.

        in_features is the numbers of a patch, in_channels times the kernel's elements.
        """
        channels = checks.check_integer("in_channels", in_channels, 1)
        outputs = checks.check_integer("out_channels", out_channels, 1)
        kernel = checks.check_each("kernel_size", kernel_size, len(cls._open_axes), 1)
        shape = (outputs, channels, *kernel)
        made = drawn(shape, int(np.prod(shape[1:])), outputs, bias, dtype, seed)
        return cls(*made, stride=stride, padding=padding, dilation=dilation, activation=activation)

    @property
    def weight(self) -> Array:
        """The stored weight, (out_channels, in_channels, *kernel_size)."""
        return self._weight.array.reshape(self.out_channels, self.in_channels, *self.kernel_size)

    # --- computing ---------------------------------------------------------------------------------------------

    @property
    def _takes(self) -> int:
        return self.in_channels

    def _product(self, backend: Backend) -> Product:
        return backend.convolution(self._slide)

    def _batch(self, x: Array) -> Array:
        self._output_shape("x", x.shape)  # here, for what calls no public forward comes by too
        return self._grad_batch(x)

    def _grad_batch(self, grad: Array) -> Array:
        return checks.as_contiguous(grad.reshape(self._image_shape(grad.shape)))

    def _image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """That of an input or output as a batch of images: sequences are images of one row."""
        axes = len(self._open_axes)
        batch = shape[:-axes] if len(shape) == axes + 2 else (1, *shape[:-axes])
        return *batch, *[1] * (2 - axes), *shape[-axes:]

    def _as_input(self, name: str, value: Any) -> Array:
        return checks.as_images(name, value, self.in_channels, self._open_axes, self.dtype)

    def _as_output(self, name: str, value: Any) -> Array:
        return checks.as_images(name, value, self.out_channels, self._open_axes, self.dtype)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        checks.check_images(name, shape, self.in_channels, self._open_axes)
        axes = len(self._open_axes)
        reach = self._slide.reach(*self._image_shape(shape)[2:])[2 - axes :]
        if min(reach) < 1:
            raise ValueError(
                f"{name} of shape {shape} is too small for {self!r}: its output would be empty; give larger samples or "
                "more padding"
            )
        return *shape[: -axes - 1], self.out_channels, *reach

    def _axes(self) -> tuple[int | str, ...]:
        return "batch", self.in_channels, *self._open_axes

    def _example(self, samples: int) -> np.ndarray:
        """One sample with so many patches."""
        sizes = [step * (size - 1) + 1 for size, step in zip(self.kernel_size, self.dilation, strict=True)]
        sizes[-1] += (samples - 1) * self.stride[-1]
        return np.zeros((1, self.in_channels, *sizes), self.dtype)

    # --- describing and keeping --------------------------------------------------------------------------------

    @classmethod
    def _made(cls, weight: np.ndarray, bias: np.ndarray | None, config: Mapping[str, Any]) -> Self:
        settings: dict[str, Any] = {name: tuple(config[name]) for name in ("stride", "padding", "dilation")}
        shape = len(weight), -1, *config["kernel_size"]
        return cls(weight.reshape(shape), bias, activation=config["activation"], **settings)

    def _settings(self) -> dict[str, Any]:
        names = "kernel_size", "stride", "padding", "dilation"
        return {name: list(sizes) for name, sizes in zip(names, self._sizes(), strict=True)} | super()._settings()

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        parts = [str(self.in_channels), str(self.out_channels), f"kernel_size={self.kernel_size}"]
        parts += [f"{name}={getattr(self, name)}" for name in ("stride", "padding", "dilation")]
        parts += [] if self.bias is not None else ["bias=None"]
        return f"{type(self).__name__}({', '.join(parts)}, activation={self.activation!r})"


def _pair(sizes: tuple[int, ...], of_one_row: int) -> tuple[int, int]:
    """Sizes for rows and columns, where a sequence has one for columns only."""
    rows, columns = (of_one_row, *sizes)[-2:]
    return rows, columns


class Conv2d(Convolution):
    """y = act(conv(x, W) + b) on images (N, channels, height, width), as `torch.nn.Conv2d`; its patches times a matrix.

    Logical shapes are those of that matrix, as for every layer: `in_features` is in_channels·kh·kw, the numbers of a
    patch in the order (channel, row, column), `out_features` is out_channels; an adapter's A is (in_features, rank).

    Parameters
    ----------
    weight : array_like, shape (out_channels, in_channels, kh, kw)
        Taken over without a copy where it is float32 or float64 and C-contiguous; lists, integers and float16
        become float32.
    bias : array_like, shape (out_channels,), optional
        Of the weight's dtype, or cast to it.
    stride, padding, dilation : int or pair of int
        For rows and columns. Padding is with zeros, on both sides.
    groups : int
        1; others are not supported.
    activation : str
        As for `Dense`.

    Attributes
    ----------
    weight, bias : ndarray
        The stored arrays; `bias` is None where there is none.
    in_channels, out_channels : int
    kernel_size, stride, padding, dilation : tuple of int
    trainable : bool
        As for `Dense`.

    Notes
    -----
    x is a batch (N, in_channels, height, width) or one sample without N. Patches are made in pieces, so never more than
    64 MiB of them are held.
    """

    _open_axes = ("height", "width")


class Conv1d(Convolution):
    """y = act(conv(x, W) + b) on sequences (N, channels, length), as `torch.nn.Conv1d`.

    As `Conv2d`, with a weight of shape (out_channels, in_channels, k), with `in_features` = in_channels·k, and with
    stride, padding and dilation an int or a tuple of one.
    """

    _open_axes = ("length",)
