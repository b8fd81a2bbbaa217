"""z = x (W + c D) + low B + b and y = act(z): one kernel, `low` = s (mask∘x) A coming from `gradients.product`."""

import functools

from nblora.kernels.common.cuda.intrinsics import add_scaled, load, part, store, zeros
from nblora.kernels.common.cuda.rules import rules
from nblora.kernels.common.cuda.target import COMPILED, cuda, int32, int64, kernel

from .tiles import Tile, accumulator, geometry

# What a launch says in `flags`: which arrays may be read in aligned vectors, and which parts there are.
X, WEIGHT, LOW, FACTOR, OUT, HAS_BASE, HAS_LOW, KEEP = (1 << bit for bit in range(8))


@functools.cache
def forward(tile: Tile, transposed: bool, delta: bool):
    """Kernel: y = act(x (W + c D) + low B + b), W and D combined on their way into shared memory.

    x (N, in); weight, delta (in, out), or (out, in) where `transposed`; low (N, rank); B (rank, out); bias (out,);
    z, y (N, out). Grid (⌈N / rows⌉, ⌈out / columns⌉, splits). With more than one split each sums `chunk` of `in` and
    writes its sums to y (splits·N, out), which `update.finish` adds up.
    """
    LANES, PARTS, SUMS, SHARED = tile.lanes, tile.sums // tile.lanes, tile.sums, tile.shared_elements
    ROWS, COLUMNS, TYPE = tile.rows, tile.columns, tile.type
    ZERO, ONE = TYPE(0), TYPE(1)
    dense = accumulator(tile, True, transposed, None, "delta" if delta else None)
    low_rank = accumulator(tile, True, False)
    _, where = geometry(tile)
    activate = rules(tile.dtype).activate_lanes[LANES]

    @kernel(tile.threads, tile.blocks)
    def forward(x, weight, delta, factor, low, B, bias, code, flags, chunk, z, y):
        if not COMPILED:
            shared = cuda.shared.array(SHARED, TYPE)
        else:
            shared = cuda.shared.array(SHARED, TYPE, alignment=16)
        n0, o0 = int32(cuda.blockIdx.x) * ROWS, int32(cuda.blockIdx.y) * COLUMNS
        split = int32(cuda.blockIdx.z)
        N, inner, out = int32(x.shape[0]), int32(x.shape[1]), int32(bias.shape[0])
        sums = zeros(SUMS, ZERO)
        rank = int32(low.shape[1]) if flags & HAS_LOW and split == 0 else int32(0)
        sums = low_rank(
            sums, shared, low, low, flags & LOW, B, B, flags & FACTOR, factor, N, out, rank, 0, rank, n0, o0
        )
        begin = split * chunk
        end = min(begin + chunk, inner) if flags & HAS_BASE else begin
        sums = dense(
            sums, shared, x, x, flags & X, weight, delta, flags & WEIGHT, factor, N, out, inner, begin, end, n0, o0
        )
        t = int32(cuda.threadIdx.x)
        for index in range(PARTS):
            row, column = where(int32(index), t)
            n, o = n0 + row, o0 + column
            valid = out - o if n < N else int32(0)
            values = part(sums, int32(index), LANES)
            if cuda.gridDim.z > 1:
                store(y, (int64(split) * N + n) * out + o, valid, flags & OUT, values)
            else:
                offset = int64(n) * out + o
                values = add_scaled(values, load(bias, int64(o), valid, 0, LANES), ONE)
                if flags & KEEP:
                    store(z, offset, valid, flags & OUT, values)
                store(y, offset, valid, flags & OUT, activate(values, code))

    return forward
