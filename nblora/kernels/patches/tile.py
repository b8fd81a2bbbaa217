"""A register tile whose B is read where it lies: C[i, j] (+)= Σ_k A(i, k) B[table[k] + j].

A is in "steps", as in `microkernel`; `table` says where the row of B that belongs to step k begins. So a convolution
reads its images shifted by each element of the kernel in turn, and never writes patches.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nblora.kernels.common.jit import kernel
from nblora.kernels.common.machine import TILE_ROWS
from nblora.kernels.common.microkernel import (
    I64,
    element_size,
    fma_of,
    load_vector,
    operands_of,
    splat,
    store_vector,
    vector_of,
)


class Size(NamedTuple):
    """What a tile computes: its depth, the pitch of C, whether C is added to, its rows and vectors of columns."""

    depth: int
    stride: int
    accumulate: bool
    height: int
    vectors: int


def _emit(builder, function, scalar, height, width):
    """One height and width, from the builder's block to a `ret`."""
    a, b, table, c, depth, stride, accumulate = function.args[:7]
    vector = vector_of(scalar)
    lanes, zero, one = vector.count, ir.Constant(vector, [0.0] * vector.count), ir.Constant(I64, 1)
    fma = fma_of(builder, vector)
    c_rows = [builder.gep(c, [builder.mul(stride, ir.Constant(I64, i))]) for i in range(height)]
    loop, add, store = (function.append_basic_block() for _ in range(3))
    entry = builder.block
    builder.branch(loop)

    builder.position_at_end(loop)
    k, *sums = [builder.phi(kind) for kind in [I64, *[vector] * (height * width)]]
    b_k = builder.gep(b, [builder.load(builder.gep(table, [k]))])
    a_k = builder.gep(a, [builder.mul(k, ir.Constant(I64, TILE_ROWS))])
    columns = [load_vector(builder, b_k, j * lanes, vector) for j in range(width)]
    new = []
    for i in range(height):
        element = builder.load(builder.gep(a_k, [ir.Constant(I64, i)]), align=element_size(scalar))
        row = splat(builder, element, vector)
        new += [builder.call(fma, [row, columns[j], sums[i * width + j]]) for j in range(width)]
    following = builder.add(k, one)
    for phi, first, later in zip([k, *sums], [ir.Constant(I64, 0), *[zero] * len(new)], [following, *new], strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(later, loop)
    out = function.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, out)

    builder.position_at_end(out)
    builder.cbranch(accumulate, add, store)
    for block in (add, store):
        builder.position_at_end(block)
        for i, c_row in enumerate(c_rows):
            for j in range(width):
                total = new[i * width + j]
                if block is add:
                    total = builder.fadd(load_vector(builder, c_row, j * lanes, vector), total)
                store_vector(builder, total, c_row, j * lanes)
        builder.ret_void()


def _tile_type(scalar):
    """The operands of `shifted_tile`, one after the other, as `operands_of` hands them over -> nothing."""
    pointer = scalar.as_pointer()
    sizes = [I64, I64, ir.IntType(1), I64, I64]
    return ir.FunctionType(ir.VoidType(), [pointer, pointer, I64.as_pointer(), pointer, *sizes])


def _function(module, scalar):
    """The LLVM function that holds every height and width of the tile."""
    function = ir.Function(module, _tile_type(scalar), "nblora_shifted_tile")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    height, width = function.args[7:9]
    default = function.append_basic_block()
    switch = builder.switch(builder.add(builder.mul(width, ir.Constant(I64, TILE_ROWS + 1)), height), default)
    ir.IRBuilder(default).ret_void()
    for h in range(1, TILE_ROWS + 1):
        for w in (1, 2):
            block = function.append_basic_block()
            switch.add_case(ir.Constant(I64, w * (TILE_ROWS + 1) + h), block)
            builder.position_at_end(block)
            _emit(builder, function, scalar, h, w)
    return function


def _address(typing_context, array):
    def generate(context, builder, signature, args):
        scalar = context.get_value_type(array.dtype)
        return builder.ptrtoint(_function(builder.module, scalar), I64)

    return types.int64(array), generate


def _tile(typing_context, function, a, b, table, c, size):
    def generate(context, builder, signature, args):
        code = builder.inttoptr(args[0], _tile_type(context.get_value_type(c.types[0].dtype)).as_pointer())
        pairs = list(zip(signature.args, args, strict=True))[1:]
        builder.call(code, [each for pair in pairs for each in operands_of(context, builder, *pair)])
        return context.get_dummy_value()

    return types.void(types.int64, a, b, table, c, size), generate


shifted_tile = intrinsic(_tile)
"""shifted_tile(function, a, b, table, c, size): with the address of `shifted_tile_function`; a, b, table and c are
`At`, the last is a `Size`."""
_shifted_address = intrinsic(_address)


@kernel
def shifted_tile_function(array):
    """Return the address of the tile for the array's dtype."""
    return _shifted_address(array)
