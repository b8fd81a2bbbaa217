"""The data of the demo: scikit-learn's handwritten digits, upright to pretrain on, turned and noisy to adapt to."""

from typing import NamedTuple

import numpy as np

from nblora.errors import MissingExtraError

CLASSES = 10
PIXELS = 64
NOISE = 0.2  # standard deviation, where ink is 1 and paper 0
PARTS = {"pretraining": 700, "adaptation": 250, "validation": 350}  # images; the other 497 are the test split


class Split(NamedTuple):
    """Images and their labels."""

    x: np.ndarray  # (N, PIXELS), or (N, 1, 8, 8) for convolutions; float32
    y: np.ndarray  # (N,) int64

    def first(self, count: int) -> "Split":
        """The first `count` images."""
        return Split(self.x[:count], self.y[:count])


class Digits(NamedTuple):
    """No image is in two of the parts. `upright_test` has the images of `test` before the shift."""

    pretraining: Split
    adaptation: Split
    validation: Split
    test: Split
    upright_test: Split

    def first(self, learnt: int, judged: int) -> "Digits":
        """The first `learnt` images of each part that is trained on, and the first `judged` of the others."""
        trained_on = ("pretraining", "adaptation")
        return Digits(**{k: split.first(learnt if k in trained_on else judged) for k, split in self._asdict().items()})

    def as_images(self) -> "Digits":
        """The same with every x as images of one channel, (N, 1, 8, 8)."""
        side = int(PIXELS**0.5)
        return Digits(*(Split(split.x.reshape(-1, 1, side, side), split.y) for split in self))


def load_digits(seed: int) -> Digits:
    """Load the digits that come with scikit-learn (1797 images of 8 x 8 pixels), split and shift them.

    Parameters
    ----------
    seed : int
        Of the split and of the noise.

    Raises
    ------
    MissingExtraError
        Where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError(
            "the demo's images come with scikit-learn, which is not installed: pip install 'nblora[demo]'"
        ) from error
    images, labels = load(return_X_y=True)
    pixels = (images / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pixels))
    shifted = shift_domain(pixels, rng)
    parts = dict(zip([*PARTS, "test"], np.split(order, np.cumsum(list(PARTS.values()))), strict=True))
    labels = labels.astype(np.int64)
    splits = {
        name: Split((pixels if name == "pretraining" else shifted)[chosen], labels[chosen])
        for name, chosen in parts.items()
    }
    return Digits(**splits, upright_test=Split(pixels[parts["test"]], labels[parts["test"]]))


def shift_domain(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn square images, given as rows, by 90 degrees, and add normal noise to every pixel."""
    side = int(np.sqrt(pixels.shape[1]))
    turned = np.rot90(pixels.reshape(-1, side, side), axes=(1, 2)).reshape(pixels.shape)
    return turned + rng.normal(0, NOISE, pixels.shape).astype(pixels.dtype)
