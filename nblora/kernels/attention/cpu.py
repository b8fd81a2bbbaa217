"""Attention: o = softmax(scale q kᵀ) v for each sequence and head, forward and backward, on register tiles.

The rows of all sequences lie one after the other. A job is a head of a sequence, of which forward takes `QUERIES` rows
at most. Keys are packed `DEPTH` at a time, scores exist for `STRIP` queries and these keys, and backward computes them
again from the logarithm of each row's sum. Who computes with a key, in forward, keeps a running maximum of the row.

Nothing is transposed but keys, in registers: gradients of keys and values are summed up as they would be read, feature
by feature, and turned round at their end. Each element has one owner, and sums have one order. Heads that share their
keys have gradients of their own for them, summed up by the caller.
"""

from typing import NamedTuple

import numpy as np

from nblora.kernels.common.atomics import draw
from nblora.kernels.common.functions import exponential
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.machine import DEPTH, ROW_STRIDE, TILE_ROWS
from nblora.kernels.common.microkernel import Ahead, At, Tile, once, tile
from nblora.kernels.common.mixing import FIRST_MIX, HEAD_STEP, KEY_STEP, ROW_STEP, SECOND_MIX
from nblora.kernels.common.threads import entry, launch
from nblora.kernels.linear.cpu.packing import pack_across, pack_columns, pack_rows, pack_steps, plain
from nblora.kernels.linear.cpu.work import C_STRIDE, PART, panel_width, transpose_block

QUERIES = 256
"""Queries of a job of forward, for which its keys are packed once."""
STRIP = 4 * TILE_ROWS
"""Queries whose scores exist at a time."""
SCORES = STRIP * ROW_STRIDE
"""Elements of their scores, as of their features."""
LARGEST = DEPTH
"""The largest head: its features are the inner dimension of one tile."""


class AttentionTask(NamedTuple):
    """One forward. Queries of sequence s are rows spans[0, s] to spans[1, s], its keys spans[2, s] to spans[3, s]."""

    q: object  # (N, heads·size)
    k: object  # (M, key heads·size)
    v: object  # (M, key heads·size)
    o: object  # (N, heads·size), written
    sums: object  # (N, heads), written: log Σ exp(score)
    jobs: object  # (jobs, 3): sequence, head, first query
    spans: object  # (4, sequences): begins and ends of queries, and of keys
    sizes: object  # (heads, heads for each key head, whether causal)
    drops: object  # (seed, bar) of `blocks.weights_kept`; nothing is dropped where bar is 0
    scale: float
    scratch: object  # (workers, PARTS·PART)
    tiles: object  # addresses of `tile_functions`
    counters: object  # (workers,) int64 zeros


class AttentionGradientTask(NamedTuple):
    """The way back; a job is a sequence and a head."""

    q: object
    k: object
    v: object
    o: object
    sums: object
    go: object  # (N, heads·size)
    gq: object  # (N, heads·size), written
    gk: object  # (M, heads·size), written: a head's own
    gv: object  # (M, heads·size), written
    jobs: object
    spans: object
    sizes: object
    drops: object
    scale: float
    scratch: object
    tiles: object
    counters: object


class _Place(NamedTuple):
    """Where a job's rows and columns are."""

    q0: int  # rows of queries
    q1: int
    k0: int  # rows of keys
    k1: int
    column: int  # of the head in q
    key_column: int  # of its keys in k
    size: int
    causal: bool
    ahead: int  # a causal query i, from q0 on, sees keys up to i + ahead, from k0 on


@part
def _place(task, job):
    sequence, head = task.jobs[job, 0], task.jobs[job, 1]
    spans, heads = task.spans, task.sizes[0]
    size = task.q.shape[1] // heads
    q0, q1, k0, k1 = spans[0, sequence], spans[1, sequence], spans[2, sequence], spans[3, sequence]
    key_column = head // task.sizes[1] * size
    return _Place(q0, q1, k0, k1, head * size, key_column, size, task.sizes[2] != 0, (k1 - k0) - (q1 - q0))


