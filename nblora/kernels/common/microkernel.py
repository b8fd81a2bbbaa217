"""The register tile: C[i, j] (+)= Σ_k A(i, k) B[k, j] for up to `TILE_ROWS` rows and one or two vectors of columns.

B is a panel of rows [k][2 vectors]. A comes in one of two formats, both rows of the matrix that it is or was packed
from, so nothing is transposed for it:

- "rows": A(i, k) at i·pitch + k; the inner dimension is contiguous in memory, and a matrix may be read where it lies;
- "steps": A(i, k) at k·TILE_ROWS + i; the outer dimension is contiguous in memory.

While it computes, the tile brings lines of two other arrays towards the level-2 cache, one line of each after every so
many steps: what is packed or updated next comes from memory in the time of the products. Without it a step at
64 x 768 x 768 spent as long waiting for W, D and V as multiplying.

C is a scratch block whose rows and columns are padded to whole tiles. Padding is computed and dropped, it is never an
operand of anything real. Each element of C is one chain of fused multiply-adds in the order of k whatever the tile's
height and width, so results do not depend on how rows and columns were dealt out.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import kernel
from .machine import TILE_ROWS, VECTOR_BITS

I8P, I32, I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
LINE = 64
"""Bytes of a cache line."""


class At(NamedTuple):
    """A place in a flat array."""

    array: object
    at: int


class Tile(NamedTuple):
    """What a register tile computes: its size, the pitch of C, of B and of A in rows, and whether C is added to."""

    depth: int
    stride: int
    accumulate: bool
    height: int
    vectors: int
    b_pitch: int
    a_pitch: int


class Ahead(NamedTuple):
    """What a tile fetches: rows of two arrays and a stream; the byte of a row to begin at, its bytes, the bytes from
    row to row, and the steps after which a line of each is fetched."""

    rows: At
    other: At
    stream: At
    first: int
    row_bytes: int
    pitch: int
    chunk: int


def vector_of(scalar) -> ir.VectorType:
    """The LLVM vector of the machine's length with elements of type `scalar`."""
    return ir.VectorType(scalar, VECTOR_BITS // (32 if isinstance(scalar, ir.FloatType) else 64))


def element_size(scalar) -> int:
    """Bytes of an LLVM floating-point type."""
    return 4 if isinstance(scalar, ir.FloatType) else 8


def fma_of(builder, vector):
    """The declaration of llvm.fma for a vector type."""
    name = f"llvm.fma.v{vector.count}f{8 * element_size(vector.element)}"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)


