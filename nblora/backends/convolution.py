"""The step of a convolution: the linear step on patches, piece by piece.

Patches are made anew for the backward, not kept: they take kh·kw times the image's memory. Gradients of several pieces
are added up in their order; a piece's update would change the weights that the next one reads, so with more than one
the dense parameters are updated at the end.
"""

from typing import NamedTuple

import numpy as np

from nblora.kernels.patches.window import Slide, Window, pointwise

from .protocol import Array, Backend, Gradients, Operands, Saved, keeps_input

PIECE = 1 << 22
"""Bytes of patches held at a time: 4 MiB, so that what one kernel writes the next still finds in a cache."""


class Kept(NamedTuple):
    """What backward needs of a forward: the images, None where nothing reads them; the dropout's mask on them; the
    window; and what the backend saved of each piece, less its patches."""

    images: Array | None
    mask: Array | None
    window: Window
    pieces: list[Saved]

    @property
    def x(self) -> Array | None:
        """The input."""
        return self.images


class Convolution:
    """The linear step on patches: x (N, channels, height, width), y (N, out, H', W').

    `piece` bytes of patches are held at a time, `PIECE` where it is None.
    """

    def __init__(self, backend: Backend, slide: Slide, piece: int | None = None) -> None:
        self._backend, self._slide, self.piece = backend, slide, piece

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Kept | None]:
        """Compute y, and keep what backward needs where `keep`."""
        backend, window = self._backend, self._slide.on(*x.shape[1:])
        outputs = _outputs(operands)
        y = backend.empty((len(x), outputs, window.out_height, window.out_width), x.dtype)
        lines, pieces = pointwise(outputs, window.places), []
        for start, stop in self._pieces(len(x), window, x.dtype):
            rows = backend.unfold(x, window, start, stop)
            masks = None if mask is None else backend.unfold(mask, window, start, stop)
            out, saved = backend.forward(rows, operands, masks, keep)
            backend.fold(out, lines, start, _as_lines(y), False)
            if saved is not None:
                pieces.append(saved._replace(x=None, mask=None))
        if not keep:
            return y, None
        return y, Kept(x if keeps_input(operands) else None, mask, window, pieces)

    def backward(self, grad_output: Array, saved: Kept, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient, from the values as they are."""
        if not (input_gradient or keeps_input(operands)):
            return Gradients(None, None, None, None, None, None)
        return self._sweep(grad_output, saved, operands, None, input_gradient)

    def backward_update(
        self,
        grad_output: Array,
        saved: Kept,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward, and the update of velocity, delta and a trained weight, in place."""
        if len(saved.pieces) == 1:
            return self._sweep(grad_output, saved, operands, (lr, delta_lr), input_gradient)
        found = self._sweep(grad_output, saved, operands, None, input_gradient)
        base, delta = operands.base, operands.delta
        if delta is not None:
            self._backend.momentum_update(delta.delta, delta.velocity, found.delta, delta.momentum, delta_lr)
        if base is not None and operands.train_base:
            self._backend.sgd_update(base.weight, found.weight, lr)
        return found._replace(delta=None, weight=None)

    def _sweep(
        self,
        grad_output: Array,
        saved: Kept,
        operands: Operands,
        rates: tuple[float, float] | None,
        input_gradient: bool,
    ) -> Gradients:
        backend, window = self._backend, saved.window
        samples, outputs = grad_output.shape[:2]
        gx, whole = None, _meets_all_once(window)
        if input_gradient:
            make = backend.empty if whole else backend.zeros
            gx = make((samples, window.channels, window.height, window.width), grad_output.dtype)
        lines, gy = pointwise(outputs, window.places), _as_lines(grad_output)
        total: Gradients | None = None
        for (start, stop), piece in zip(self._pieces(samples, window, grad_output.dtype), saved.pieces, strict=True):
            rows, masks = (
                None if images is None else backend.unfold(images, window, start, stop)
                for images in (saved.images, saved.mask)
            )
            grad = backend.unfold(gy, lines, start, stop)
            kept = piece._replace(x=rows, mask=masks)
            if rates is None:
                found = backend.backward(grad, kept, operands, input_gradient)
            else:
                found = backend.backward_update(grad, kept, operands, *rates, input_gradient)
            if gx is not None:
                backend.fold(found.x, window, start, gx, not whole)
            total = found if total is None else self._sum(total, found)
        assert total is not None  # there is always a piece
        return total._replace(x=gx)

    def _pieces(self, samples: int, window: Window, dtype: np.dtype) -> list[tuple[int, int]]:
        return _pieces(samples, window, dtype, PIECE if self.piece is None else self.piece)

    def _sum(self, total: Gradients, found: Gradients) -> Gradients:
        """Add the gradients of the parameters to `total`, in place."""
        for part, more in zip(total[1:], found[1:], strict=True):
            if part is not None:
                self._backend.add(part, more)
        return total


def _outputs(operands: Operands) -> int:
    if operands.low_rank is not None:
        return int(operands.low_rank.B.shape[1])
    weight = operands.base.weight  # type: ignore[union-attr]  # one of the two is there
    return int(weight.shape[0])


def _as_lines(images: Array) -> Array:
    """Images with all places of a channel in one line."""
    samples, channels, height, width = images.shape
    return images.reshape(samples, channels, 1, height * width)


def _meets_all_once(window: Window) -> bool:
    """Whether every number of an image is in one patch, as it is for a kernel of one element."""
    steps = (window.sh, window.sw, window.dh, window.dw, window.ph, window.pw)
    reached = window.out_height * window.kh, window.out_width * window.kw
    return steps == (window.kh, window.kw, 1, 1, 0, 0) and reached == (window.height, window.width)


def _pieces(samples: int, window: Window, dtype: np.dtype, piece: int) -> list[tuple[int, int]]:
    """Ranges of patches, of much the same size and at least one: whole samples or lines where they fit."""
    total = samples * window.places
    largest = max(1, piece // (window.features * dtype.itemsize))
    for unit in (window.places, window.out_width):
        if unit <= largest:
            largest = largest // unit * unit
            break
    return [(start, min(start + largest, total)) for start in range(0, total, largest)] or [(0, 0)]