@part
def _visible(place, row, j0, j1):
    """Keys of j0 to j1 that the query in this row of q sees."""
    last = row - place.q0 + place.ahead + 1 + place.k0 if place.causal else j1
    return max(0, min(last, j1) - j0)


@part
def _padded(columns, array):
    """Columns of whole panels."""
    width = panel_width(array)
    return (columns + width - 1) // width * width


@part
def _multiply(function, a, b, c, size):
    """One register tile; nothing is fetched ahead."""
    tile(function, a, b, c, size, Ahead(b, b, b, 0, 0, 0, max(size.depth, 1)))


@part
def _by_keys(function, rows, place, n0, j0, j1, a, b, c):
    """c[i, j] = Σ_d a[i, d] b[d, j]: scores of `rows` queries from n0 on, as far as they are visible."""
    once()
    width = panel_width(c)
    for i in range(0, rows, TILE_ROWS):
        height = min(TILE_ROWS, rows - i)
        keys = _visible(place, n0 + i + height - 1, j0, j1)
        for j in range(0, keys, width):
            vectors = 1 if 2 * (keys - j) <= width else 2
            size = Tile(place.size, ROW_STRIDE, False, height, vectors, width, ROW_STRIDE)
            _multiply(function, At(a, i * ROW_STRIDE), At(b, j * DEPTH), At(c, i * ROW_STRIDE + j), size)


@part
def _by_features(function, rows, place, n0, j0, j1, a, b, c, more):
    """c[i, d] (+)= Σ_j a[i, j] b[j, d]."""
    once()
    width = panel_width(c)
    for i in range(0, rows, TILE_ROWS):
        height = min(TILE_ROWS, rows - i)
        keys = _visible(place, n0 + i + height - 1, j0, j1)
        for d in range(0, place.size, width):
            vectors = 1 if 2 * (place.size - d) <= width else 2
            size = Tile(keys, C_STRIDE, more, height, vectors, width, ROW_STRIDE)
            _multiply(function, At(a, i * ROW_STRIDE), At(b, d * DEPTH), At(c, i * C_STRIDE + d), size)


@part
def _by_queries(function, rows, keys, features, a, b, c):
    """c[d, j] += Σ_i a[i, d] b[i, j], a in steps."""
    once()
    width = panel_width(c)
    for j in range(0, keys, width):
        vectors = 1 if 2 * (keys - j) <= width else 2
        for d in range(0, features, TILE_ROWS):
            size = Tile(rows, C_STRIDE, True, min(TILE_ROWS, features - d), vectors, ROW_STRIDE, 0)
            _multiply(function, At(a, d * STRIP), At(b, j), At(c, d * C_STRIDE + j), size)


@part(fastmath={"nnan", "nsz", "reassoc"})
def _largest(row):
    """The largest element; with NaN among them any, since the row's sum is NaN then. Or it would not be vectorised."""
    once()
    most = row[0]
    for j in range(row.shape[0]):
        most = row[j] if row[j] > most else most
    return most


@part(fastmath={"contract", "reassoc"})
def _exponentials(row, scale, shift):
    """row = exp(scale row - shift); return the sum."""
    once()
    total = row.dtype.type(0)
    for j in range(row.shape[0]):
        row[j] = exponential(scale * row[j] - shift, row)
        total += row[j]
    return total


@part
def _zero(row):
    once()
    for j in range(row.shape[0]):
        row[j] = 0


@part
def _scale(row, factor):
    once()
    for j in range(row.shape[0]):
        row[j] *= factor


@part
def _copy_scaled(target, source, factor):
    once()
    for j in range(target.shape[0]):
        target[j] = factor * source[j]


@part
def _add_scaled(target, source, factor):
    once()
    for j in range(target.shape[0]):
        target[j] += factor * source[j]


@part(fastmath={"contract", "reassoc"})
def _dot(left, right):
    once()
    total = left.dtype.type(0)
    for j in range(left.shape[0]):
        total += left[j] * right[j]
    return total


@part
def _pull(row, ahead, behind):
    """row = ahead (row - behind): the gradient of scores."""
    once()
    for j in range(row.shape[0]):
        row[j] = ahead[j] * (row[j] - behind)