def splat(builder, value, vector):
    """A vector whose lanes all hold `value`."""
    empty = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def element_pointer(context, builder, array_type, array, at):
    """Pointer to element `at` of a one-dimensional contiguous array."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [at])


def operands_of(context, builder, kind, value):
    """The LLVM operands of an argument: of a tuple those of its fields in turn, of one with a place `at` pointers to
    that element of each of its arrays."""
    if isinstance(kind, types.BaseNamedTuple):
        fields = dict(zip(kind.fields, zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True), strict=True))
        place = fields.pop("at", None)
        for field, held in fields.values():
            if isinstance(field, types.Array):
                yield element_pointer(context, builder, field, held, place[1])
            else:
                yield from operands_of(context, builder, field, held)
    elif isinstance(kind, types.Boolean):
        yield cgutils.as_bool_bit(builder, value)
    else:
        yield value


def load_vector(builder, pointer, index, vector):
    """The vector that starts at element `index` (a Python or LLVM integer) of `pointer`."""
    index = ir.Constant(I64, index) if isinstance(index, int) else index
    address = builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())
    return builder.load(address, align=element_size(vector.element))


def store_vector(builder, value, pointer, index):
    """Store a vector from element `index` of `pointer` on."""
    index = ir.Constant(I64, index) if isinstance(index, int) else index
    address = builder.bitcast(builder.gep(pointer, [index]), value.type.as_pointer())
    builder.store(value, address, align=element_size(value.type.element))


def prefetch_line(builder, pointer):
    """Bring the line of an address towards the level-2 cache; addresses beyond an array do no harm."""
    kind = ir.FunctionType(ir.VoidType(), [I8P, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.bitcast(pointer, I8P), I32(0), I32(2), I32(1)])


def _phis(builder, kinds):
    return [builder.phi(kind) for kind in kinds]


def _incoming(phis, values, block):
    for phi, value in zip(phis, values, strict=True):
        phi.add_incoming(value, block)


def _emit_tile(builder, function, scalar, height, width, steps):
    """One height and width of the tile, from the builder's block to a `ret`.

    Two loops: over chunks of the depth, before each of which a line of both arrays ahead is fetched, and over the steps
    of a chunk.
    """
    a, b, c, depth, stride, accumulate = function.args[:6]
    b_pitch, a_pitch, ahead, other, stream, first, row_bytes, pitch, chunk = function.args[8:]
    vector = vector_of(scalar)
    lanes, zero, nothing = vector.count, ir.Constant(vector, [0.0] * vector.count), ir.Constant(I64, 0)
    fma = fma_of(builder, vector)
    together = min(height, TILE_ROWS if steps else 3)  # rows that one pointer reaches: a row, two rows further
    groups = range(0, height, together)
    a_row, a_step = (ir.Constant(I64, 1), TILE_ROWS) if steps else (a_pitch, 1)
    c_rows = [builder.gep(c, [builder.mul(stride, ir.Constant(I64, i))]) for i in range(height)]
    entry = builder.block
    outer, inner, latch, done = (function.append_basic_block() for _ in range(4))
    builder.cbranch(builder.icmp_signed(">", depth, nothing), outer, done)

    builder.position_at_end(outer)
    start, at, column, line, *begun = _phis(builder, [I64, I64, I64, I64, *[vector] * (height * width)])
    _incoming([start, at, column, line, *begun], [nothing, first, first, nothing, *[zero] * len(begun)], entry)
    for array, place in ((ahead, at), (other, at), (stream, line)):
        prefetch_line(builder, builder.gep(builder.bitcast(array, I8P), [place]))
    after = builder.add(start, chunk)
    stop = builder.select(builder.icmp_signed("<", after, depth), after, depth)
    a_start = builder.gep(a, [builder.mul(start, ir.Constant(I64, a_step))])
    places = [builder.gep(a_start, [builder.mul(a_row, ir.Constant(I64, i))]) for i in groups]
    places.append(builder.gep(b, [builder.mul(start, b_pitch)]))
    builder.branch(inner)

    builder.position_at_end(inner)
    k, *moving = _phis(builder, [I64, *[place.type for place in places]])
    sums = _phis(builder, [vector] * len(begun))
    _incoming([k, *moving, *sums], [start, *places, *begun], outer)
    b_k = moving[-1]
    columns = [load_vector(builder, b_k, j * lanes, vector) for j in range(width)]
    new = []
    for i in range(height):
        a_k, row = moving[i // together], ir.Constant(I64, i % together)
        element = builder.load(builder.gep(a_k, [builder.mul(a_row, row)]), align=element_size(scalar))
        row = splat(builder, element, vector)
        new += [builder.call(fma, [row, columns[j], sums[i * width + j]]) for j in range(width)]
    following = builder.add(k, ir.Constant(I64, 1))
    moved = [builder.gep(place, [ir.Constant(I64, a_step)]) for place in moving[:-1]] + [builder.gep(b_k, [b_pitch])]
    _incoming([k, *moving, *sums], [following, *moved, *new], inner)
    builder.cbranch(builder.icmp_signed("<", following, stop), inner, latch)

    builder.position_at_end(latch)
    step = ir.Constant(I64, LINE)
    next_column = builder.add(column, step)
    wraps = builder.icmp_signed(">=", next_column, row_bytes)
    next_at = builder.select(wraps, builder.add(builder.sub(at, column), pitch), builder.add(at, step))
    next_column = builder.select(wraps, nothing, next_column)
    _incoming(
        [start, at, column, line, *begun], [following, next_at, next_column, builder.add(line, step), *new], latch
    )
    builder.cbranch(builder.icmp_signed("<", following, depth), outer, done)

    builder.position_at_end(done)
    totals = _phis(builder, [vector] * len(new))
    _incoming(totals, [zero] * len(new), entry)
    _incoming(totals, new, latch)
    add, store = function.append_basic_block(), function.append_basic_block()
    builder.cbranch(accumulate, add, store)
    for block in (add, store):
        builder.position_at_end(block)
        for i, c_row in enumerate(c_rows):
            for j in range(width):
                total = totals[i * width + j]
                if block is add:
                    total = builder.fadd(load_vector(builder, c_row, j * lanes, vector), total)
                store_vector(builder, total, c_row, j * lanes)
        builder.ret_void()


def _tile_type(scalar):
    """The operands of `tile`, one after the other, as `operands_of` hands them over -> nothing."""
    pointer = scalar.as_pointer()
    operands = [pointer, pointer, pointer, I64, I64, ir.IntType(1), I64, I64, I64, I64]
    return ir.FunctionType(ir.VoidType(), [*operands, pointer, pointer, pointer, I64, I64, I64, I64])


def _tile_function(module, scalar, steps):
    """The LLVM function that holds every height and width of the tile for one format of A."""
    function = ir.Function(module, _tile_type(scalar), f"nblora_tile_{'steps' if steps else 'rows'}")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    height, width = function.args[6:8]
    default = function.append_basic_block()
    key = builder.add(builder.mul(width, ir.Constant(I64, TILE_ROWS + 1)), height)
    switch = builder.switch(key, default)
    ir.IRBuilder(default).ret_void()
    for h in range(1, TILE_ROWS + 1):
        for w in (1, 2):
            block = function.append_basic_block()
            switch.add_case(ir.Constant(I64, w * (TILE_ROWS + 1) + h), block)
            builder.position_at_end(block)
            _emit_tile(builder, function, scalar, h, w, steps)
    return function


def _tile_address(steps):
    def address(typing_context, array):
        def generate(context, builder, signature, args):
            scalar = context.get_value_type(array.dtype)
            return builder.ptrtoint(_tile_function(builder.module, scalar, steps), I64)

        return types.int64(array), generate

    return address


def _tile(typing_context, function, a, b, c, size, ahead):
    def generate(context, builder, signature, args):
        code = builder.inttoptr(args[0], _tile_type(context.get_value_type(c.types[0].dtype)).as_pointer())
        pairs = list(zip(signature.args, args, strict=True))[1:]
        builder.call(code, [each for pair in pairs for each in operands_of(context, builder, *pair)])
        return context.get_dummy_value()

    return types.void(types.int64, a, b, c, size, ahead), generate


def _lanes(typing_context, array):
    def generate(context, builder, signature, args):
        return context.get_constant(types.intp, vector_of(context.get_value_type(array.dtype)).count)

    return types.intp(array), generate


def _once(typing_context):
    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


once = intrinsic(_once)
"""once(): the machine code of the part that calls it is made once for all its callers, not again in each."""
lanes = intrinsic(_lanes)
"""lanes(array): elements of the array's dtype in one vector."""
tile = intrinsic(_tile)
"""tile(function, a, b, c, size, ahead): C (+)= A·B, with the address of one of `tile_functions`; a, b and c are `At`,
the others `Tile` and `Ahead`."""
_rows_address, _steps_address = intrinsic(_tile_address(False)), intrinsic(_tile_address(True))


@kernel
def tile_functions(array):
    """Return the addresses of the tiles for the array's dtype: A in rows, A in steps.

    Kernels are handed the addresses: as a callee the tile would be optimised again in each of them.
    """
    return _rows_address(array), _steps_address(array)
