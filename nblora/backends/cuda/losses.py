"""Losses and their gradients."""

import numpy as np

from nblora.kernels.losses.cuda import losses

from ..protocol import Array, Number
from .launching import Launching
from .shapes import NAMES, base_aligned


class Losses(Launching):
    """Losses, on the device or, of arrays of the host, brought back to it."""

    def mean_squared_error(self, output: Array, target: Array) -> tuple[Number, Array]:
        """Mean squared error and its gradient."""
        return self._loss("mean_squared_error", output, target, output.size)

    def binary_cross_entropy(self, logits: Array, target: Array) -> tuple[Number, Array]:
        """Binary cross-entropy with logits and its gradient."""
        return self._loss("binary_cross_entropy", logits, target, logits.size)

    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[Number, Array]:
        """Softmax cross-entropy with integer labels and its gradient."""
        on_device = self.adopt(labels)  # of the host they are counted there
        known = labels if on_device is None else self.to_host(on_device)
        learnt = int(np.count_nonzero(known >= 0))
        return self._loss("softmax_cross_entropy", logits, labels if on_device is None else on_device, learnt)

    def _loss(self, name: str, output: Array, target: Array, count: int) -> tuple[Number, Array]:
        """The loss, and its gradient, where `output` is: on the device, or on the host."""
        on_device = self.adopt(output)
        values = self.from_host(output) if on_device is None else on_device
        given = self.adopt(target)
        targets = self.from_host(target) if given is None else given
        threads = self._threads(values)
        blocks = self._blocks(values.size, threads)
        if name == "softmax_cross_entropy":  # a block a row, of no more warps than the row has work for
            threads, blocks = min(threads, max(32, 1 << (values.shape[1] // 4).bit_length())), len(values)
        gradient = self._device.empty(values.shape, values.dtype)
        buffer, begin, partial = self._reserve(blocks)
        kernel = getattr(losses(NAMES[values.dtype], threads), name)
        arguments = [values, targets, np.float64(1 / max(1, count)), gradient, partial]
        if name == "softmax_cross_entropy":
            arguments.insert(3, int(base_aligned(values, gradient)))
        if blocks:
            self._device.launch(kernel, blocks, threads, *arguments)
        value = self._number(buffer, begin, begin + blocks)
        return (float(value), self.to_host(gradient)) if on_device is None else (value, gradient)
