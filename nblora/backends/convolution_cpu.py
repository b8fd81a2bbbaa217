"""The step of a convolution on the CPU: convolutions of images as they are, with one weight folded for the call.

    F = W + s A B + c D             y = act(F * x + b)
    gx = the convolution of gz with F turned round
    G = Σ x gz over all places:     dW = G, dD = c G, dA = s G Bᵀ, dB = s Aᵀ G

Where nothing dense is trained G is not made: u = x A comes with the forward, as further rows of the output, and then
t = gz Bᵀ, dA = s xᵀ t, dB = s uᵀ gz. With a dropout's mask on x the low-rank term is a convolution of its own.
"""

from typing import Any, NamedTuple

import numpy as np

from nblora.kernels.common.machine import DEPTH, VECTOR_BITS
from nblora.kernels.patches import correlate as correlate_kernel
from nblora.kernels.patches import gradient as gradient_kernel
from nblora.kernels.patches.correlate import Weights
from nblora.kernels.patches.lattice import Lattice, backward_lattices, forward_lattice, places_lattice
from nblora.kernels.patches.tile import shifted_tile_function
from nblora.kernels.patches.window import Slide, Window, pointwise

from .host import plain as _plain
from .host import workers_for as _workers
from .protocol import Array, Base, Delta, Gradients, LowRank, Operands, Saved, keeps_input

PACKED = 1 << 24
"""Bytes of the output's gradient that are packed at a time."""


class Kept(NamedTuple):
    """What backward needs of a forward: the images, None where nothing reads them; u = (mask∘x) A, None where nothing
    reads it; the pre-activation; the dropout's mask; and the window."""

    images: Array | None
    low: Array | None
    z: Array | None
    mask: Array | None
    window: Window

    @property
    def x(self) -> Array | None:
        """The input."""
        return self.images


