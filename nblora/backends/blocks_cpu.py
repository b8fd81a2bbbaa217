"""The operations of `blocks.py` as kernels on the CPU's threads."""

import functools
import math
from typing import Any

import numpy as np

from nblora.kernels.attention import cpu as attention_kernel
from nblora.kernels.common import elementwise
from nblora.kernels.norm import cpu as norm_kernel
from nblora.kernels.pointwise import cpu as pointwise_kernel
from nblora.kernels.pool import cpu as pool_kernel

from .arena import Arena
from .blocks import Array, Heads, Pooling, ReferenceBlocks
from .host import plain as _plain
from .host import workers_for as _workers
from .protocol import Operands


class CPUBlocks(ReferenceBlocks):
    """What `CPUBackend` has of them; it lends the crew, the scratch, the arena and the register tiles."""

    _crew: Any
    _scratch: Any
    _tiles: Any
    forward: Any
    arena: Arena

    def _share(self, kernel: Any, task: Any, work: int) -> None:
        """Run a kernel whose task ends with its counters."""
        workers = _workers(work)
        self._crew.run(kernel, task._replace(counters=np.zeros(workers, np.int64)), workers)

    # --- norms -------------------------------------------------------------------------------------------------

    def norm(self, x: Array, weight: Array, bias: Array | None, eps: float, centred: bool) -> tuple[Array, Array]:
        y, stats = self.arena.empty(x.shape, x.dtype), np.empty((len(x), 2), x.dtype)
        weight = _plain(weight)
        shift = weight if bias is None else _plain(bias)
        task = norm_kernel.NormTask(_plain(x), weight, shift, y, stats, float(eps), centred, bias is not None, None)
        self._share(norm_kernel.norm, task, 8 * x.size)
        return y, stats

    def norm_gradient(
        self, grad: Array, x: Array, stats: Array, weight: Array, centred: bool, wanted: tuple[bool, bool]
    ) -> tuple[Array | None, Array | None, Array | None]:
        grad = _plain(grad)
        gx = self.arena.empty(x.shape, x.dtype) if wanted[0] else grad
        shares = norm_kernel.SHARES if wanted[1] else 0
        parts = np.zeros((2, shares, x.shape[1]), x.dtype)
        task = norm_kernel.NormGradientTask(
            grad, _plain(x), stats, _plain(weight), gx, parts, centred, wanted[0], wanted[1], None
        )
        self._share(norm_kernel.norm_gradient, task, 8 * x.size)
        own = tuple(parts.sum(axis=1)) if wanted[1] else (None, None)
        return (gx if wanted[0] else None, *own)

    # --- attention ---------------------------------------------------------------------------------------------

    def attention(self, q: Array, k: Array, v: Array, shape: Heads) -> tuple[Array, Array]:
        if q.shape[1] // shape.heads > attention_kernel.LARGEST:
            return super().attention(q, k, v, shape)
        o, sums = self.arena.empty(q.shape, q.dtype), np.empty((len(q), shape.heads), q.dtype)
        jobs = _jobs(shape.begins, shape.heads, attention_kernel.QUERIES)
        lent = _plain(q), _plain(k), _plain(v), o, sums, jobs, *_sizes(shape)
        self._attend(attention_kernel.attention, attention_kernel.AttentionTask, lent, q)
        return o, sums

    def attention_gradient(
        self, grad: Array, q: Array, k: Array, v: Array, o: Array, sums: Array, shape: Heads
    ) -> tuple[Array, Array, Array]:
        size = q.shape[1] // shape.heads
        if size > attention_kernel.LARGEST:
            return super().attention_gradient(grad, q, k, v, o, sums, shape)
        empty, pairs = self.arena.empty, (len(k), q.shape[1])
        gq, gk, gv = empty(q.shape, q.dtype), empty(pairs, q.dtype), empty(pairs, q.dtype)
        if shape.key_ends is not None or (len(shape.begins) and (shape.begins[1:] == shape.begins[:-1]).any()):
            gk[:], gv[:] = 0, 0  # keys that no query has
        jobs = _jobs(shape.begins, shape.heads, None)
        lent = _plain(q), _plain(k), _plain(v), o, sums, _plain(grad), gq, gk, gv, jobs, *_sizes(shape)
        self._attend(attention_kernel.attention_gradient, attention_kernel.AttentionGradientTask, lent, q)
        if shape.heads == shape.key_heads:
            return gq, gk, gv
        groups = len(k), shape.key_heads, shape.heads // shape.key_heads, size
        return gq, *(g.reshape(groups).sum(axis=2).reshape(k.shape) for g in (gk, gv))

    def _attend(self, kernel: Any, task: Any, lent: tuple[Any, ...], q: Array) -> None:
        workers = _workers(1 << 20)
        scratch, packed = self._scratch.take(q.dtype, workers, 0)
        self._crew.run(kernel, task(*lent, scratch, self._tiles(q.dtype), np.zeros(workers, np.int64)), workers)
        self._scratch.give(scratch, packed)

    def rotate(
        self, x: Array, positions: np.ndarray, cosines: np.ndarray, sines: np.ndarray, heads: int, back: bool = False
    ) -> None:
        task = pointwise_kernel.RotateTask(x, _plain(positions), _plain(cosines), _plain(sines), heads, back, None)
        self._share(pointwise_kernel.rotate, task, 4 * x.size)

    # --- element by element ------------------------------------------------------------------------------------

    def _pointwise(self, what: int, code: int, x: Array, u: Array | None, g: Array | None, outputs: int) -> Any:
        y, *more = (self.arena.empty(x.shape, x.dtype) for _ in range(outputs))
        flat = _plain(x).reshape(-1)
        second, third = (flat if array is None else _plain(array).reshape(-1) for array in (u, g))
        other = more[0].reshape(-1) if more else y.reshape(-1)
        task = pointwise_kernel.PointwiseTask(what, code, flat, second, third, y.reshape(-1), other, None)
        self._share(pointwise_kernel.pointwise, task, 16 * x.size)
        return (y, *more) if more else y

    def pointwise(self, x: Array, code: int) -> Array:
        return self._pointwise(pointwise_kernel.ACTIVATE, code, x, None, None, 1)

    def pointwise_gradient(self, grad: Array, x: Array, code: int) -> Array:
        return self._pointwise(pointwise_kernel.SLOPE, code, x, None, grad, 1)

    def gated(self, x: Array, u: Array, code: int) -> Array:
        return self._pointwise(pointwise_kernel.GATE, code, x, u, None, 1)

    def gated_gradient(self, grad: Array, x: Array, u: Array, code: int) -> tuple[Array, Array]:
        made: tuple[Array, Array] = self._pointwise(pointwise_kernel.GATE_SLOPE, code, x, u, grad, 2)
        return made

    # --- images ------------------------------------------------------------------------------------------------

    def pool(self, x: Array, shape: Pooling) -> tuple[Array, Array]:
        planes = math.prod(x.shape[:2])
        y = self.arena.empty((*x.shape[:2], *shape.reach(*x.shape[2:])), x.dtype)
        places = self.arena.empty((planes, *y.shape[2:]) if shape.maximum else (0, 0, 0), np.int64)
        self._pool(False, _plain(x).reshape(planes, *x.shape[2:]), y.reshape(planes, *y.shape[2:]), places, shape)
        return y, places

    def pool_gradient(self, grad: Array, places: Array, shape: Pooling, height: int, width: int) -> Array:
        planes = math.prod(grad.shape[:2])
        gx = self.arena.empty((*grad.shape[:2], height, width), grad.dtype)
        g = _plain(grad).reshape(planes, *grad.shape[2:])
        self._pool(True, gx.reshape(planes, height, width), g, places, shape)
        return gx

    def _pool(self, back: bool, x: Array, y: Array, places: Array, shape: Pooling) -> None:
        maximum, kernel, stride, padding = shape
        task = pool_kernel.PoolTask(back, x, y, places, kernel, stride, padding, maximum, None)
        self._share(pool_kernel.pool, task, 4 * y.size * math.prod(shape.kernel))

    def channels(self, x: Array, scale: Array, shift: Array, code: int) -> Array:
        if x.ndim == 2:  # a job is a channel of an image: of rows each would be one number
            z = x * scale
            z += shift
            return self.pointwise(z, code) if code else z
        y = self.arena.empty(x.shape, x.dtype)
        self._channels(False, code, x, scale, shift, y, y)
        return y

    def channels_gradient(
        self, grad: Array, x: Array, scale: Array, shift: Array, code: int
    ) -> tuple[Array, Array, Array]:
        if x.ndim == 2:
            g = self.pointwise_gradient(grad, x * scale + shift, code) if code else grad
            return g * scale, np.einsum("no,no->o", g, x), g.sum(axis=0)
        gx = self.arena.empty(x.shape, x.dtype)
        along, plain = self._channels(True, code, x, scale, shift, _plain(grad), gx).sum(axis=1)
        return gx, along, plain

    def output_norms(self, operands: Operands) -> Array:
        """√(‖W‖² + 2 s (Aᵀ W)·B + s² (Aᵀ A B)·B) of each output: W is read twice and W + s A B never made."""
        base, low_rank = operands.base, operands.low_rank
        assert base is not None  # whose outputs they are
        weight = base.weight
        squares = np.einsum("oi,oi->o" if base.transposed else "io,io->o", weight, weight).astype(np.float64)
        if low_rank is not None:
            A, B, s = low_rank.A, low_rank.B.astype(np.float64), low_rank.scaling
            plain = Operands(base._replace(bias=None), None, None, elementwise.IDENTITY, False)
            along, _ = self.forward(np.ascontiguousarray(A.T), plain, None, False)
            squares += np.einsum("ro,ro->o", 2 * s * along + s * s * (A.T @ A) @ B, B)
        return np.sqrt(np.maximum(squares, 0)).astype(weight.dtype)

    def _channels(self, back: bool, code: int, x: Array, scale: Array, shift: Array, y: Array, gx: Array) -> Array:
        size = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        sums = np.empty((2, *size[:2]) if back else (2, 0, 0), x.dtype)
        planes = [array.reshape(size) for array in (_plain(x), y, gx)]
        task = pool_kernel.ChannelTask(
            back, code, planes[0], _plain(scale), _plain(shift), planes[1], planes[2], sums, None
        )
        self._share(pool_kernel.channels, task, 8 * x.size)
        return sums


def _sizes(shape: Heads) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    ends = shape.key_begins[1:] if shape.key_ends is None else shape.key_ends
    spans = np.array([shape.begins[:-1], shape.begins[1:], shape.key_begins[:-1], ends], np.int64)
    sizes = np.array([shape.heads, shape.heads // shape.key_heads, shape.causal], np.int64)
    return spans, sizes, np.array([shape.seed, shape.bar], np.int64), float(shape.scale)


def _jobs(begins: np.ndarray, heads: int, rows: int | None) -> np.ndarray:
    """Sequence, head and first row of every job, in pieces of so many rows; the longest sequences first."""
    return _cached_jobs(np.diff(begins).tobytes(), heads, rows)


@functools.lru_cache(64)
def _cached_jobs(lengths: bytes, heads: int, rows: int | None) -> np.ndarray:
    counts = np.frombuffer(lengths, np.int64)
    jobs = [
        (sequence, head, start)
        for sequence in np.argsort(-counts, kind="stable").tolist()
        for head in range(heads)
        for start in range(0, counts[sequence], rows or max(int(counts[sequence]), 1))
    ]
    return np.array(jobs, np.int64).reshape(-1, 3)
