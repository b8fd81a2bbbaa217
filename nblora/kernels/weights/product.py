"""Low-rank products of a merge: a few rows times a segment of columns, held in registers while the rank is summed.

Every element is one chain of fused multiply-adds from k = 0 upwards that starts at zero, whatever the rows and columns
it is computed with, so no result depends on how a matrix was dealt out.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nblora.kernels.common.jit import part

TILE_ROWS, TILE_BYTES = 4, 64
"""Rows of a tile, and bytes of its columns: one AVX-512 vector, two of AVX2 or four of NEON, for each of the rows.

Rank 16 in float32 took 0.29 ns an element with AVX-512 and 0.31 with AVX2, and 0.66 in a loop over rows that the
compiler vectorised: that one loads and stores every sum once for four products.
"""
GROUP = 2 * TILE_ROWS
"""Rows whose products are computed together: their segment of Q is read once from the level-2 cache."""
PADDING = TILE_BYTES // 4
"""Columns by which arrays that tiles walk are wider than what they hold."""


def _emit_fma(typing_context, a, b, c):
    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, a, a), generate


fma = intrinsic(_emit_fma)
"""a·b + c, rounded once on every machine; all of one float type."""


def _vector(scalar):
    """The LLVM vector of `TILE_BYTES` with elements of type `scalar`."""
    return ir.VectorType(scalar, TILE_BYTES // (4 if isinstance(scalar, ir.FloatType) else 8))


def _fma_of(builder, vector):
    name = f"llvm.fma.v{vector.count}f{8 * TILE_BYTES // vector.count}"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)


def _splat(builder, value, vector):
    """A vector whose lanes all hold `value`."""
    index = ir.IntType(32)
    empty = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(index, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(index, vector.count), [0] * vector.count))


def _emit_tile(context, builder, signature, arguments):
    def array(at):
        return context.make_array(signature.args[at])(context, builder, arguments[at])

    P, Q, row, total, column = array(0), array(1), arguments[2], array(3), arguments[4]
    (_, depth), (_, q_pitch), (_, t_pitch) = (cgutils.unpack_tuple(builder, each.shape) for each in (P, Q, total))
    vector = _vector(P.data.type.pointee)
    size, fma_vectors = TILE_BYTES // vector.count, _fma_of(builder, vector)

    def place(pointer, offset):
        return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())

    rows = [builder.add(row, ir.Constant(row.type, at)) for at in range(TILE_ROWS)]
    factors = [builder.gep(P.data, [builder.mul(each, depth)]) for each in rows]
    sums = [cgutils.alloca_once(builder, vector) for _ in rows]
    for each in sums:
        builder.store(ir.Constant(vector, [0.0] * vector.count), each)
    with cgutils.for_range(builder, depth) as loop:
        offset = builder.add(builder.mul(loop.index, q_pitch), column)
        q = builder.load(place(Q.data, offset), align=size)
        for factor, each in zip(factors, sums, strict=True):
            p = _splat(builder, builder.load(builder.gep(factor, [loop.index])), vector)
            builder.store(builder.call(fma_vectors, [p, q, builder.load(each)]), each)
    for each, at in zip(sums, rows, strict=True):
        offset = builder.add(builder.mul(at, t_pitch), column)
        builder.store(builder.load(each), place(total.data, offset), align=size)
    return context.get_dummy_value()


def _type_tile(typing_context, P, Q, row, total, column):
    return types.void(P, Q, types.intp, total, types.intp), _emit_tile


tile = intrinsic(_type_tile)
"""tile(P, Q, row, total, column): total = P Q in `TILE_ROWS` rows from `row` and `TILE_BYTES` of columns from `column`.

P (rows, K), Q (K, columns) and total (rows, columns) of one float type, C-contiguous, all of the tile inside them.
"""


@part
def low_rank_rows(P, top, count, packed, n, factors, total):
    """total[:count, :n] = P[top : top + count] Q.

    P float64 (rows, K); packed (K, ≥ n + PADDING), of Q; factors (GROUP, K), scratch; total (GROUP, ≥ n + PADDING),
    whose other elements are written too; packed, factors and total of the float type that is computed in.
    """
    for i in range(count):
        for k in range(P.shape[1]):
            factors[i, k] = P[top + i, k]
    for column in range(0, n, TILE_BYTES // total.itemsize):
        for row in range(0, count, TILE_ROWS):
            tile(factors, packed, row, total, column)


@part(fastmath={"nnan", "nsz"})
def largest(numbers):
    """The largest magnitude among numbers (n,)."""
    result = abs(numbers[0])
    for j in range(numbers.shape[0]):
        result = max(result, abs(numbers[j]))
    return result


@part
def pack_segment(Q, first, n, packed, peaks):
    """packed[:, :n] = Q[:, first : first + n] in the type of `packed`, and peaks[k] the largest magnitude of its row k.

    Q float64 (K, columns), packed (K, ≥ n), peaks float64 (K,). Rows of Q that lie a power of two apart share cache
    sets; packed they do not (0.51 against 0.75 ns an element).
    """
    for k in range(Q.shape[0]):
        row, column = packed[k, :n], Q[k, first : first + n]
        for j in range(n):
            row[j] = column[j]
        peaks[k] = largest(row)


@part
def sum_error(P, i, peaks):
    """What a float32 sum of K products may lose, in units of 2⁻²⁴: for products of one sign, and of random ones.

    P float64 (rows, K), of which row i; peaks float64 (K,), the largest magnitude that P[i, k] is multiplied by.
    """
    total, squares = 0.0, 0.0
    for k in range(P.shape[1]):
        product = abs(P[i, k]) * peaks[k]
        total += product
        squares += product * product
    return total + (1 + np.sqrt(P.shape[1]) / 4) * np.sqrt(squares)
