"""ResNet (He et al., 2016): convolutions with residuals, in stages; batch norm with the statistics of the file."""

from collections.abc import Mapping

from nblora.backends.protocol import Array
from nblora.layers import Layer
from nblora.layers.functions import Activation, join, rejoin
from nblora.layers.images import GlobalAvgPool2d, MaxPool2d, convolution_and_norm_gradient, convolve_and_norm
from nblora.layers.run import Run

from ..blocks import Block, Stack
from ..config import Config
from ..source import Source
from .family import Family


class Convolved(Block, abstract=True):
    """act(norm(convolution(x))), padded so that stride 1 keeps the size."""

    def __init__(
        self, source: Source, name: str, sizes: tuple[int, int], kernel: int = 3, stride: int = 1, act: str = "identity"
    ) -> None:
        self.convolution = source.convolution(
            f"{name}.convolution", *sizes, (kernel, kernel), stride=(stride, stride), padding=kernel // 2
        )
        self.normalization = source.batch_norm(f"{name}.normalization", sizes[1], 1e-5, act)
        self._begin()

    def _forward(self, x: Array, run: Run) -> Array:
        return convolve_and_norm(self.convolution, self.normalization, x, run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        return convolution_and_norm_gradient(self.convolution, self.normalization, grad, run)


class ResidualLayer(Block, abstract=True):
    """act(layers(x) + shortcut(x)); the shortcut is x itself where sizes stay."""

    NAMES = {"inner": "layer"}
    shortcut: Layer | None = None

    def __init__(
        self, config: Config, source: Source, name: str, sizes: tuple[int, int], stride: int, activation: str
    ) -> None:
        inputs, outputs = sizes

        def inner(place: int, sizes: tuple[int, int], kernel: int, stride: int, act: str) -> Convolved:
            return Convolved(source, f"{name}.layer.{place}", sizes, kernel, stride, act)

        if config.raw.get("layer_type", "bottleneck") == "basic":
            parts = [inner(0, sizes, 3, stride, activation), inner(1, (outputs, outputs), 3, 1, "identity")]
        else:
            config.expect("layer_type", "bottleneck")
            narrow = outputs // 4
            if not narrow:
                raise config.fault(f"hidden_sizes holds {outputs}; a bottleneck has a quarter of it inside")
            early = config.flag("downsample_in_bottleneck", False)
            strides = (stride, 1) if early else (1, stride)
            parts = [
                inner(0, (inputs, narrow), 1, strides[0], activation),
                inner(1, (narrow, narrow), 3, strides[1], activation),
                inner(2, (narrow, outputs), 1, 1, "identity"),
            ]
        if inputs != outputs or stride != 1:
            self.shortcut = Convolved(source, f"{name}.shortcut", sizes, 1, stride)
        self.inner = Stack(parts)
        self._activation = Activation(activation)
        self._begin()

    def _forward(self, x: Array, run: Run) -> Array:
        live = run.live
        y = self.inner._forward(x, run)
        if self.shortcut is not None:
            wanted, run.live = run.live, live
            x = self.shortcut._forward(x, run)
            run.live = run.live or wanted
        return self._activation._forward(join(y, x, run), run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        grad = self._activation._backward(grad, run)
        around = grad if self.shortcut is None else self.shortcut._backward(grad, run)
        return rejoin(self.inner._backward(grad, run), around, run)


class Stage(Block, abstract=True):
    """Layers of one width."""

    def __init__(self, layers: list[ResidualLayer]) -> None:
        self.layers = Stack(layers)
        self._begin()

    def _forward(self, x: Array, run: Run) -> Array:
        return self.layers._forward(x, run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        return self.layers._backward(grad, run)


class Encoder(Block, abstract=True):
    """Stem and stages."""

    NAMES = {"stem": "embedder.embedder", "pool": "embedder.pooler", "stages": "encoder.stages"}

    def __init__(self, config: Config, source: Source, name: str) -> None:
        activation = config.activation("hidden_act", "relu")
        channels, width = config.integer("num_channels", 3), config.integer("embedding_size", 64)
        self.stem = Convolved(source, f"{name}.embedder.embedder", (channels, width), 7, 2, activation)
        self.pool = MaxPool2d(width, 3, stride=2, padding=1, dtype=source.dtype)
        widths, depths = config.sizes("hidden_sizes"), config.sizes("depths")
        if len(widths) != len(depths):
            raise config.fault(f"hidden_sizes and depths have {len(widths)} and {len(depths)} entries, not as many")
        stages = []
        for place, (out, depth) in enumerate(zip(widths, depths, strict=True)):
            stride = 2 if place or config.flag("downsample_in_first_stage", False) else 1
            layers = []
            for i in range(depth):
                at = f"{name}.encoder.stages.{place}.layers.{i}"
                layers.append(ResidualLayer(config, source, at, (width, out), 1 if i else stride, activation))
                width = out
            stages.append(Stage(layers))
        self.stages = Stack(stages)
        self._begin()
        self.image = channels, None, None

    def _forward(self, images: Array, run: Run) -> Array:
        return self.stages._forward(self.pool._forward(self.stem._forward(images, run), run), run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        return self.stem._backward(self.pool._backward(self.stages._backward(grad, run), run), run)


def classifier(config: Config, source: Source, labels: int) -> Mapping[str, Layer]:
    """The head, on the means of the last channels."""
    width = config.sizes("hidden_sizes")[-1]
    pool = GlobalAvgPool2d(width, dtype=source.dtype)
    return {"resnet.pooler": pool, "classifier.1": source.linear("classifier.1", width, labels)}


FAMILY = Family(
    called="ResNet",
    prefix="resnet",
    body=Encoder,
    tasks=("image-classification",),
    classifier=classifier,
    head=("classifier.1",),
    place=None,
)
