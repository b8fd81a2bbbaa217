"""Operations of transformers and of convolutional networks beside the linear step: norms, attention, gates, pooling.

Here in plain NumPy, the specification; `blocks_cpu.py` has the kernels, and `cuda/` those of a GPU. Arrays are as in
`protocol.py`; those that an operation returns are new. Places, rows, positions and tables of angles are NumPy's on
every backend, and nobody changes them: a GPU brings each over once, and finds its copy again.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nblora.kernels.common.elementwise import activate, activation_slope
from nblora.kernels.common.mixing import FIRST_MIX, HEAD_STEP, KEY_STEP, ROW_STEP, SECOND_MIX

from .protocol import Array, Number, Operands


class Heads(NamedTuple):
    """How attention reads its rows: those of all sequences lie one after the other.

    Queries of sequence s are rows begins[s] to begins[s + 1], its keys and values key_begins[s] to key_begins[s + 1],
    or to key_ends[s] where there is room between; all int64. `heads` read the queries, `key_heads`, of which `heads`
    is a multiple, the keys. A causal query sees the keys up to its own place, the last query the last key; one that
    sees none gives zeros. Each weight of the softmax is dropped with the probability `dropout`, the others scaled by
    1/(1 - dropout); `seed` says which, by `weights_kept`.
    """

    begins: np.ndarray
    key_begins: np.ndarray
    heads: int
    key_heads: int
    causal: bool
    scale: float
    key_ends: np.ndarray | None = None
    dropout: float = 0.0
    seed: int = 0

    @property
    def bar(self) -> int:
        """What a weight's number of 53 bits must reach for it to be kept."""
        return round(self.dropout * 2**53)

    def spans(self, sequence: int) -> tuple[slice, slice, np.ndarray]:
        """Rows of queries and of keys of a sequence, and which query sees which key."""
        rows = slice(int(self.begins[sequence]), int(self.begins[sequence + 1]))
        ends = self.key_begins[1:] if self.key_ends is None else self.key_ends
        keys = slice(int(self.key_begins[sequence]), int(ends[sequence]))
        count, known = rows.stop - rows.start, keys.stop - keys.start
        seen = np.ones((count, known), bool)
        return rows, keys, np.tril(seen, known - count) if self.causal else seen


class Pooling(NamedTuple):
    """How windows lie on images: maxima or means, which count padding as PyTorch's do."""

    maximum: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Places of the window on an image."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        return rows, columns


def _each(rule: Any, z: np.ndarray, code: int) -> np.ndarray:
    return np.array([rule(value, code) for value in z.reshape(-1).tolist()], z.dtype).reshape(z.shape)


