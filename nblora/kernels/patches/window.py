"""`Window`: which numbers of an image a patch holds; `Slide`, the same of images of any size."""

from typing import NamedTuple


class Window(NamedTuple):
    """A convolution's kernel on images of one size (height, width), counted in elements.

    Patch (n, h, w) holds x[n, c, h·sh - ph + i·dh, w·sw - pw + j·dw] in the order (c, i, j), zero outside the image.
    """

    channels: int
    height: int
    width: int
    kh: int
    kw: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int
    out_height: int
    out_width: int

    @property
    def features(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.kh * self.kw

    @property
    def places(self) -> int:
        """Patches of an image."""
        return self.out_height * self.out_width


class Slide(NamedTuple):
    """How a convolution's kernel lies on images, of any size: each a pair of integers, for rows and columns."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Places of the kernel on an image; not positive where it does not fit once."""
        rows, columns = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip((height, width), *self, strict=True)
        )
        return rows, columns

    def on(self, channels: int, height: int, width: int) -> Window:
        """The window on images of one size."""
        sizes = (size for pair in self for size in pair)
        return Window(channels, height, width, *sizes, *self.reach(height, width))


def pointwise(channels: int, places: int) -> Window:
    """The window of a kernel of one element: its patches are the image with its channels last."""
    return Window(channels, 1, places, 1, 1, 1, 1, 0, 0, 1, 1, 1, places)
