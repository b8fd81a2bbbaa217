"""Forward: z = x (W + c D) + s (mask∘x) A B + b, y = act(z), in one parallel region.

Workers draw jobs. First u = s (mask∘x) A is computed, then z by blocks, each by one worker from its first product to
its activation.
"""

from typing import NamedTuple

from nblora.kernels.common import elementwise
from nblora.kernels.common.atomics import draw, fetch_add, wait_for
from nblora.kernels.common.functions import activate_row
from nblora.kernels.common.jit import kernel, part
from nblora.kernels.common.rows import accumulate_row, scale_row
from nblora.kernels.common.threads import entry, launch

from .packing import Matrix, plain
from .products import Product, block_rows, depth_of, grid_of, job_at, multiply, multiply_block
from .work import scratch_work


class ForwardTask(NamedTuple):
    """Everything that a forward reads and writes; parts that are absent hold stand-ins of the same type."""

    x: object  # (N, in)
    x_low: object  # (N, in), mask∘x
    S: object  # stored weight
    D: object  # stored delta
    A: object  # (in, rank)
    B: object  # (rank, out)
    bias: object  # (out,)
    u: object  # (N, rank), written
    z: object  # (N, out), written; may be y
    y: object  # (N, out), written
    scratch: object  # (workers, PARTS·PART)
    packed: object  # (`packed_few_forward`,), of few samples
    tile_rows: int  # addresses of `tile_functions`
    tile_steps: int
    row_tiles: object  # addresses of `row_tiles`
    counters: object  # (3 + 4·workers,) int64 zeros: jobs done, by kind; jobs drawn, by kind and share
    s: float
    c: float
    activation: int
    transposed: bool
    has_base: bool
    has_delta: bool
    has_low_rank: bool
    has_bias: bool
    masked: bool


@part
def _product(task):
    """z without bias."""
    M = Matrix(task.S, task.D, task.y.dtype.type(task.c), task.has_delta)
    inner, rank = task.x.shape[1] if task.has_base else 0, task.A.shape[1] if task.has_low_rank else 0
    return Product(task.x, M, task.transposed, inner, task.u, task.B, False, rank, task.z)


@part
def _low_product(task):
    """u without its factor."""
    A = task.A
    return Product(task.x_low, plain(A), False, A.shape[0], task.x_low, A, False, 0, task.u)


@part
def _activate(task, n0, n1, o0, o1):
    """z += b and y = act(z) for n0 <= n < n1, o0 <= o < o1."""
    if not (task.has_bias or task.activation != elementwise.IDENTITY):
        return
    for n in range(n0, n1):
        z = task.z[n, o0:o1]
        if task.has_bias:
            accumulate_row(z, task.bias[o0:o1])
        if task.activation != elementwise.IDENTITY:
            activate_row(task.y[n, o0:o1], z, task.activation)


@part
def _job(task, product, job, depth, work):
    """A job's part of z and y."""
    total, rows = product.inner + product.rank, block_rows(product, depth)
    for k0 in range(0, total, depth):
        k1 = min(k0 + depth, total)
        for n0 in range(job.n0, job.n1, rows):
            n1 = min(n0 + rows, job.n1)
            multiply_block(work, product, job, n0, n1, k0, k1)
            if k1 == total:
                _activate(task, n0, n1, job.j0, job.j1)


@part
def forward_worker(task, worker, workers):
    """Draw jobs until none is left."""
    work = scratch_work(task.scratch[worker], task.tile_rows, task.tile_steps)
    if task.has_low_rank:
        low, s = _low_product(task), task.u.dtype.type(task.s)
        depth = depth_of(low)
        grid = grid_of(low, depth, workers)
        while True:
            index = draw(task.counters, 1, grid.jobs, worker, workers)
            if index < 0:
                break
            job = job_at(low, grid, index)
            multiply(work, low, job, depth)
            for n in range(job.n0, job.n1):
                u = task.u[n, job.j0 : job.j1]
                scale_row(u, u, s)
            fetch_add(task.counters, 0, 1)
        wait_for(task.counters, 0, grid.jobs)
    product = _product(task)
    depth = depth_of(product)
    grid = grid_of(product, depth, workers)
    while True:
        index = draw(task.counters, 1 + workers, grid.jobs, worker, workers)
        if index < 0:
            break
        _job(task, product, job_at(product, grid, index), depth, work)


_entry = entry(forward_worker)


@kernel
def forward(task, workers, board, helpers):
    """Work off a `ForwardTask` in so many shares, with helpers that stand by at the board."""
    function, address = _entry(task)
    launch(function, address, workers, board, helpers)
