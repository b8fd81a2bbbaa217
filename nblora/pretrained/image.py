"""`ImageModel`: models that read images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nblora import checks
from nblora.backends.protocol import Array

from .model import PretrainedModel

AXES = ("height", "width")


class ImageModel(PretrainedModel):
    """A model of images: (batch, channels, height, width) to logits (batch, labels).

    Made by `nblora.load_pretrained`. `model(pixel_values)` computes.
    """

    def forward(self, pixel_values: Any) -> np.ndarray:
        """Compute the logits of some images.

        Parameters
        ----------
        pixel_values : array_like of real numbers, shape (batch, channels, height, width)
            As the model's image processor makes them.

        Returns
        -------
        ndarray of the model's dtype, shape (batch, labels)

        Raises
        ------
        ValueError
            For images of another number of channels or, where the model has positions, of another size.
        """
        return super().forward(pixel_values)

    def __call__(self, pixel_values: Any) -> np.ndarray:
        """The same as `forward`."""
        return self.forward(pixel_values)

    def _as_input(self, name: str, value: Any) -> Array:
        array = checks.as_real("pixel_values" if name == "x" else name, value)
        self._output_shape("pixel_values" if name == "x" else name, array.shape)
        return checks.as_images(name, array, self.body.image[0], AXES, self.dtype)

    def _as_output(self, name: str, value: Any) -> Array:
        return checks.as_samples(name, value, self.out_features, self.dtype)

    def _output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, *sizes = self.body.image
        wanted = ", ".join(str(size or axis) for size, axis in zip(sizes, AXES, strict=True))
        fits = len(shape) == 4 and shape[1] == channels
        if not fits or any(size not in (None, got) for size, got in zip(sizes, shape[2:], strict=True)):
            raise ValueError(f"{name} must have shape (batch, {channels}, {wanted}), got {shape}")
        if not shape[0]:
            raise ValueError(f"{name} must hold at least one image, got shape {shape}")
        return shape[0], self.out_features

    def _axes(self) -> tuple[int | str, ...]:
        channels, *sizes = self.body.image
        return "batch", channels, *(size or axis for size, axis in zip(sizes, AXES, strict=True))

    def _example(self, samples: int) -> np.ndarray:
        channels, *sizes = self.body.image
        return np.zeros((1, channels, *(size or 64 for size in sizes)), self.dtype)

    def _probe(self) -> Any:
        channels, *sizes = self.body.image
        return np.random.default_rng(0).standard_normal((1, channels, *(size or 64 for size in sizes)))

    def _as_samples(self, name: str, x: Any) -> np.ndarray:
        if isinstance(x, Mapping):
            if list(x) != ["pixel_values"]:
                raise ValueError(f"{name} must be a dict of pixel_values, got the keys {', '.join(map(str, x))}")
            x = x["pixel_values"]
        return super()._as_samples(name, x)
