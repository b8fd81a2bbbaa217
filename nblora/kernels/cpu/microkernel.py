"""The register tile: C[i, j] (+)= Σ_k A(i, k) B[k, j] for up to `TILE_ROWS` rows and one or two vectors of columns.

B is a panel of rows [k][2 vectors]. A comes in one of two formats, both straight copies of rows of the matrix that it
was packed from, so nothing is transposed for it:

- "rows": A(i, k) at i·ROW_STRIDE + k; the inner dimension is contiguous in memory;
- "steps": A(i, k) at k·TILE_ROWS + i; the outer dimension is contiguous in memory.

C is a scratch block whose rows and columns are padded to whole tiles. Padding is computed and dropped, it is never an
operand of anything real. Each element of C is one chain of fused multiply-adds in the order of k whatever the tile's
height and width, so results do not depend on how rows and columns were dealt out.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..jit import JIT_DISABLED, kernel
from .machine import ROW_STRIDE, TILE_ROWS, VECTOR_BITS

I8P, I32, I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)


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


def _emit_tile(builder, function, scalar, height, width, steps):
    """One height and width of the tile, from the builder's block to a `ret`."""
    a, b, c, depth, stride, accumulate = function.args[:6]
    vector = vector_of(scalar)
    lanes, zero = vector.count, ir.Constant(vector, [0.0] * vector.count)
    fma = fma_of(builder, vector)
    a_row, a_step = (1, TILE_ROWS) if steps else (ROW_STRIDE, 1)
    entry = builder.block
    loop, done = function.append_basic_block(), function.append_basic_block()
    builder.cbranch(builder.icmp_signed(">", depth, ir.Constant(I64, 0)), loop, done)

    builder.position_at_end(loop)
    k = builder.phi(I64)
    sums = [builder.phi(vector) for _ in range(height * width)]
    a_k = builder.gep(a, [builder.mul(k, ir.Constant(I64, a_step))])
    b_k = builder.gep(b, [builder.mul(k, ir.Constant(I64, 2 * lanes))])
    columns = [load_vector(builder, b_k, j * lanes, vector) for j in range(width)]
    new = []
    for i in range(height):
        element = builder.load(builder.gep(a_k, [ir.Constant(I64, i * a_row)]), align=element_size(scalar))
        row = splat(builder, element, vector)
        new += [builder.call(fma, [row, columns[j], sums[i * width + j]]) for j in range(width)]
    following = builder.add(k, ir.Constant(I64, 1))
    firsts, nexts = [ir.Constant(I64, 0), *[zero] * len(sums)], [following, *new]
    for phi, first, value in zip([k, *sums], firsts, nexts, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

    builder.position_at_end(done)
    totals = [builder.phi(vector) for _ in new]
    for phi, value in zip(totals, new, strict=True):
        phi.add_incoming(zero, entry)
        phi.add_incoming(value, loop)
    add, store = function.append_basic_block(), function.append_basic_block()
    builder.cbranch(accumulate, add, store)
    for block in (add, store):
        builder.position_at_end(block)
        for i in range(height):
            c_row = builder.gep(c, [builder.mul(stride, ir.Constant(I64, i))])
            for j in range(width):
                total = totals[i * width + j]
                if block is add:
                    total = builder.fadd(load_vector(builder, c_row, j * lanes, vector), total)
                store_vector(builder, total, c_row, j * lanes)
        builder.ret_void()


def _tile_type(scalar):
    """(A, B, C, depth, stride of C, accumulate, height, width) -> nothing."""
    pointer = scalar.as_pointer()
    return ir.FunctionType(ir.VoidType(), [pointer, pointer, pointer, I64, I64, ir.IntType(1), I64, I64])


def _tile_function(module, scalar, steps):
    """The LLVM function that holds every height and width of the tile for one format of A."""
    function = ir.Function(module, _tile_type(scalar), f"nblora_tile_{'steps' if steps else 'rows'}")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    height, width = function.args[6:]
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


def _tile_twin(steps):
    def tile(depth, height, width, a, a_at, b, b_at, c, c_at, stride, accumulate):
        columns = width * lanes(c)
        panel = b[b_at : b_at + depth * 2 * lanes(c)].reshape(depth, 2 * lanes(c))[:, :columns]
        for i in range(height):
            row = a[a_at + i :: TILE_ROWS][:depth] if steps else a[a_at + i * ROW_STRIDE :][:depth]
            target = c[c_at + i * stride : c_at + i * stride + columns]
            target[:] = (target if accumulate else 0) + np.dot(row, panel)

    return tile


def _tile(typing_context, function, depth, height, width, a, a_at, b, b_at, c, c_at, stride, accumulate):
    n = types.int64
    signature = types.void(n, n, n, n, a, n, b, n, c, n, n, types.boolean)

    def generate(context, builder, signature, args):
        function, depth, height, width, a, a_at, b, b_at, c, c_at, stride, accumulate = args
        kinds = signature.args
        pointers = [
            element_pointer(context, builder, kind, array, at)
            for kind, array, at in ((kinds[4], a, a_at), (kinds[6], b, b_at), (kinds[8], c, c_at))
        ]
        code = builder.inttoptr(function, _tile_type(context.get_value_type(c_type.dtype)).as_pointer())
        flag = builder.icmp_unsigned("!=", accumulate, accumulate.type(0))
        builder.call(code, [*pointers, depth, stride, flag, height, width])
        return context.get_dummy_value()

    c_type = c
    return signature, generate


def _run_twin(function, *arguments):
    function(*arguments)


def _lanes(typing_context, array):
    def generate(context, builder, signature, args):
        return context.get_constant(types.intp, vector_of(context.get_value_type(array.dtype)).count)

    return types.intp(array), generate


def _lanes_twin(array):
    return VECTOR_BITS // (8 * array.itemsize)


if JIT_DISABLED:
    lanes, tile = _lanes_twin, _run_twin

    def tile_functions(array):
        """Return the two twins."""
        return _tile_twin(False), _tile_twin(True)
else:
    lanes = intrinsic(_lanes)
    """lanes(array): elements of the array's dtype in one vector."""
    tile = intrinsic(_tile)
    """tile(function, depth, height, width, a, a_at, b, b_at, c, c_at, stride, accumulate)."""
    _rows_address, _steps_address = intrinsic(_tile_address(False)), intrinsic(_tile_address(True))

    @kernel
    def tile_functions(array):
        """Return the addresses of the tiles for the array's dtype: A in rows, A in steps.

        Kernels are handed the addresses: as a callee the tile would be optimised again in each of them.
        """
        return _rows_address(array), _steps_address(array)
