"""Forward of few samples: z = x (W + c D) + s (mask∘x) A B + b, y = act(z); see `few`.

Workers draw jobs, kind after kind: packing x; u = s (mask∘x) A; for Dense, sums down rows; blocks of z, each by one
worker from its bias to its activation.
"""

from .. import elementwise
from ..jit import kernel, part
from .atomics import draw, fetch_add, wait_for
from .few import (
    add_dots,
    add_partial_sums,
    add_sums,
    begin_panels,
    block_of,
    pack_samples,
    padded,
    span_of,
    sum_block,
    sum_jobs,
    unpack_panels,
)
from .functions import activate_row
from .products import PART, panel_width
from .rowtiles import DOT_ROWS, GROUP
from .threads import call, entry, launch

PACKED, LOW, SUMMED, DRAWN = range(4)
PACK = 512
"""Features of a job that packs."""


@part
def packed_few_forward(samples, inputs, outputs, rank, workers, array):
    """Elements that packing and sums take: x in groups and in panels, mask∘x and u in groups, z of every job."""
    sums = sum_jobs(inputs, workers) * padded(outputs, array)
    return samples * (3 * padded(inputs, array) + padded(rank, array) + sums)


@part
def _places(task):
    """Where x in panels, mask∘x in groups, u in groups and the sums begin; x in groups begins at 0."""
    N, inputs = task.x.shape
    size = padded(inputs, task.packed) * N
    return size, 2 * size if task.masked else 0, 3 * size, 3 * size + padded(task.u.shape[1], task.packed) * N


@part
def _pack(task, f0, f1):
    width, (panels, low, _, _) = panel_width(task.packed), _places(task)
    if task.transposed:
        pack_samples(task.packed, panels, width, task.x, f0, f1)
    if not task.transposed or (task.has_low_rank and not task.masked):
        pack_samples(task.packed, 0, GROUP, task.x, f0, f1)
    if task.has_low_rank and task.masked:
        pack_samples(task.packed, low, GROUP, task.x_low, f0, f1)


@part
def _low_job(task, n0, n1, Z, edge):
    """u[n0:n1] = s·x_low[n0:n1]·A, also in groups."""
    (N, rank), A, s, width = task.u.shape, task.A, task.y.dtype.type(task.s), panel_width(Z)
    _, low, at, _ = _places(task)
    block = Z.shape[0] // N // width * width
    for r0 in range(0, rank, block):
        r1 = min(r0 + block, rank)
        begin_panels(Z, N, r0, r1, task.bias, False)
        add_sums(
            task.row_tiles, A, A, s, False, 0, A.shape[0], r0, r1, task.packed, low, Z, n0, n1, N, edge, A, -1
        )  # fmt: skip
        for n in range(n0, n1):
            for r in range(r0, r1):
                value = s * Z[((r - r0) // width * N + n) * width + (r - r0) % width]
                task.u[n, r] = value
                task.packed[at + (r // GROUP * N + n) * GROUP + r % GROUP] = value
    for n in range(n0, n1):
        for r in range(rank, padded(rank, Z)):
            task.packed[at + (r // GROUP * N + n) * GROUP + r % GROUP] = 0


@part
def _sum_job(task, job, block, edge):
    """Dense: the part of x M that belongs to a block of rows of M."""
    (N, inputs), outputs = task.x.shape, task.y.shape[1]
    packed, p0 = task.packed, min(job * block, inputs)
    at = _places(task)[3] + job * padded(outputs, packed) * N
    begin_panels(packed[at:], N, 0, padded(outputs, packed), task.bias, False)
    span = span_of(N, packed)
    for q0 in range(0, outputs, span):
        q1 = min(q0 + span, outputs)
        add_sums(
            task.row_tiles, task.S, task.D, task.y.dtype.type(task.c), task.has_delta, p0, min(p0 + block, inputs),
            q0, q1, packed, 0, packed[at + q0 * N :], 0, N, N, edge, task.S, -1,
        )  # fmt: skip


@part
def _output_job(task, o0, o1, jobs, Z, edge):
    """z and y for a block of outputs."""
    N, inputs = task.x.shape
    S, B, c, tiles, packed = task.S, task.B, task.y.dtype.type(task.c), task.row_tiles, task.packed
    panels, _, u_at, sums_at = _places(task)
    begin_panels(Z, N, o0, o1, task.bias, task.has_bias)
    if task.transposed:
        span, width = span_of(N, Z), panel_width(Z)
        weight = S.reshape(-1)
        for q0 in range(0, inputs, span):
            for p in range(o0, o1, DOT_ROWS):
                at, following = (p - o0) // width * N * width + (p - o0) % width, (p + DOT_ROWS) * inputs + q0
                add_dots(
                    tiles, S, task.D, c, task.has_delta, p, min(DOT_ROWS, o1 - p), q0, min(q0 + span, inputs),
                    packed, panels, Z, at, N, edge, weight, following,
                )  # fmt: skip
    else:
        add_partial_sums(Z, packed, sums_at, padded(task.y.shape[1], packed) * N, jobs, o0, o1, N)
    if task.has_low_rank:
        add_sums(tiles, B, B, c, False, 0, B.shape[0], o0, o1, packed, u_at, Z, 0, N, N, edge, B, -1)
    unpack_panels(task.z, Z, o0, o1)
    if task.activation != elementwise.IDENTITY:
        for n in range(N):
            activate_row(task.y[n, o0:o1], task.z[n, o0:o1], task.activation)


@part
def few_forward_worker(task, worker, workers):
    """Draw jobs until none is left."""
    scratch = task.scratch[worker]
    Z, edge = scratch[7 * PART :], scratch[:PART]
    (N, inputs), outputs = task.x.shape, task.y.shape[1]
    packs = (inputs + PACK - 1) // PACK
    while True:
        job = draw(task.counters, DRAWN, packs, worker, workers)
        if job < 0:
            break
        _pack(task, job * PACK, min(job * PACK + PACK, padded(inputs, Z)))
        fetch_add(task.counters, PACKED, 1)
    wait_for(task.counters, PACKED, packs)
    piece = max((N + 2 * workers - 1) // (2 * workers), 8)
    lows = (N + piece - 1) // piece if task.has_low_rank else 0
    while True:
        job = draw(task.counters, DRAWN + workers, lows, worker, workers)
        if job < 0:
            break
        _low_job(task, job * piece, min(job * piece + piece, N), Z, edge)
        fetch_add(task.counters, LOW, 1)
    jobs = 0 if task.transposed else sum_jobs(inputs, workers)
    rows = sum_block(inputs, max(jobs, 1))
    while True:
        job = draw(task.counters, DRAWN + 2 * workers, jobs, worker, workers)
        if job < 0:
            break
        _sum_job(task, job, rows, edge)
        fetch_add(task.counters, SUMMED, 1)
    wait_for(task.counters, LOW, lows)
    wait_for(task.counters, SUMMED, jobs)
    block = block_of(outputs, N, workers, Z)
    while True:
        job = draw(task.counters, DRAWN + 3 * workers, (outputs + block - 1) // block, worker, workers)
        if job < 0:
            break
        _output_job(task, job * block, min(job * block + block, outputs), jobs, Z, edge)


_entry = entry(few_forward_worker)


@kernel
def few_forward(task, workers):
    """Run a `ForwardTask` of few samples with so many workers, in the calling thread where it is one."""
    function, address = _entry(task)
    if workers == 1:
        call(function, address, 0, 1)
    else:
        launch(function, address, workers)
