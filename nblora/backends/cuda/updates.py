"""Updates of parameters, small arithmetic in place, and sums of squares."""

from collections.abc import Sequence

import numpy as np

from nblora.kernels.update.cuda import elementwise, grouped

from ..protocol import Array, Number
from .deferred import Deferred
from .shapes import NAMES, base_aligned


class Updates(Deferred):
    """Operations on parameters and gradients as they are."""

    def sgd_update(self, parameter: Array, gradient: Array, lr: float) -> None:
        """parameter -= lr gradient, in place."""
        self._put_off("sgd", [parameter, gradient], (lr,))

    def momentum_update(self, delta: Array, velocity: Array, gradient: Array, momentum: float, lr: float) -> None:
        """V = m V + (1-m) gradient; D -= lr V, in place."""
        self._device.settle()
        number = delta.dtype.type
        aligned = int(base_aligned(delta, velocity, gradient))
        kernel = elementwise(NAMES[delta.dtype], self._threads(delta)).momentum
        scalars = number(momentum), number(1 - momentum), number(lr)
        self._stride(kernel, delta, velocity, gradient, *scalars, aligned)

    def adamw_update(
        self,
        parameter: Array,
        gradient: Array,
        first: Array,
        second: Array,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """AdamW with decoupled decay, `step` counted from 1, in place."""
        b1, b2 = betas
        scalars = (1 - lr * weight_decay, lr / (1 - b1**step), b1, 1 - b1, b2, 1 - b2, 1 - b2**step, eps)
        self._put_off("adamw", [parameter, gradient, first, second], scalars)

    def add(self, target: Array, source: Array) -> None:
        """target += source, in place."""
        self._before_writing(target, source)  # a gradient that is put off may be the source alone
        kernel = elementwise(NAMES[target.dtype], self._threads(target)).add
        self._stride(kernel, target, source, int(base_aligned(target, source)))

    def scale(self, target: Array, factor: float) -> None:
        """target *= factor, in place."""
        self._before_writing(target)
        kernel = elementwise(NAMES[target.dtype], self._threads(target)).times
        self._stride(kernel, target, target.dtype.type(factor), int(base_aligned(target)))

    def sum_of_squares(self, array: Array) -> float:
        """Σ a², accumulated in float64."""
        return float(self.sums_of_squares([array])[0])

    def sums_of_squares(self, arrays: Sequence[Array]) -> list[Number]:
        """Σ a² of each, in one launch."""
        self._device.settle()
        filled = [array for array in arrays if array.size]
        if not filled:
            return [0.0] * len(arrays)
        if any(array.bfloat16 for array in filled) or len({array.dtype for array in filled}) > 1:
            return [self._square_by_itself(array) for array in arrays]
        threads = self._threads(filled[0])
        # A few blocks an array: of many small ones each has enough to do.
        blocks = self._blocks(max(array.size for array in filled), threads)
        blocks = max(1, min(blocks, self._device.waves * self._device.multiprocessors // len(filled)))
        table = self._upload([[array.size, array.address] for array in filled], np.int64)
        buffer, begin, partial = self._reserve(blocks * len(filled))
        kernel = grouped(NAMES[filled[0].dtype], threads).sums_of_squares
        self._device.launch(kernel, (blocks, len(filled), 1), threads, table, partial)
        found = iter([self._number(buffer, begin + i * blocks, begin + (i + 1) * blocks) for i in range(len(filled))])
        return [next(found) if array.size else 0.0 for array in arrays]

    def _square_by_itself(self, array: Array) -> Number:
        if array.bfloat16:  # of a frozen base, looked at only to find a fault
            return float(np.square(array.copy_to_host(), dtype=np.float64).sum())
        return self.sums_of_squares([array])[0]
