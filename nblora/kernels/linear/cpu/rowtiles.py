"""Register tiles that read the rows of W, D and V where they lie, for few samples.

With few samples a weight is used so seldom that packing it costs more than it saves. Here rows are read along memory,
once, W + c D is formed in registers, and the lines that come next are fetched meanwhile:

    sum_rows      Z[n, q] += Σ_p L[n, p] M[p, q]                     weights down the rows, `GROUP` rows at a time
    dot_rows      Z[n, p] += Σ_q M[p, q] R[n, q]                     rows against samples, `DOT_ROWS` rows at a time
    update_rows   G[p, q] = Σ_n L[n, p] R[n, q], used in registers   `GROUP` rows at a time

Samples are packed by features: feature f of sample n lies at (f // width·N + n)·width + f % width. Z and R have the
width of a panel, two vectors; L, whose elements are broadcast, has the width `GROUP`. So a block that begins at feature
f begins at f·N in either format. Widths that do not divide the features are filled with zeros.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nblora.kernels.common.jit import kernel
from nblora.kernels.common.machine import GROUP, REGISTERS
from nblora.kernels.common.microkernel import (
    I64,
    LINE,
    element_size,
    fma_of,
    load_vector,
    operands_of,
    prefetch_line,
    splat,
    store_vector,
    vector_of,
)

DOT_ROWS = 4
DOT_SAMPLES = 5 if REGISTERS == 32 else 2
"""Rows and samples whose products `dot_rows` adds up in registers."""
MOMENTUM, DESCEND, STORE = range(3)
"""What `update_rows` does with G: V = momentum·V + gain·G and D -= lr·V; V += gain·G; V = gain·G."""


class Rows(NamedTuple):
    """Rows of two flat arrays, W and D or V and D, from one element on, `pitch` elements apart."""

    array: object
    other: object
    at: int
    pitch: int


class RowsAhead(NamedTuple):
    """Rows of one flat array to be fetched."""

    array: object
    at: int
    pitch: int


class PairAhead(NamedTuple):
    """Rows of two flat arrays to be fetched, at the pitch of those that are computed with."""

    array: object
    other: object
    at: int


class Counts(NamedTuple):
    """How far a tile goes: samples, panels of a row, and where it has them groups of rows."""

    samples: int
    panels: int
    groups: int


class Rule(NamedTuple):
    """V = momentum·V + gain·G and D -= lr·V, or as much of it as the kind of update asks for."""

    momentum: object
    gain: object
    lr: object


def _number(value):
    return ir.Constant(I64, value)


def _at(builder, pointer, index, step):
    return builder.gep(pointer, [builder.mul(index, _number(step))])


def _rows(builder, pointer, pitch, count):
    return [_at(builder, pointer, pitch, r) for r in range(count)]


def _loop(builder, count, values, body):
    """Emit values = body(k, values) for 0 <= k < count, and return the last values."""
    function, entry = builder.function, builder.block
    loop, done = function.append_basic_block(), function.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", count, _number(0)), loop, done)
    builder.position_at_end(loop)
    index, *held = phis = [builder.phi(kind) for kind in (I64, *(value.type for value in values))]
    new = body(index, held)
    following, end = builder.add(index, _number(1)), builder.block
    for phi, first, later in zip(phis, (_number(0), *values), (following, *new), strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(later, end)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)
    results = [builder.phi(value.type) for value in values]
    for result, first, later in zip(results, values, new, strict=True):
        result.add_incoming(first, entry)
        result.add_incoming(later, end)
    return results


class _Emitter:
    """Emits one tile of a dtype: what its three bodies share."""

    def __init__(self, builder, scalar):
        self.builder, self.scalar = builder, scalar
        self.vector = vector_of(scalar)
        self.lanes = self.vector.count
        self.width = 2 * self.lanes
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)
        self._fma = fma_of(builder, self.vector)

    def fma(self, a, b, c):
        return self.builder.call(self._fma, [a, b, c])

    def splat(self, value):
        return splat(self.builder, value, self.vector)

    def element(self, pointer, index):
        """One element in all lanes."""
        return self.splat(self.builder.load(self.builder.gep(pointer, [_number(index)])))

    def load(self, pointer, half):
        return load_vector(self.builder, pointer, half * self.lanes, self.vector)

    def store(self, value, pointer, half):
        store_vector(self.builder, value, pointer, half * self.lanes)

    def pair(self, pointer):
        return [self.load(pointer, half) for half in (0, 1)]

    def panel(self, pointer, index):
        return _at(self.builder, pointer, index, self.width)

    def fetch(self, pointer):
        """Bring the lines of a panel of one row towards the level-2 cache."""
        for start in range(0, self.width * element_size(self.scalar), LINE):
            prefetch_line(self.builder, self.builder.gep(pointer, [_number(start // element_size(self.scalar))]))

    def sum_rows(self, variant, operands):
        (height, combined), (W, D, pitch, c, L, Z, samples, panels, groups, ahead, other) = variant, operands
        builder, factor = self.builder, self.splat(c)

        def group(g, _):
            start = builder.mul(builder.mul(g, pitch), _number(height))
            tops = [builder.gep(pointer, [start]) for pointer in (W, D, ahead, other)]
            Ws, Ds, *fetched = (_rows(builder, top, pitch, height) for top in tops)
            weights = _at(builder, L, builder.mul(g, samples), GROUP)

            def panel(j, _):
                rows = [self.pair(self.panel(row, j)) for row in Ws]
                if combined:
                    deltas = (self.pair(self.panel(row, j)) for row in Ds)
                    rows = [
                        [self.fma(factor, d, w) for d, w in zip(*pairs, strict=True)]
                        for pairs in zip(deltas, rows, strict=True)
                    ]
                for row in (row for array in fetched for row in array):
                    self.fetch(self.panel(row, j))
                first = self.panel(Z, builder.mul(j, samples))

                def sample(n, _):
                    target, weight = self.panel(first, n), _at(builder, weights, n, GROUP)
                    sums = self.pair(target)
                    for r, row in enumerate(rows):
                        element = self.element(weight, r)
                        sums = [self.fma(element, half, total) for half, total in zip(row, sums, strict=True)]
                    for half, total in enumerate(sums):
                        self.store(total, target, half)
                    return []

                return _loop(builder, samples, [], sample)

            return _loop(builder, panels, [], panel)

        _loop(builder, groups, [], group)
        builder.ret_void()

    def dot_rows(self, variant, operands):
        (height, count, combined), (W, D, pitch, c, R, Z, samples, panels, _, ahead, ahead_pitch) = variant, operands
        builder, factor = self.builder, self.splat(c)
        Ws, Ds = (_rows(builder, pointer, pitch, height) for pointer in (W, D))
        fetched = _rows(builder, ahead, ahead_pitch, height)

        def panel(j, sums):
            sums, first = list(sums), self.panel(R, builder.mul(j, samples))
            for row in fetched:
                self.fetch(self.panel(row, j))
            for half in (0, 1):
                rows = [self.load(self.panel(row, j), half) for row in Ws]
                if combined:
                    deltas = (self.load(self.panel(row, j), half) for row in Ds)
                    rows = [self.fma(factor, d, w) for d, w in zip(deltas, rows, strict=True)]
                for n in range(count):
                    sample = self.load(self.panel(first, _number(n)), half)
                    for r, row in enumerate(rows):
                        sums[n * height + r] = self.fma(row, sample, sums[n * height + r])
            return sums

        sums = _loop(builder, panels, [self.zero] * (height * count), panel)
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f{8 * element_size(self.scalar)}"
        kind = ir.FunctionType(self.scalar, [self.scalar, self.vector])
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        for n in range(count):
            for r in range(height):
                target = builder.gep(Z, [_number(n * self.width + r)])
                total = [builder.load(target), sums[n * height + r]]
                builder.store(builder.call(reduce, total, fastmath=("reassoc",)), target)
        builder.ret_void()

    def update_rows(self, variant, operands):
        (height, kind), (V, D, pitch, L, R, samples, panels, _, momentum, gain, lr, ahead, other) = variant, operands
        builder = self.builder
        keep, gain, back = self.splat(momentum), self.splat(gain), self.splat(builder.fneg(lr))
        Vs, Ds, *fetched = (_rows(builder, pointer, pitch, height) for pointer in (V, D, ahead, other))

        def use(row, delta, half, gradient):
            if kind == STORE:
                self.store(builder.fmul(gain, gradient), row, half)
            elif kind == DESCEND:
                self.store(self.fma(gain, gradient, self.load(row, half)), row, half)
            else:
                velocity = self.fma(keep, self.load(row, half), builder.fmul(gain, gradient))
                self.store(velocity, row, half)
                self.store(self.fma(back, velocity, self.load(delta, half)), delta, half)

        def panel(j, _):
            for row in (row for array in fetched for row in array):
                self.fetch(self.panel(row, j))
            first = self.panel(R, builder.mul(j, samples))

            def sample(n, sums):
                pair, weight = self.pair(self.panel(first, n)), _at(builder, L, n, GROUP)
                new = []
                for r in range(height):
                    element = self.element(weight, r)
                    new += [self.fma(element, half, sums[2 * r + i]) for i, half in enumerate(pair)]
                return new

            gradient = _loop(builder, samples, [self.zero] * (2 * height), sample)
            for r in range(height):
                for half in (0, 1):
                    use(self.panel(Vs[r], j), self.panel(Ds[r], j), half, gradient[2 * r + half])
            return []

        _loop(builder, panels, [], panel)
        builder.ret_void()


_HEIGHTS = (1, GROUP)
_SUMS = [(height, combined) for height in _HEIGHTS for combined in (False, True)]
_DOTS = [
    (height, count, combined)
    for height in (1, DOT_ROWS)
    for count in range(1, DOT_SAMPLES + 1)
    for combined in (False, True)
]
_UPDATES = [(height, kind) for height in _HEIGHTS for kind in (MOMENTUM, DESCEND, STORE)]
_TILES = {"sum_rows": _SUMS, "dot_rows": _DOTS, "update_rows": _UPDATES}


def _operand_kinds(name, scalar):
    """The LLVM types of a tile's operands."""
    p = scalar.as_pointer()
    return {
        "sum_rows": [p, p, I64, scalar, p, p, I64, I64, I64, p, p],
        "dot_rows": [p, p, I64, scalar, p, p, I64, I64, I64, p, I64],
        "update_rows": [p, p, I64, p, p, I64, I64, I64, scalar, scalar, scalar, p, p],
    }[name]


