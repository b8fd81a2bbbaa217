"""Layers of convolutional networks beside convolutions: pooling, and batch norm with fixed statistics."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np

from nblora import checks
from nblora.backends import default_backend
from nblora.backends.blocks import Pooling, ReferenceBlocks
from nblora.backends.protocol import Array
from nblora.backends.reference import ReferenceBackend
from nblora.storage.checkpoint import take_tensor

from .activations import ACTIVATIONS, activation_code
from .base import Layer
from .conv import Conv2d
from .diagnostics import describe_own
from .parameters import Parameter
from .run import Run

AXES = ("height", "width")


class _Images(Layer, abstract=True):
    """A layer from images (N, channels, height, width), or one without N, to images of as many channels."""

    def _begin(self, channels: Any, dtype: Any) -> None:
        self.channels = checks.check_integer("channels", channels, 1)
        self.in_features = self.out_features = self.channels
        self.dtype = checks.check_dtype(dtype)

    def _as_input(self, name: str, value: Any) -> Array:
        array = checks.as_images(name, value, self.channels, AXES, self.dtype)
        self._output_shape(name, array.shape)
        return array

    def _as_output(self, name: str, value: Any) -> Array:
        return checks.as_images(name, value, self.channels, AXES, self.dtype)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        checks.check_images(name, shape, self.channels, AXES)
        return shape

    def _axes(self) -> tuple[int | str, ...]:
        return "batch", self.channels, *AXES

    def _example(self, samples: int) -> np.ndarray:
        return np.zeros((1, self.channels, 8, 8), self.dtype)

    def diagnostics(self) -> dict[str, Any]:
        return describe_own(self, self._settings())

    def _settings(self) -> dict[str, Any]:
        """The constructor's settings."""
        return {}

    def _config(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "dtype": self.dtype.name,
            **self._settings(),
            "trainable": self.trainable,
            "training": self.training,
        }

    @classmethod
    def _made(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        """A layer of the settings in `config`."""
        raise NotImplementedError

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        layer = cls._made(config, tensors)
        layer.trainable = checks.check_flag("trainable", config["trainable"])
        return layer.train() if config["training"] else layer.eval()

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        settings = "".join(f", {name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({self.channels}{settings})"


def _batch(x: Array) -> Array:
    """Images with their first axis."""
    return checks.as_contiguous(x if len(x.shape) == 4 else x.reshape(1, *x.shape))


class _KeptPool(NamedTuple):
    places: Array
    window: Pooling
    shape: tuple[int, ...]


class _Pool(_Images, abstract=True):
    """Windows of images brought to one number each."""

    _maximum: ClassVar[bool]

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dtype: Any = "float32",
    ) -> None:
        self._begin(channels, dtype)
        self.kernel_size = checks.check_each("kernel_size", kernel_size, 2, 1)
        self.stride = self.kernel_size if stride is None else checks.check_each("stride", stride, 2, 1)
        self.padding = checks.check_each("padding", padding, 2, 0)
        if any(2 * pad > size for pad, size in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(
                f"padding must be at most half of kernel_size, got {self.padding} and {self.kernel_size}: a window may "
                "not lie outside the image"
            )
        self._open(default_backend())

    def _window(self) -> Pooling:
        pairs = (cast(tuple[int, int], pair) for pair in (self.kernel_size, self.stride, self.padding))
        return Pooling(self._maximum, *pairs)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        checks.check_images(name, shape, self.channels, AXES)
        reach = self._window().reach(*shape[-2:])
        if min(reach) < 1:
            raise ValueError(
                f"{name} of shape {shape} is too small for {self!r}: its output would be empty; give larger images or "
                "more padding"
            )
        return *shape[:-2], *reach

    def _example(self, samples: int) -> np.ndarray:
        sizes = (size + step for size, step in zip(self.kernel_size, self.stride, strict=True))
        return np.zeros((1, self.channels, *sizes), self.dtype)

    def _forward(self, x: Array, run: Run) -> Array:
        shape, window = self._output_shape("x", x.shape), self._window()
        y, places = cast(ReferenceBlocks, run.backend).pool(_batch(x), window)
        if run.training:
            run.keep(self, _KeptPool(places, window, x.shape) if run.live else None)
        run.passed(self, y)
        return y.reshape(shape)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept: _KeptPool | None = run.recall(self)
        if kept is None:
            return None
        backend = cast(ReferenceBlocks, run.backend)
        gx = backend.pool_gradient(_batch(grad), kept.places, kept.window, *kept.shape[-2:])
        return gx.reshape(kept.shape)

    def _settings(self) -> dict[str, Any]:
        names = "kernel_size", "stride", "padding"
        return {name: list(getattr(self, name)) for name in names}

    @classmethod
    def _made(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        settings = {name: tuple(config[name]) for name in ("kernel_size", "stride", "padding")}
        return cls(config["channels"], dtype=config["dtype"], **settings)


class MaxPool2d(_Pool):
    """The largest number of every window, as `torch.nn.MaxPool2d`.

    Parameters
    ----------
    channels : int
        Of the images, which no other argument says.
    kernel_size, stride, padding : int or pair of int
        By default windows lie side by side.
    dtype : {"float32", "float64"}
        Of its neighbours.
    """

    _maximum = True


class AvgPool2d(_Pool):
    """The mean of every window, padding counted as zeros, as `torch.nn.AvgPool2d`.

    Parameters
    ----------
    channels, kernel_size, stride, padding, dtype
        As for `MaxPool2d`.
    """

    _maximum = False


class GlobalAvgPool2d(_Images):
    """The mean of every channel: images (N, channels, height, width) to rows (N, channels).

    Parameters
    ----------
    channels : int
    dtype : {"float32", "float64"}
        Of its neighbours.
    """

    def __init__(self, channels: int, *, dtype: Any = "float32") -> None:
        self._begin(channels, dtype)
        self._open(default_backend())

    def _as_output(self, name: str, value: Any) -> Array:
        return checks.as_samples(name, value, self.channels, self.dtype)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        checks.check_images(name, shape, self.channels, AXES)
        if not shape[-1] * shape[-2]:
            raise ValueError(f"{name} of shape {shape} has no places for {self!r} to take the mean of")
        return shape[:-2]

    def _forward(self, x: Array, run: Run) -> Array:
        shape = self._output_shape("x", x.shape)
        y = cast(ReferenceBlocks, run.backend).means(_batch(x))
        if run.training:
            run.keep(self, x.shape if run.live else None)
        run.passed(self, y)
        return y.reshape(shape)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        shape: tuple[int, ...] | None = run.recall(self)
        if shape is None:
            return None
        rows = checks.as_contiguous(grad.reshape(-1, self.channels))
        return cast(ReferenceBlocks, run.backend).means_gradient(rows, *shape[-2:]).reshape(shape)

    @classmethod
    def _made(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        return cls(config["channels"], dtype=config["dtype"])


FOLDED = "folded"
"""What a norm keeps that its convolution computed: its gradient goes by it as it is."""


class _KeptNorm(NamedTuple):
    x: Array
    scale: Array
    shift: Array
    live: bool
    trained: bool


class BatchNorm2d(_Images):
    """y = act((x - mean) / √(variance + eps)·weight + bias) of each channel, with fixed mean and variance.

    As `torch.nn.BatchNorm2d` in evaluation mode, in training too: statistics are kept as they are. Scale and shift are
    made of the stored parameters in every forward, and applied with the activation in one pass.

    Parameters
    ----------
    weight, bias, mean, variance : array_like, shape (channels,)
        `mean` and `variance` are never trained. All of the weight's dtype, or cast to it.
    eps : float
    activation : str
        As for `Dense`.
    """

    def __init__(
        self, weight: Any, bias: Any, mean: Any, variance: Any, *, eps: float = 1e-5, activation: str = "identity"
    ) -> None:
        stored = checks.as_parameter("weight", weight, (None,))
        self._begin(len(stored), stored.dtype)
        self._weight = Parameter(stored)
        given = {"bias": bias, "mean": mean, "variance": variance}
        rest = [checks.as_parameter(name, value, stored.shape, self.dtype) for name, value in given.items()]
        self._bias, self._mean, self._variance = (Parameter(a, state=place > 0) for place, a in enumerate(rest))
        self.eps, self._activation = checks.check_not_negative("eps", eps), activation_code(activation)
        self._open(default_backend())

    @property
    def weight(self) -> Array:
        """The factor of each channel."""
        return self._weight.array

    @property
    def bias(self) -> Array:
        """What is added to each channel."""
        return self._bias.array

    @property
    def activation(self) -> str:
        """The name of the activation function."""
        return ACTIVATIONS[self._activation]

    def _own_parameters(self) -> dict[str, Parameter]:
        fixed = {"running_mean": self._mean, "running_var": self._variance}
        return {"weight": self._weight, "bias": self._bias, **fixed}

    def _scale_and_shift(self, backend: Any) -> tuple[Array, Array]:
        arrays = (parameter.array for parameter in (self._weight, self._bias, self._mean, self._variance))
        made: tuple[Array, Array] = backend.channel_scale(*arrays, self.eps)
        return made

    def _forward(self, x: Array, run: Run) -> Array:
        self._output_shape("x", x.shape)
        scale, shift = self._scale_and_shift(run.backend)
        images = _batch(x)
        y = cast(ReferenceBlocks, run.backend).channels(images, scale, shift, self._activation)
        if run.training:
            live, trained = run.live, self.trainable and not run.frozen
            run.keep(self, _KeptNorm(images, scale, shift, live, trained) if live or trained else None)
            run.live = live or trained
        run.passed(self, y)
        return y.reshape(x.shape)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        kept: _KeptNorm | str | None = run.recall(self)
        if kept is None or isinstance(kept, str):
            return None if kept is None else grad
        backend = cast(ReferenceBlocks, run.backend)
        gx, along, plain = backend.channels_gradient(_batch(grad), kept.x, kept.scale, kept.shift, self._activation)
        if kept.trained:
            fixed = self._mean.array, self._variance.array
            run.sink.put(self._weight, backend.channel_scale_gradient(along, plain, *fixed, self.eps), run)
            run.sink.put(self._bias, plain, run)
        return gx.reshape(grad.shape) if kept.live else None

    def _settings(self) -> dict[str, Any]:
        return {"eps": self.eps, "activation": self.activation}

    @classmethod
    def _made(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        dtype, names = checks.check_dtype(config["dtype"]), ("weight", "bias", "running_mean", "running_var")
        arrays = [take_tensor(tensors, name, dtype, (config["channels"],)) for name in names]
        return cls(*arrays, eps=config["eps"], activation=config["activation"])


def convolve_and_norm(convolution: Layer, norm: BatchNorm2d, x: Array, run: Run) -> Array:
    """act(norm(convolution(x))): in the convolution's own step, unless the norm is trained, or is not right behind it.

    What either keeps is kept for `convolution_and_norm_gradient`.
    """
    if not _folds(convolution, norm, run):
        return norm._forward(convolution._forward(x, run), run)
    run.epilogue = (*norm._scale_and_shift(run.backend), norm._activation)
    try:
        y = convolution._forward(x, run)
    finally:
        run.epilogue = None
    if run.training:
        run.keep(norm, FOLDED)
    run.passed(norm, y)
    return y


def convolution_and_norm_gradient(convolution: Layer, norm: BatchNorm2d, grad: Array, run: Run) -> Array | None:
    """The way back of `convolve_and_norm`."""
    through = norm._backward(grad, run)
    return None if through is None else convolution._backward(through, run)


def _folds(convolution: Layer, norm: BatchNorm2d, run: Run) -> bool:
    """Whether the norm is computed with its convolution: on the CPU, of a convolution or an adapter on one that have no
    activation and no scaling of their own, and where no gradient of the norm's own parameters is wanted."""
    base = getattr(convolution, "base_layer", convolution)
    trained = run.training and norm.trainable and not run.frozen
    plain = isinstance(base, Conv2d) and base.activation == "identity"
    plain = plain and convolution._joins_norm  # type: ignore[attr-defined]  # a projection
    return plain and not trained and isinstance(run.backend, ReferenceBackend)
