"""The linear step: forward, gradients, the sweep that updates D and W on its way, and merging."""

from typing import cast

from nblora.kernels.linear.cuda import forward as forward_kernels
from nblora.kernels.linear.cuda import gradients
from nblora.kernels.linear.cuda.forward import FACTOR, HAS_BASE, HAS_LOW, KEEP, LOW, OUT, WEIGHT, X
from nblora.kernels.linear.cuda.norms import GROUP
from nblora.kernels.linear.cuda.norms import norms as norm_kernels
from nblora.kernels.linear.cuda.tiles import Tile
from nblora.kernels.update.cuda import DELTA, elementwise
from nblora.kernels.update.cuda import WEIGHT as WEIGHT_ITSELF

from ..protocol import Array, Gradients, LowRank, Operands, Saved, keeps_input
from .deferred import Deferred
from .shapes import NAMES, base_aligned, vector_flag

WORTH_SPLITTING = 4
"""Splits of a dense update from which on its gradient, added up from them, is worth a place in memory."""


class Linear(Deferred):
    """The product of rows."""

    def forward(self, x: Array, operands: Operands, mask: Array | None, keep: bool) -> tuple[Array, Saved | None]:
        """y = act(x (W + c D) + s (mask∘x) A B + b), and what backward needs where `keep`."""
        self._device.settle()
        base, low_rank, _, code, _ = operands
        N = x.shape[0]
        outputs = low_rank.B.shape[1] if low_rank else base.weight.shape[0 if base.transposed else 1]  # type: ignore[union-attr]  # one of the two is there
        low = self._device.empty((N, low_rank.A.shape[1]), x.dtype) if low_rank else None
        z = self._device.empty((N, outputs), x.dtype) if keep and code else None
        if N == 0:
            y = self._device.empty((0, outputs), x.dtype)
        else:
            if low_rank:
                low = self._project(x, low_rank.A, False, low_rank.scaling, mask)
            y = self._forward(x, operands, low, outputs, z)
        return y, Saved(x if keeps_input(operands) else None, low, z, mask) if keep else None

    def _forward(self, x: Array, operands: Operands, low: Array | None, outputs: int, z: Array | None) -> Array:
        base, low_rank, delta, code, _ = operands
        bias = base.bias if base else None
        B = low_rank.B if low_rank else None
        if x.shape[0] == 1 and base:
            sums = self._vector_sums(x, base.weight, base.transposed, delta)
            return self._finish(sums, 1, low=low, matrix=B, bias=bias, code=code, z=z)
        tile = self._tile(x.shape[0], x.dtype)
        weight = base.weight if base else x
        grid, chunk = self._splits(tile, x.shape[0], outputs, x.shape[1] if base else 0)
        y = self._device.empty((grid[2] * x.shape[0], outputs), x.dtype)
        flags = vector_flag(X, x, tile) | vector_flag(WEIGHT, weight, tile, delta.delta if delta else weight)
        flags |= vector_flag(OUT, y, tile) | (HAS_BASE if base else 0) | (KEEP if z is not None else 0)
        if low is not None:
            flags |= HAS_LOW | vector_flag(LOW, low, tile) | vector_flag(FACTOR, B, tile)
        self._device.launch(
            forward_kernels.forward(tile, base.transposed if base else False, delta is not None),
            grid,
            tile.threads,
            x,
            weight,
            delta.delta if delta else weight,
            x.dtype.type(delta.scaling if delta else 0),
            x if low is None else low,
            x if B is None else B,
            self._zero_bias(outputs, x.dtype) if bias is None else bias,
            code,
            flags,
            chunk,
            y if z is None else z,
            y,
        )
        return y if grid[2] == 1 else self._finish(y, x.shape[0], bias=bias, code=code, z=z)

    def backward(self, grad_output: Array, saved: Saved, operands: Operands, input_gradient: bool = True) -> Gradients:
        """Every gradient, from the values as they are; `delta` and `weight` stored."""
        gz, gradients_ = self._skinny(grad_output, saved, operands, input_gradient)
        base, _, delta, _, train = operands
        dD = dW = None
        if base and (delta or train):
            p, q = (gz, saved.x) if base.transposed else (saved.x, gz)
            tile = self._shapes[NAMES[gz.dtype]].wide
            dW = self._dense_gradient(tile, p, q, 1.0) if train else None
            dD = self._dense_gradient(tile, p, q, delta.scaling) if delta else None
        return gradients_._replace(delta=dD, weight=dW)

    def _dense_gradient(self, tile: Tile, p: Array, q: Array, factor: float) -> Array:
        if not p.shape[0]:
            return self.zeros_like(self._device.empty((p.shape[1], q.shape[1]), p.dtype))
        return self._product(tile, p, False, q, False, factor)

    def backward_update(
        self,
        grad_output: Array,
        saved: Saved,
        operands: Operands,
        lr: float,
        delta_lr: float,
        input_gradient: bool = True,
    ) -> Gradients:
        """Backward in one sweep that never holds dD or dW: V = m V + (1-m) dD, D -= delta_lr V, W -= lr dW."""
        gz, gradients_ = self._skinny(grad_output, saved, operands, input_gradient)
        base, _, delta, _, train = operands
        if base and (delta or train):
            x = cast(Array, saved.x)
            self._dense_update(*((gz, x) if base.transposed else (x, gz)), operands, lr, delta_lr)
        return gradients_

    def _dense_update(self, p: Array, q: Array, operands: Operands, lr: float, delta_lr: float) -> None:
        """G = Pᵀ Q; V = m V + (1-m) c G, D -= delta_lr V; W -= lr G: those that there are."""
        base, _, delta, _, train = operands
        weight, number = base.weight, p.dtype.type  # type: ignore[union-attr]  # only what has a base comes here
        D, V = (delta.delta, delta.velocity) if delta else (weight, weight)
        momentum, c = (delta.momentum, delta.scaling) if delta else (0.0, 0.0)
        scalars = number(momentum), number((1 - momentum) * c), number(delta_lr), number(lr)
        changed = weight if train else D
        shapes, (samples, rows), columns = self._shapes[NAMES[p.dtype]], p.shape, q.shape[1]
        tile = shapes.wide
        if -(-rows // tile.rows) * -(-columns // tile.columns) < self._filling(tile):
            tile = shapes.small
        grid, _ = self._splits(tile, rows, columns, samples)
        if grid[2] >= WORTH_SPLITTING:
            sums = self._sums(tile, p, False, q, False, 1.0)
            aligned = int(columns % tile.lanes == 0 and base_aligned(D, V, weight))
            threads, parts = shapes.threads, DELTA * (delta is not None) | WEIGHT_ITSELF * bool(train)
            kernel = elementwise(NAMES[p.dtype], threads).descend_sums
            blocks = self._blocks(changed.size // 4 + 1, threads)
            self._device.launch(kernel, blocks, threads, sums, *scalars, parts, aligned, D, V, changed)
            return
        flags = vector_flag(X, p, tile) | vector_flag(WEIGHT, q, tile) | vector_flag(OUT, D, tile, V, weight)
        kernel = gradients.dense_update(tile, delta is not None, bool(train))
        self._device.launch(kernel, (*grid[:2], 1), tile.threads, p, q, *scalars, flags, D, V, changed)

    def _skinny(
        self, grad_output: Array, saved: Saved, operands: Operands, input_gradient: bool
    ) -> tuple[Array, Gradients]:
        """gz, and every gradient but the dense ones: none of this changes a parameter."""
        base, low_rank, _, code, train = operands
        self._flush_updates()
        t: Array | None = None
        dA = dB = db = None
        if saved.z is None:
            gz = grad_output
        elif low_rank and self._fits_narrow(grad_output, low_rank):
            gz, t = self._through_and_down(grad_output, saved.z, code, low_rank)
        else:
            gz = self._through_activation(grad_output, saved.z, code)
        N, samples = gz.shape[0], saved.x
        if low_rank and N:
            if t is None:
                t = self._project(gz, low_rank.B, True, low_rank.scaling)
            dA = self._factor_gradient(cast(Array, samples), t, saved.mask)
            dB = self._factor_gradient(cast(Array, saved.low), gz)
        elif low_rank:
            dA, dB = self.zeros_like(low_rank.A), self.zeros_like(low_rank.B)
        if base and train and base.bias is not None:
            db = self._bias_gradient(gz) if N else self.zeros_like(base.bias)
        gx = self._input_gradient(gz, t, operands, saved) if input_gradient else None
        return gz, Gradients(gx, dA, dB, None, None, db)

    def _through_activation(self, grad_output: Array, z: Array, code: int) -> Array:
        gz = self._device.empty(z.shape, z.dtype)
        if gz.size:
            threads = self._threads(z)
            kernel = elementwise(NAMES[z.dtype], threads).activation_gradient
            self._device.launch(kernel, self._blocks(z.size, threads), threads, grad_output, z, code, gz)
        return gz

    def _fits_narrow(self, grad_output: Array, low_rank: LowRank) -> bool:
        narrow = self._shapes[NAMES[grad_output.dtype]].narrow
        return grad_output.shape[0] > 1 and low_rank.B.shape[0] <= narrow.columns

    def _through_and_down(self, gy: Array, z: Array, code: int, low_rank: LowRank) -> tuple[Array, Array]:
        """gz = gy ∘ act'(z) and t = s gz Bᵀ in one pass over gy."""
        tile = self._shapes[NAMES[gy.dtype]].narrow
        N, B = gy.shape[0], low_rank.B
        grid, chunk = self._splits(tile, N, B.shape[0], gy.shape[1])
        gz = self._device.empty(gy.shape, gy.dtype)
        sums = self._device.empty((grid[2] * N, B.shape[0]), gy.dtype)
        flags = vector_flag(X, gy, tile, z, gz) | vector_flag(WEIGHT, B, tile) | vector_flag(OUT, sums, tile)
        factor = gy.dtype.type(low_rank.scaling)
        kernel = gradients.product_through(tile)
        self._device.launch(kernel, grid, tile.threads, gy, z, gz, code, B, factor, flags, chunk, sums)
        return gz, sums if grid[2] == 1 else self._finish(sums, N)

    def _bias_gradient(self, gz: Array) -> Array:
        aligned = int(gz.shape[1] % self._shapes[NAMES[gz.dtype]].wide.lanes == 0 and base_aligned(gz))
        sums = self._column_sums(gz.reshape(gz.size), gz, gz, gz.dtype.type(0), aligned, False, True)
        return self._finish(sums, 1).reshape(gz.shape[1])

    def _input_gradient(self, gz: Array, t: Array | None, operands: Operands, saved: Saved) -> Array:
        base, low_rank, delta, _, _ = operands
        A = low_rank.A if low_rank else None
        N = gz.shape[0]
        inputs = base.weight.shape[0 if not base.transposed else 1] if base else A.shape[0]  # type: ignore[union-attr]  # one of the two is there
        if not N:
            return self._device.empty((0, inputs), gz.dtype)
        mask = saved.mask if low_rank else None
        if N == 1 and base:
            sums = self._vector_sums(gz, base.weight, not base.transposed, delta)
            return self._finish(sums, 1, low=t, matrix=A, strided=True, mask=mask)
        tile = self._tile(N, gz.dtype)
        weight = base.weight if base else gz
        grid, chunk = self._splits(tile, N, inputs, gz.shape[1] if base else 0)
        gx = self._device.empty((grid[2] * N, inputs), gz.dtype)
        flags = vector_flag(X, gz, tile) | vector_flag(WEIGHT, weight, tile, delta.delta if delta else weight)
        flags |= vector_flag(OUT, gx, tile, gx if mask is None else mask) | (HAS_BASE if base else 0)
        if t is not None:
            flags |= HAS_LOW | vector_flag(LOW, t, tile) | vector_flag(FACTOR, A, tile)
        self._device.launch(
            gradients.input_gradient(tile, base.transposed if base else False, delta is not None, mask is not None),
            grid,
            tile.threads,
            gz,
            weight,
            delta.delta if delta else weight,
            gz.dtype.type(delta.scaling if delta else 0),
            gz if t is None else t,
            gz if A is None else A,
            gz if mask is None else mask,
            flags,
            chunk,
            gx,
        )
        return gx if grid[2] == 1 else self._finish(gx, N)

    def merge(self, operands: Operands) -> Array:
        """W + s A B + c D as a new stored array."""
        self._device.settle()
        base, low_rank, delta, _, _ = operands
        weight, dtype = base.weight, base.weight.dtype  # type: ignore[union-attr]  # only what has a base is merged
        transposed = base.transposed  # type: ignore[union-attr]  # as above
        p, q = (low_rank.A, low_rank.B) if low_rank else (weight, weight)
        if transposed:
            p, q = q, p
        out = self._device.empty(weight.shape, dtype)
        # Plain arithmetic whatever the precision: a merged weight is kept.
        tile = self._plain[NAMES[dtype]].wide
        flags = vector_flag(WEIGHT, out, tile, weight, delta.delta if delta else out)
        if low_rank:
            flags |= HAS_LOW | vector_flag(LOW, p, tile) | vector_flag(FACTOR, q, tile)
        rows, columns = weight.shape
        self._device.launch(
            gradients.merge(tile, transposed, delta is not None),
            (-(-rows // tile.rows), -(-columns // tile.columns), 1),
            tile.threads,
            p,
            q,
            dtype.type(low_rank.scaling if low_rank else 0),
            weight,
            delta.delta if delta else weight,
            dtype.type(delta.scaling if delta else 0),
            flags,
            out,
        )
        return out

    def output_norms(self, operands: Operands) -> Array:
        """‖W + s A B‖ of each output over its inputs, (out,), of the merged weight."""
        weight, base = self.merge(operands), operands.base
        assert base is not None  # whose outputs they are
        threads, outputs = self._threads(weight), weight.shape[0 if base.transposed else 1]
        norms = self._device.empty((outputs,), weight.dtype)
        kernel = norm_kernels(NAMES[weight.dtype], threads, base.transposed).output_norms
        each = threads // GROUP if base.transposed else GROUP
        self._device.launch(kernel, -(-outputs // each), threads, weight, norms)
        return norms

    def per_norms(self, magnitude: Array, norms: Array) -> tuple[Array, Array]:
        """Magnitudes by norms, and 1 by norms, of each output, (out,); 0 where the norm is."""
        self._device.settle()
        factor, inverse = (self._device.empty(norms.shape, norms.dtype) for _ in range(2))
        threads = self._threads(norms)
        kernel = norm_kernels(NAMES[norms.dtype], threads, False).per_norms
        self._device.launch(kernel, self._blocks(norms.size, threads), threads, magnitude, norms, factor, inverse)
        return factor, inverse