def _tile_function(module, name, scalar):
    """The LLVM function (number of a variant, operands) that holds all variants of a tile."""
    kind = ir.FunctionType(ir.VoidType(), [I64, *_operand_kinds(name, scalar)])
    function = ir.Function(module, kind, f"nblora_{name}")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    default = function.append_basic_block()
    switch = builder.switch(function.args[0], default)
    ir.IRBuilder(default).ret_void()
    for number, variant in enumerate(_TILES[name]):
        block = function.append_basic_block()
        switch.add_case(_number(number), block)
        builder.position_at_end(block)
        getattr(_Emitter(builder, scalar), name)(variant, function.args[1:])
    return function


def _address(name):
    def address(typing_context, array):
        def generate(context, builder, signature, args):
            function = _tile_function(builder.module, name, context.get_value_type(array.dtype))
            return builder.ptrtoint(function, I64)

        return types.int64(array), generate

    return intrinsic(address)


def _generator(name, scalar):
    """Code that calls a tile at an address."""

    def generate(context, builder, signature, args):
        pairs = list(zip(signature.args, args, strict=True))[2:]
        operands = [each for pair in pairs for each in operands_of(context, builder, *pair)]
        kind = ir.FunctionType(ir.VoidType(), [I64, *_operand_kinds(name, context.get_value_type(scalar))])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], *operands])
        return context.get_dummy_value()

    return generate


def _sum_rows(typing_context, tile, variant, rows, c, L, Z, counts, ahead):
    scalar = rows.types[0].dtype
    return types.void(types.int64, types.int64, rows, scalar, L, Z, counts, ahead), _generator("sum_rows", scalar)


def _dot_rows(typing_context, tile, variant, rows, c, R, Z, counts, ahead):
    scalar = rows.types[0].dtype
    return types.void(types.int64, types.int64, rows, scalar, R, Z, counts, ahead), _generator("dot_rows", scalar)


def _update_rows(typing_context, tile, variant, rows, L, R, counts, rule, ahead):
    scalar = rows.types[0].dtype
    return types.void(types.int64, types.int64, rows, L, R, counts, rule, ahead), _generator("update_rows", scalar)


sum_rows, dot_rows, update_rows = intrinsic(_sum_rows), intrinsic(_dot_rows), intrinsic(_update_rows)
_sum_address, _dot_address, _update_address = (_address(name) for name in _TILES)


@kernel
def row_tiles(array):
    """Return the addresses of the three tiles for the array's dtype."""
    return _sum_address(array), _dot_address(array), _update_address(array)