@part
def _mixed(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST_MIX)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND_MIX)
    return z ^ (z >> np.uint64(31))


@part
def _drop(task, place, n, key, row):
    """Weights of query n from this key of its sequence on: those that are dropped become 0, the others grow."""
    once()
    bar = task.drops[1]
    gain = row.dtype.type(1 / (1 - bar / 2**53))
    head = np.uint64(place.column // place.size)
    z = np.uint64(task.drops[0]) + np.uint64(n) * np.uint64(ROW_STEP) + head * np.uint64(HEAD_STEP)
    z = _mixed(z)
    for j in range(row.shape[0]):
        number = np.int64(_mixed(z + np.uint64(key + j) * np.uint64(KEY_STEP)) >> np.uint64(11))
        row[j] = gain * row[j] if number >= bar else 0


@part
def _drop_strip(task, place, n0, rows, j0, j1, s):
    once()
    for i in range(rows):
        at = i * ROW_STRIDE
        _drop(task, place, n0 + i, j0 - place.k0, s[at : at + _visible(place, n0 + i, j0, j1)])


@part
def _softmax_strip(place, n0, rows, j0, j1, s, o, largest, total, scale):
    """Scores to exp(score - largest so far); sums, and what o holds already, brought to the new maximum."""
    once()
    for i in range(rows):
        keys, at = _visible(place, n0 + i, j0, j1), i * ROW_STRIDE
        last = i // TILE_ROWS * TILE_ROWS + TILE_ROWS - 1
        end = _visible(place, n0 + min(last, rows - 1), j0, j1)
        _zero(s[at + keys : at + end])  # what other rows of the tile see
        if keys == 0:
            continue
        row = s[at : at + keys]
        most = scale * _largest(row)
        if total[i] == 0:  # the first keys that it sees
            largest[i] = most
        elif most > largest[i]:
            fade = exponential(largest[i] - most, s)
            total[i] *= fade
            _scale(o[i * C_STRIDE : i * C_STRIDE + place.size], fade)
            largest[i] = most
        total[i] += _exponentials(row, scale, largest[i])


@part
def _finish_strip(task, place, n0, rows, head, o, largest, total):
    once()
    kind = o.dtype.type
    for i in range(rows):
        target = task.o[n0 + i, place.column : place.column + place.size]
        if total[i] == 0:  # it saw no key
            _zero(target)
            task.sums[n0 + i, head] = 0
        else:
            _copy_scaled(target, o[i * C_STRIDE : i * C_STRIDE + place.size], kind(1) / total[i])
            task.sums[n0 + i, head] = largest[i] + np.log(total[i])


@part
def _forward_strip(task, place, work, n0, rows, j0, j1):
    """Go on with `rows` queries from n0 on, along the keys j0 to j1, which are packed."""
    once()
    q, s, o, turned, values, state, first = work.q, work.s, work.o, work.kt, work.v, work.state, j0 == place.k0
    at = (n0 - work.begin) * C_STRIDE
    strip = o[at:]
    largest, total = state[n0 - work.begin :], state[QUERIES + n0 - work.begin :]
    if first:
        for i in range(rows):
            total[i], largest[i] = 0, 0
    if _visible(place, n0 + rows - 1, j0, j1) == 0:
        if first:
            _zero(strip[: rows * C_STRIDE])
        return
    pack_rows(q, task.q, n0, n0 + rows, place.column, place.column + place.size)
    _by_keys(task.tiles[0], rows, place, n0, j0, j1, q, turned, s)
    _softmax_strip(place, n0, rows, j0, j1, s, strip, largest, total, s.dtype.type(task.scale))
    if task.drops[1]:
        _drop_strip(task, place, n0, rows, j0, j1, s)
    _by_features(task.tiles[0], rows, place, n0, j0, j1, s, values, strip, not first)


class _Forward(NamedTuple):
    """A worker's scratch in forward."""

    q: object
    s: object
    kt: object
    v: object
    o: object
    state: object  # maxima and sums
    begin: int  # the job's first query


@part
def _pack_keys(task, place, kt, v, j0, j1):
    """Keys turned, values as they are."""
    columns = place.key_column, place.key_column + place.size
    pack_across(kt, DEPTH, 0, plain(task.k), columns[0], columns[1], j0, j1, kt)
    pack_columns(v, DEPTH, 0, plain(task.v), j0, j1, columns[0], columns[1])


@part
def _forward_job(task, job, scratch):
    place = _place(task, job)
    n0 = place.q0 + task.jobs[job, 2]
    n1 = min(n0 + QUERIES, place.q1)
    work = _Forward(
        scratch,
        scratch[SCORES:],
        scratch[PART : 2 * PART],
        scratch[2 * PART : 3 * PART],
        scratch[3 * PART : 4 * PART],
        scratch[4 * PART : 5 * PART],
        n0,
    )
    for j in range(place.k0, max(place.k1, place.k0 + 1), DEPTH):
        end = min(j + DEPTH, place.k1)
        if j > place.k0 and _visible(place, n1 - 1, j, end) == 0:
            break
        _pack_keys(task, place, work.kt, work.v, j, end)
        for n in range(n0, n1, STRIP):
            _forward_strip(task, place, work, n, min(STRIP, n1 - n), j, end)
    for n in range(n0, n1, STRIP):
        at = n - n0
        largest, total = work.state[at:], work.state[QUERIES + at :]
        _finish_strip(task, place, n, min(STRIP, n1 - n), task.jobs[job, 1], work.o[at * C_STRIDE :], largest, total)


@part
def _forward_worker(task, worker, workers):
    while True:
        job = draw(task.counters, 0, task.jobs.shape[0], worker, workers)
        if job < 0:
            break
        _forward_job(task, job, task.scratch[worker])


_forward_entry = entry(_forward_worker)


@kernel
def attention(task, workers, board, helpers):
    """Work off an `AttentionTask` in so many shares, with helpers that stand by at the board."""
    function, address = _forward_entry(task)
    launch(function, address, workers, board, helpers)


class _Backward(NamedTuple):
    """A worker's scratch in backward."""

    q: object  # rows of queries
    g: object  # rows of the output's gradient
    p: object  # weights of a strip
    s: object  # gradients of its scores
    kt: object  # keys turned
    vt: object  # values turned
    k: object  # keys
    gk: object  # gradients turned
    gv: object
    steps: object  # queries and gradients in steps, and a strip of the queries' gradient


@part
def _strip_gradients(task, place, work, n0, rows, j0, j1, head):
    """p = exp(score - sum) and s = p (go vᵀ - go·o) for `rows` queries from n0 on, with m p and m∘(go vᵀ) for p and
    go vᵀ where weights were multiplied by m."""
    once()
    kind = work.p.dtype.type
    scale, column = kind(task.scale), place.column
    end = _padded(_visible(place, n0 + rows - 1, j0, j1), work.p)  # the tiles add up whole vectors of columns
    _by_keys(task.tiles[0], rows, place, n0, j0, j1, work.q, work.kt, work.p)
    _by_keys(task.tiles[0], rows, place, n0, j0, j1, work.g, work.vt, work.s)
    for i in range(rows):
        n, at = n0 + i, i * ROW_STRIDE
        keys = _visible(place, n, j0, j1)
        _zero(work.p[at + keys : at + end])
        _zero(work.s[at + keys : at + end])
        if keys:
            p = work.p[at : at + keys]
            _exponentials(p, scale, task.sums[n, head])
            behind = _dot(task.go[n, column : column + place.size], task.o[n, column : column + place.size])
            if task.drops[1]:
                _drop(task, place, n, j0 - place.k0, work.s[at : at + keys])
            _pull(work.s[at : at + keys], p, behind)
            if task.drops[1]:
                _drop(task, place, n, j0 - place.k0, p)


@part
def _add_query_gradients(task, place, n0, rows, strip, first):
    once()
    scale = strip.dtype.type(task.scale)
    for i in range(rows):
        target = task.gq[n0 + i, place.column : place.column + place.size]
        source = strip[i * C_STRIDE : i * C_STRIDE + place.size]
        if first:
            _copy_scaled(target, source, scale)
        else:
            _add_scaled(target, source, scale)


@part
def _backward_strip(task, place, work, n0, rows, j0, j1, head):
    """Add what `rows` queries from n0 on give."""
    once()
    column, end = place.column, place.column + place.size
    pack_rows(work.q, task.q, n0, n0 + rows, column, end)
    pack_rows(work.g, task.go, n0, n0 + rows, column, end)
    _strip_gradients(task, place, work, n0, rows, j0, j1, head)
    keys, steps = _visible(place, n0 + rows - 1, j0, j1), work.steps
    strip = steps[2 * STRIP * C_STRIDE :]
    _by_features(task.tiles[0], rows, place, n0, j0, j1, work.s, work.k, strip, False)
    _add_query_gradients(task, place, n0, rows, strip, j0 == place.k0)
    queries, gradients = steps, steps[STRIP * C_STRIDE :]
    pack_steps(queries, STRIP, 0, task.q, column, end, n0, n0 + rows)
    pack_steps(gradients, STRIP, 0, task.go, column, end, n0, n0 + rows)
    _by_queries(task.tiles[1], rows, keys, place.size, queries, work.s, work.gk)
    _by_queries(task.tiles[1], rows, keys, place.size, gradients, work.p, work.gv)


@part
def _store_turned(target, column, j0, j1, size, c, spare, factor):
    """target[j, column + d] = factor c[d, j]."""
    once()
    transpose_block(spare, c, size, j1 - j0)
    for j in range(j1 - j0):
        _copy_scaled(target[j0 + j, column : column + size], spare[j * C_STRIDE : j * C_STRIDE + size], factor)


@part
def _backward_keys(task, place, work, j0, j1, head):
    """Everything that the keys j0 to j1 take part in."""
    once()
    kind = work.q.dtype.type
    column, end = place.key_column, place.key_column + place.size
    pack_across(work.kt, DEPTH, 0, plain(task.k), column, end, j0, j1, work.kt)
    pack_across(work.vt, DEPTH, 0, plain(task.v), column, end, j0, j1, work.vt)
    pack_columns(work.k, DEPTH, 0, plain(task.k), j0, j1, column, end)
    padded = _padded(j1 - j0, work.k)
    for d in range(place.size):
        _zero(work.gk[d * C_STRIDE : d * C_STRIDE + padded])
        _zero(work.gv[d * C_STRIDE : d * C_STRIDE + padded])
    for n in range(place.q0, place.q1, STRIP):
        rows = min(STRIP, place.q1 - n)
        if _visible(place, n + rows - 1, j0, j1):
            _backward_strip(task, place, work, n, rows, j0, j1, head)
        elif j0 == place.k0:
            for i in range(rows):
                _zero(task.gq[n + i, place.column : place.column + place.size])
    _store_turned(task.gk, place.column, j0, j1, place.size, work.gk, work.kt, kind(task.scale))
    _store_turned(task.gv, place.column, j0, j1, place.size, work.gv, work.kt, kind(1))


@part
def _backward_worker(task, worker, workers):
    scratch = task.scratch[worker]
    work = _Backward(
        scratch,
        scratch[SCORES:],
        scratch[2 * SCORES :],
        scratch[3 * SCORES :],
        scratch[PART : 2 * PART],
        scratch[2 * PART : 3 * PART],
        scratch[3 * PART : 4 * PART],
        scratch[4 * PART : 5 * PART],
        scratch[5 * PART : 6 * PART],
        scratch[6 * PART : 7 * PART],
    )
    while True:
        job = draw(task.counters, 0, task.jobs.shape[0], worker, workers)
        if job < 0:
            break
        place = _place(task, job)
        if place.k0 == place.k1:
            for n in range(place.q0, place.q1):
                _zero(task.gq[n, place.column : place.column + place.size])
        for j in range(place.k0, place.k1, DEPTH):
            _backward_keys(task, place, work, j, min(j + DEPTH, place.k1), task.jobs[job, 1])


_backward_entry = entry(_backward_worker)


@kernel
def attention_gradient(task, workers, board, helpers):
    """Work off an `AttentionGradientTask` in so many shares, with helpers that stand by at the board."""
    function, address = _backward_entry(task)
    launch(function, address, workers, board, helpers)