class CPUConvolution:
    """x (N, channels, height, width), y (N, out, H', W')."""

    def __init__(self, backend: Any, slide: Slide) -> None:
        self._backend, self._slide = backend, slide

    # --- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Kept | None]:
        """Compute y, and keep what backward needs where `keep`."""
        window, code, low_rank = self._slide.on(*x.shape[1:]), operands.activation, operands.low_rank
        base = _base(operands)
        y = np.empty((len(x), len(base.weight), window.out_height, window.out_width), x.dtype)
        z = np.empty_like(y) if keep and code else y
        lattice, low = forward_lattice(window), None
        if low_rank is not None and mask is not None:
            low = self._masked_forward(x, mask, operands, window, (z, y))
        else:
            factor = None
            if low_rank is not None and keep and not _dense(operands):
                low = np.empty((len(x), low_rank.A.shape[1], *y.shape[2:]), x.dtype)
                factor = _columns(low_rank.A, lattice)
            weight = _forward_rows(self._weight(operands), window)
            self._correlate(x, lattice, weight, factor, base.bias, code, (z, y, low), False)
        if not keep:
            return y, None
        return y, Kept(x if keeps_input(operands) else None, low, z if code else None, mask, window)

    def _masked_forward(
        self, x: Array, mask: Array, operands: Operands, window: Window, outputs: tuple[Array, Array]
    ) -> Array:
        """z and y, of the dense part and then the low-rank one; return u."""
        low_rank, base, lattice = _low_rank(operands), _base(operands), forward_lattice(window)
        z, y = outputs
        low = np.empty((len(x), low_rank.A.shape[1], *y.shape[2:]), x.dtype)
        factor = _columns(low_rank.A, lattice)
        self._correlate(self._backend._masked(x, mask), lattice, factor, None, None, 0, (low, low, None), False)
        weight = _forward_rows(self._weight(operands._replace(low_rank=None)), window)
        self._correlate(x, lattice, weight, None, None, 0, (z, z, None), False)
        B = _plain(low_rank.B) * low_rank.B.dtype.type(low_rank.scaling)
        rows = Weights(B.reshape(-1), B.shape[1], 1, B.shape[1], 0)
        lines = (_lines(z), _lines(y), None)
        every = forward_lattice(pointwise(len(B), window.places))
        self._correlate(_lines(low), every, rows, None, base.bias, operands.activation, lines, True)
        return low

    # --- backward ----------------------------------------------------------------------------------------------

    def backward(self, grad_output: Array, saved: Kept, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient, from the values as they are."""
        if not (input_gradient or keeps_input(operands)):
            return Gradients(None, None, None, None, None, None)
        gz, window = _plain(grad_output), saved.window
        if saved.z is not None:
            gz = self._backend.pointwise_gradient(gz, saved.z, operands.activation)
        low_rank, factors, dense = operands.low_rank, (None, None), (None, None)
        t = None
        if low_rank is not None and saved.low is not None:
            t = self._through_B(gz, low_rank, window)
        if _dense(operands):
            gradient = self._whole_gradient(saved.images, gz, window)
            if low_rank is not None and t is None:
                factors = self._chain(gradient, low_rank)
            dense = _dense_gradients(self._backend, gradient, operands)
        if t is not None:
            factors = self._low_rank_gradients(gz, t, saved, _low_rank(operands))
        bias = gz.sum(axis=(0, 2, 3)) if operands.train_base and _base(operands).bias is not None else None
        gx = self._input_gradient(gz, t, saved, operands) if input_gradient else None
        return Gradients(gx, *factors, *dense, bias)

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
        found = self.backward(grad_output, saved, operands, input_gradient)
        delta = operands.delta
        if delta is not None and found.delta is not None:
            self._backend.momentum_update(delta.delta, delta.velocity, found.delta, delta.momentum, delta_lr)
        if found.weight is not None:
            self._backend.sgd_update(_base(operands).weight, found.weight, lr)
        return found._replace(delta=None, weight=None)

    def _through_B(self, gz: Array, low_rank: LowRank, window: Window) -> Array:
        """t = gz Bᵀ at every place, (N, rank, H', W')."""
        B = _plain(low_rank.B)
        t = np.empty((len(gz), len(B), *gz.shape[2:]), gz.dtype)
        rows, lattice = Weights(B.reshape(-1), len(B), B.shape[1], 1, 0), pointwise(gz.shape[1], window.places)
        self._correlate(_lines(gz), forward_lattice(lattice), rows, None, None, 0, (_lines(t), _lines(t), None), False)
        return t

    def _low_rank_gradients(self, gz: Array, t: Array, saved: Kept, low_rank: LowRank) -> tuple[Array, Array]:
        """dA = s (mask∘x)ᵀ t and dB = s uᵀ gz."""
        x, window, s = saved.images, saved.window, low_rank.scaling
        if saved.mask is not None:
            x = self._backend._masked(x, saved.mask)
        every = pointwise(gz.shape[1], window.places)
        return self._gradient(x, t, window, s), self._gradient(_lines(gz), _lines(saved.low), every, s, transposed=True)

    def _whole_gradient(self, x: Array, gz: Array, window: Window) -> Array:
        """G stored, (out, in). Of pointwise kernels that side is packed which has fewer channels."""
        plain = window.kh == window.kw == window.sh == window.sw == 1 and not (window.ph or window.pw)
        if plain and window.channels < gz.shape[1]:
            return self._gradient(_lines(gz), _lines(_plain(x)), pointwise(gz.shape[1], window.places), 1.0)
        return self._gradient(x, gz, window, 1.0, transposed=True)

    def _chain(self, gradient: Array, low_rank: LowRank) -> tuple[Array, Array]:
        """dA = s G Bᵀ and dB = s Aᵀ G of G stored, (out, in)."""
        backend, dtype = self._backend, gradient.dtype
        A, s = Base(low_rank.A, None, False), dtype.type(low_rank.scaling)
        dB, _ = backend.forward(gradient, Operands(A, None, None, 0, False), None, False)
        turned = np.ascontiguousarray(low_rank.B.T)
        kept, operands = Saved(gradient, None, None, None), Operands(A, None, None, 0, True)
        dA = backend.backward(turned, kept, operands, False).weight
        return dA * s, np.ascontiguousarray(dB.T) * s

    def _input_gradient(self, gz: Array, t: Array | None, saved: Kept, operands: Operands) -> Array:
        window, mask, low_rank = saved.window, saved.mask, operands.low_rank
        if mask is None or low_rank is None:
            return self._turned(gz, _turned_rows(self._weight(operands), window), window)
        gx = self._turned(gz, _turned_rows(self._weight(operands._replace(low_rank=None)), window), window)
        A, taps = _plain(low_rank.A) * gx.dtype.type(low_rank.scaling), window.kh * window.kw
        rows = Weights(A.reshape(-1), window.channels, taps * A.shape[1], 1, A.shape[1])
        self._backend.add(gx, self._backend._masked(self._turned(t, rows, window), mask))
        return gx

    def _turned(self, gz: Array, rows: Weights, window: Window) -> Array:
        """The gradient of the images: the convolution with the kernel turned round."""
        lattices = backward_lattices(window)
        whole = len(lattices) == min(window.sh, window.height) * min(window.sw, window.width)
        shape = len(gz), window.channels, window.height, window.width
        gx = np.empty(shape, gz.dtype) if whole else np.zeros(shape, gz.dtype)
        for lattice in lattices:
            self._correlate(gz, lattice, rows, None, None, 0, (gx, gx, None), False)
        return gx

    # --- the kernels -------------------------------------------------------------------------------------------

    def _weight(self, operands: Operands) -> Array:
        """F, stored: W itself where there is nothing to fold."""
        if operands.low_rank is None and operands.delta is None:
            return _plain(_base(operands).weight)
        return self._backend.merge(operands)

    def _correlate(
        self,
        images: Array,
        lattice: Lattice,
        weights: Weights,
        low_weights: Weights | None,
        bias: Array | None,
        code: int,
        outputs: tuple[Array, Array, Array | None],
        add: bool,
    ) -> None:
        """z = the convolution of the images, y = act(z + b), and low that with the second weight; in place."""
        count, channels = images.shape[:2]
        if not count:
            return
        backend, dtype = self._backend, images.dtype
        z, y, low = outputs
        vector, taps = VECTOR_BITS // (8 * dtype.itemsize), len(lattice.taps)
        rows = weights.rows + (low_weights.rows if low_weights is not None else 0)
        workers = _workers(count * lattice.places * rows * channels * taps)
        plan = correlate_kernel.plan_of(lattice, rows, count, workers, vector)
        block = correlate_kernel.channels_of_block(channels, taps)
        size = correlate_kernel.correlate_scratch(lattice, plan, rows, block, vector)
        lent, packed = backend._scratch.take(dtype, workers, correlate_kernel.packed_weights(rows, channels * taps))
        task = correlate_kernel.CorrelateTask(
            _plain(images),
            lattice,
            weights,
            low_weights or weights._replace(rows=0),
            _plain(bias) if bias is not None else backend._stand_ins[dtype][1],
            z,
            y,
            y[:0] if low is None else low,
            packed,
            _at_least(lent, size),
            np.empty((workers, block * taps), np.int64),
            self._tile(dtype),
            np.zeros(2 + 2 * workers, np.int64),
            code,
            bias is not None,
            add,
        )
        backend._crew.run(correlate_kernel.correlate, task, workers)
        backend._scratch.give(lent, packed)

    def _tile(self, dtype: np.dtype) -> int:
        addresses = self._backend._shifted_tiles
        if dtype not in addresses:
            addresses[dtype] = shifted_tile_function(self._backend._stand_ins[dtype][1])
        return int(addresses[dtype])

    def _gradient(self, images: Array, g: Array, window: Window, s: float, transposed: bool = False) -> Array:
        """s Σ x g over all places, (in, out); stored (out, in) where `transposed`."""
        backend, dtype, lattice = self._backend, g.dtype, forward_lattice(window)
        outputs, features = g.shape[1], window.features
        out = np.zeros((outputs, features) if transposed else (features, outputs), dtype)
        vector = VECTOR_BITS // (8 * dtype.itemsize)
        taps, phases = len(lattice.taps), len(lattice.phases)
        workers = _workers(len(g) * lattice.places * features * outputs)
        channels, panels = gradient_kernel.channels_of_job(window.channels, taps, outputs, workers, vector)
        span = gradient_kernel.span_of(lattice, outputs, vector)
        size = gradient_kernel.gradient_scratch(channels, panels, taps, phases, span, vector)
        total, most = (
            len(g) * gradient_kernel.places_of_image(lattice, outputs, vector),
            PACKED // (outputs * dtype.itemsize),
        )
        step = max(1, most // DEPTH) * DEPTH
        for start in range(0, total, step):
            stop = min(start + step, total)
            packed_size = gradient_kernel.packed_places(outputs, stop - start, vector)
            lent, packed = backend._scratch.take(dtype, workers, packed_size)
            task = gradient_kernel.GradientTask(
                _plain(images),
                lattice,
                g,
                places_lattice(window, gradient_kernel.compacts(lattice, outputs, vector)),
                out.reshape(-1),
                packed,
                _at_least(lent, size),
                backend._tiles(dtype)[0],
                np.zeros(2 + 2 * workers, np.int64),
                start,
                stop,
                1 if transposed else outputs,
                features if transposed else 1,
                float(s),
            )
            backend._crew.run(gradient_kernel.gradient, task, workers)
            backend._scratch.give(lent, packed)
        return out


def _base(operands: Operands) -> Base:
    assert operands.base is not None  # a convolution always has its own weight
    return operands.base


def _low_rank(operands: Operands) -> LowRank:
    assert operands.low_rank is not None
    return operands.low_rank


def _dense(operands: Operands) -> bool:
    """Whether the gradient of a whole weight is needed."""
    return operands.train_base or operands.delta is not None


def _dense_gradients(backend: Any, gradient: Array, operands: Operands) -> tuple[Array | None, Array | None]:
    """dD = c G and dW = G, of G stored."""
    delta: Delta | None = operands.delta
    weight = gradient if operands.train_base else None
    if delta is None:
        return None, weight
    change = gradient.copy() if weight is not None else gradient
    backend.scale(change, delta.scaling)
    return change, weight


def _forward_rows(weight: Array, window: Window) -> Weights:
    """Those of the output, of a weight stored (out, in)."""
    taps = window.kh * window.kw
    return Weights(weight.reshape(-1), len(weight), window.features, taps, 1)


def _turned_rows(weight: Array, window: Window) -> Weights:
    """Those of the images' gradient, of the same weight."""
    return Weights(weight.reshape(-1), window.channels, window.kh * window.kw, window.features, 1)


def _columns(A: Array, lattice: Lattice) -> Weights:
    """Those of u, of A (in, rank)."""
    rank = A.shape[1]
    return Weights(_plain(A).reshape(-1), rank, 1, len(lattice.taps) * rank, rank)


def _lines(images: Array) -> Array:
    """Images with all places of a channel in one line."""
    samples, channels, height, width = images.shape
    return images.reshape(samples, channels, 1, height * width)


def _at_least(scratch: Array, size: int) -> Array:
    """The scratch, or larger one, with a row of at least this size for each worker."""
    return scratch if scratch.shape[1] >= size else np.empty((len(scratch), size), scratch.dtype)