class ReferenceBlocks:
    """The operations on NumPy arrays."""

    def norm(self, x: Array, weight: Array, bias: Array | None, eps: float, centred: bool) -> tuple[Array, Array]:
        """y = (x - m) r w + b of rows (N, F), and (m, r) of each, (N, 2): r = 1 / √(mean (x - m)² + eps), m the mean, 0
        where not `centred` (RMSNorm)."""
        mean = x.mean(axis=1, keepdims=True) if centred else np.zeros((len(x), 1), x.dtype)
        gain = 1 / np.sqrt(((x - mean) ** 2).mean(axis=1, keepdims=True) + x.dtype.type(eps))
        y = (x - mean) * gain * weight
        return y if bias is None else y + bias, np.hstack([mean, gain])

    def norm_gradient(
        self, grad: Array, x: Array, stats: Array, weight: Array, centred: bool, wanted: tuple[bool, bool]
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Gradients of x, of weight and of bias: the first where wanted[0], the others where wanted[1]."""
        mean, gain = stats[:, :1], stats[:, 1:]
        hat, along = (x - mean) * gain, grad * weight
        shift = along.mean(axis=1, keepdims=True) if centred else 0
        gx = gain * (along - shift - hat * (along * hat).mean(axis=1, keepdims=True)) if wanted[0] else None
        return (gx, (grad * hat).sum(axis=0), grad.sum(axis=0)) if wanted[1] else (gx, None, None)

    def attention(self, q: Array, k: Array, v: Array, shape: Heads) -> tuple[Array, Array]:
        """softmax(scale q kᵀ) v for each sequence and head, and the logarithms of the sums, (N, heads).

        q (N, heads·size), k and v (M, key_heads·size).
        """
        o, sums = np.zeros_like(q), np.zeros((len(q), shape.heads), q.dtype)
        for rows, columns, head, _, score, values in _scores(q, k, v, shape):
            weights, sums[rows, head] = _softmax(score)
            o[rows, columns] = (weights * _drops(shape, rows, head, score)) @ values
        return o, sums

    def attention_gradient(
        self, grad: Array, q: Array, k: Array, v: Array, o: Array, sums: Array, shape: Heads
    ) -> tuple[Array, Array, Array]:
        """Gradients of q, k and v."""
        gq, gk, gv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for rows, columns, head, places, score, values in _scores(q, k, v, shape):
            weights, g, drops = _softmax(score)[0], grad[rows, columns], _drops(shape, rows, head, score)
            slope = (g @ values.T) * drops
            slope = shape.scale * weights * (slope - (weights * slope).sum(axis=1, keepdims=True))
            gq[rows, columns] = slope @ k[places]
            gk[places] += slope.T @ q[rows, columns]
            gv[places] += (weights * drops).T @ g
        return gq, gk, gv

    def rotate(
        self, x: Array, positions: np.ndarray, cosines: np.ndarray, sines: np.ndarray, heads: int, back: bool = False
    ) -> None:
        """Turn the first 2·half features of each head of rows (N, heads·size), in place, by the angles of their
        positions, the pairs (i, i + half); `cosines` and `sines` (positions, half). `back`: the other way."""
        parts, half = x.reshape(len(x), heads, -1), cosines.shape[1]
        c, s = cosines[positions][:, None], sines[positions][:, None] * (-1 if back else 1)
        first, second = parts[..., :half].copy(), parts[..., half : 2 * half].copy()
        parts[..., :half] = first * c - second * s
        parts[..., half : 2 * half] = second * c + first * s

    def pointwise(self, x: Array, code: int) -> Array:
        """act(x)."""
        return _each(activate, x, code)

    def pointwise_gradient(self, grad: Array, x: Array, code: int) -> Array:
        """grad∘act'(x)."""
        return grad * _each(activation_slope, x, code)

    def gated(self, x: Array, u: Array, code: int) -> Array:
        """act(x)∘u."""
        return _each(activate, x, code) * u

    def gated_gradient(self, grad: Array, x: Array, u: Array, code: int) -> tuple[Array, Array]:
        """Gradients of x and of u."""
        return grad * u * _each(activation_slope, x, code), grad * _each(activate, x, code)

    def multiplied(self, x: Array, y: Array) -> Array:
        """x∘y, of one shape."""
        return x * y

    def dropout(self, x: Array, share: float, rng: np.random.Generator) -> tuple[Array, Array]:
        """x / (1 - share) where it is kept and 0 where it is dropped, with the probability `share`; and what says
        which. A GPU draws numbers of its own, as for `dropout_mask`."""
        kept = rng.random(x.shape, np.float32) >= share
        return self.dropout_gradient(x, share, kept), kept

    def dropout_gradient(self, grad: Array, share: float, kept: Array) -> Array:
        """The gradient of x."""
        gx: Array = grad * kept
        gx *= grad.dtype.type(1 / (1 - share))
        return gx

    def gather(self, x: Array, rows: np.ndarray) -> Array:
        """x[rows]: rows of (N, F), of int64."""
        return np.ascontiguousarray(x[rows])

    def scatter(self, target: Array, rows: np.ndarray, source: Array, add: bool = False) -> None:
        """target[rows[n]] (+)= source[n], in place; no row twice."""
        target[rows] = target[rows] + source if add else source

    def split_columns(self, x: Array, parts: int) -> list[Array]:
        """Parts of equal width of each row of (N, F)."""
        return [np.ascontiguousarray(part) for part in np.split(x, parts, axis=1)]

    def join_columns(self, parts: Sequence[Array]) -> Array:
        """The inverse of `split_columns`."""
        return np.concatenate(list(parts), axis=1)

    def row_means(self, x: Array, begins: np.ndarray) -> Array:
        """The mean of rows begins[s] to begins[s + 1] of (N, F) for each s, (S, F); no range is empty."""
        counts = np.diff(begins).astype(x.dtype)[:, None]
        return np.add.reduceat(x, begins[:-1], axis=0) / counts

    def row_means_gradient(self, grad: Array, begins: np.ndarray) -> Array:
        """The gradient of the rows."""
        counts = np.diff(begins)
        return np.repeat(grad / counts.astype(grad.dtype)[:, None], counts, axis=0)

    def largest(self, x: Array) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of (N, F) the place of its largest number, the first of NaN where there is any, and that number;
        as NumPy's arrays, int64 and of x's dtype."""
        places = x.argmax(axis=1)
        return places, x[np.arange(len(x)), places]

    def right_answers(self, logits: Array, labels: Array) -> Number:
        """How many rows of logits (N, out) have the largest number where labels (N,) int64 say, negative ones never."""
        return float(np.count_nonzero(logits.argmax(axis=1) == labels))

    def pool(self, x: Array, shape: Pooling) -> tuple[Array, Array]:
        """Maxima or means of windows of images (N, C, H, W), and where each maximum was, by its place in the image: the
        first of equal ones, and of NaN, which is the largest."""
        padded, places = _windows(x, shape)
        if not shape.maximum:
            return padded.mean(axis=(-2, -1)), np.zeros(0, np.int64)
        flat = padded.reshape(*padded.shape[:4], math.prod(shape.kernel))
        best = np.where(np.isneginf(flat).all(axis=-1), (places >= 0).argmax(axis=-1), flat.argmax(axis=-1))
        return (
            np.take_along_axis(flat, best[..., None], -1)[..., 0],
            np.take_along_axis(np.broadcast_to(places, flat.shape), best[..., None], -1)[..., 0].astype(np.int64),
        )

    def pool_gradient(self, grad: Array, places: Array, shape: Pooling, height: int, width: int) -> Array:
        """The gradient of images of this height and width."""
        images = math.prod(grad.shape[:2])
        gx = np.zeros((images, height * width), grad.dtype)
        if shape.maximum:
            rows = np.repeat(np.arange(images), grad[0, 0].size if images else 0)
            np.add.at(gx, (rows, places.reshape(-1)), grad.reshape(-1))
        else:
            share = (grad / math.prod(shape.kernel)).reshape(images, math.prod(grad.shape[2:]), 1)
            _, where = _windows(np.zeros((1, 1, height, width), grad.dtype), shape)
            where = where.reshape(share.shape[1], -1)
            for place, inside in enumerate(where >= 0):
                gx[:, where[place][inside]] += share[:, place]
        return gx.reshape(*grad.shape[:2], height, width)

    def means(self, x: Array) -> Array:
        """The mean of every channel of images (N, C, H, W), (N, C)."""
        return self.pool(x, Pooling(False, x.shape[2:], (1, 1), (0, 0)))[0].reshape(x.shape[:2])

    def means_gradient(self, grad: Array, height: int, width: int) -> Array:
        """The gradient of images of this height and width."""
        one = Pooling(False, (height, width), (1, 1), (0, 0))
        return self.pool_gradient(grad.reshape(*grad.shape, 1, 1), np.zeros((0, 0, 0), np.int64), one, height, width)

    def channels(self, x: Array, scale: Array, shift: Array, code: int) -> Array:
        """act(x scale + shift) of images (N, C, ...) or rows (N, C), each channel with its own numbers."""
        across = (1, -1, *(1,) * (x.ndim - 2))
        z = x * scale.reshape(across) + shift.reshape(across)
        return _each(activate, z, code) if code else z

    def channels_gradient(
        self, grad: Array, x: Array, scale: Array, shift: Array, code: int
    ) -> tuple[Array, Array, Array]:
        """Gradients of x, of scale and of shift."""
        across, others = (1, -1, *(1,) * (x.ndim - 2)), (0, *range(2, x.ndim))
        if code:
            z = x * scale.reshape(across) + shift.reshape(across)
            grad = grad * _each(activation_slope, z, code)
        return grad * scale.reshape(across), (grad * x).sum(axis=others), grad.sum(axis=others)

    def channel_scale(
        self, weight: Array, bias: Array, mean: Array, variance: Array, eps: float
    ) -> tuple[Array, Array]:
        """What a batch norm with fixed statistics multiplies each channel with, w / √(variance + eps), and adds, b less
        the mean times that; all (C,)."""
        scale = weight / np.sqrt(variance + variance.dtype.type(eps))
        return scale, bias - mean * scale

    def channel_scale_gradient(self, scale: Array, shift: Array, mean: Array, variance: Array, eps: float) -> Array:
        """The gradient of the weight, of those of scale and shift; that of the bias is shift's."""
        return (scale - mean * shift) / np.sqrt(variance + variance.dtype.type(eps))

    def output_norms(self, operands: Operands) -> Array:
        """‖W + s A B‖ of each output over its inputs, (out,)."""
        base, low_rank = operands.base, operands.low_rank
        assert base is not None  # whose outputs they are
        weight = base.weight.T if base.transposed else base.weight
        changed = weight if low_rank is None else weight + low_rank.scaling * (low_rank.A @ low_rank.B)
        return np.sqrt((changed**2).sum(axis=0))

    def per_norms(self, magnitude: Array, norms: Array) -> tuple[Array, Array]:
        """Magnitudes by norms, and 1 by norms, of each output, (out,); 0 where the norm is."""
        has, zeros = norms != 0, np.zeros_like(norms)
        return np.divide(magnitude, norms, out=zeros.copy(), where=has), np.divide(1, norms, out=zeros, where=has)


def _scores(q: Array, k: Array, v: Array, shape: Heads) -> Any:
    """For each sequence with keys and each head: its rows, its columns, the head, its place among the keys, the scores
    (-inf where a key is not seen) and the values."""
    size = q.shape[1] // shape.heads
    for sequence in range(len(shape.begins) - 1):
        rows, keys, seen = shape.spans(sequence)
        if keys.stop == keys.start:
            continue
        for head in range(shape.heads):
            columns, start = slice(head * size, (head + 1) * size), head * shape.key_heads // shape.heads * size
            places = keys, slice(start, start + size)
            score = np.where(seen, q.dtype.type(shape.scale) * (q[rows, columns] @ k[places].T), -np.inf)
            yield rows, columns, head, places, score.astype(q.dtype), v[places]


def _drops(shape: Heads, rows: slice, head: int, score: np.ndarray) -> Any:
    """What the weights of a sequence's head are multiplied with: 0, or 1/(1 - dropout)."""
    if not shape.bar:
        return score.dtype.type(1)
    kept = weights_kept(shape.seed, np.arange(rows.start, rows.stop), head, score.shape[1], shape.bar)
    return kept * score.dtype.type(1 / (1 - shape.dropout))


def weights_kept(seed: int, rows: np.ndarray, head: int, keys: int, bar: int) -> np.ndarray:
    """Which weights of a head attention keeps, (rows, keys): those whose number, a mix of the seed and of their place
    (Steele et al., 2014, `SplitMix64`), is at least `bar` of 2^53. Rows are those of q, keys are counted from the
    sequence's first."""
    first, second = np.uint64(ROW_STEP), np.uint64(HEAD_STEP)
    of_rows = _mixed(np.uint64(seed) + rows.astype(np.uint64) * first + np.array([head], np.uint64) * second)
    numbers = _mixed(of_rows[:, None] + np.arange(keys, dtype=np.uint64) * np.uint64(KEY_STEP))
    return (numbers >> np.uint64(11)).astype(np.int64) >= bar


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST_MIX)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND_MIX)
    return z ^ (z >> np.uint64(31))


def _softmax(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, zeros for one that sees nothing; and log Σ exp, 0 for that one."""
    blind = np.isneginf(score).all(axis=1)
    largest = np.where(blind, 0, score.max(axis=1)).astype(score.dtype)
    weights = np.exp(score - largest[:, None])
    total = np.where(blind, 1, weights.sum(axis=1)).astype(score.dtype)
    return weights / total[:, None], np.where(blind, 0, largest + np.log(total))


def _windows(x: np.ndarray, shape: Pooling) -> tuple[np.ndarray, np.ndarray]:
    """Every window, (N, C, H', W', kh, kw), and the places of its elements in an image, (H', W', kh·kw), -1 outside."""
    around = [(size, size) for size in shape.padding]
    value = -np.inf if shape.maximum else 0
    padded = np.pad(x, [(0, 0), (0, 0), *around], constant_values=value)
    places = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    places = np.pad(places, around, constant_values=-1)

    def slide(array: np.ndarray) -> np.ndarray:
        views = np.lib.stride_tricks.sliding_window_view(array, shape.kernel, axis=(-2, -1))
        return views[..., :: shape.stride[0], :: shape.stride[1], :, :]

    where = slide(places)
    return slide(padded), where.reshape(*where.shape[:2], -1)
