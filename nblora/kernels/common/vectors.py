"""Vector moves that packing is made of, as intrinsics on flat arrays and offsets.

Row slices vectorise in Numba too, but a slice of one panel row, two vectors, spends more on its loop's checks than on
the copy.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .machine import GROUP
from .microkernel import (
    I32,
    I64,
    element_pointer,
    fma_of,
    load_vector,
    splat,
    store_vector,
    vector_of,
)


def _copy(vectors):
    def copy(typing_context, target, target_at, source, source_at):
        def generate(context, builder, signature, args):
            kinds = signature.args
            to = element_pointer(context, builder, kinds[0], args[0], args[1])
            origin = element_pointer(context, builder, kinds[2], args[2], args[3])
            vector = vector_of(to.type.pointee)
            for i in range(vectors):
                store_vector(builder, load_vector(builder, origin, i * vector.count, vector), to, i * vector.count)
            return context.get_dummy_value()

        return types.void(target, types.intp, source, types.intp), generate

    return copy


def _copy_group(typing_context, target, target_at, source, source_at):
    def generate(context, builder, signature, args):
        kinds = signature.args
        to = element_pointer(context, builder, kinds[0], args[0], args[1])
        origin = element_pointer(context, builder, kinds[2], args[2], args[3])
        vector = ir.VectorType(to.type.pointee, GROUP)
        store_vector(builder, load_vector(builder, origin, 0, vector), to, 0)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), generate


def _combine_pair(typing_context, target, target_at, weight, delta, at, scaling):
    def generate(context, builder, signature, args):
        kinds = signature.args
        to = element_pointer(context, builder, kinds[0], args[0], args[1])
        weight = element_pointer(context, builder, kinds[2], args[2], args[4])
        delta = element_pointer(context, builder, kinds[3], args[3], args[4])
        vector = vector_of(to.type.pointee)
        fma, factor = fma_of(builder, vector), splat(builder, args[5], vector)
        for lane in (0, vector.count):
            terms = [factor, load_vector(builder, delta, lane, vector), load_vector(builder, weight, lane, vector)]
            store_vector(builder, builder.call(fma, terms), to, lane)
        return context.get_dummy_value()

    return types.void(target, types.intp, weight, delta, types.intp, target.dtype), generate


def _swap_halves(builder, low, high, half):
    """One stage of a square transposition: exchange the off-diagonal blocks of `half` lanes of two rows."""
    count = low.type.count
    mask = ir.VectorType(I32, count)
    first = [lane + (count - half if lane & half else 0) for lane in range(count)]
    second = [lane + (count if lane & half else half) for lane in range(count)]
    return (
        builder.shuffle_vector(low, high, ir.Constant(mask, first)),
        builder.shuffle_vector(low, high, ir.Constant(mask, second)),
    )


def _transpose_square(typing_context, target, target_at, target_stride, source, source_at, source_stride):
    def generate(context, builder, signature, args):
        kinds = signature.args
        to = element_pointer(context, builder, kinds[0], args[0], args[1])
        origin = element_pointer(context, builder, kinds[3], args[3], args[4])
        vector = vector_of(to.type.pointee)
        numbers = [ir.Constant(I64, i) for i in range(vector.count)]
        rows = [load_vector(builder, origin, builder.mul(args[5], i), vector) for i in numbers]
        half = vector.count // 2
        while half:
            for i in range(vector.count):
                if not i & half:
                    rows[i], rows[i + half] = _swap_halves(builder, rows[i], rows[i + half], half)
            half //= 2
        for i, row in zip(numbers, rows, strict=True):
            store_vector(builder, row, to, builder.mul(args[2], i))
        return context.get_dummy_value()

    n = types.intp
    return types.void(target, n, n, source, n, n), generate


copy_vector, copy_pair = intrinsic(_copy(1)), intrinsic(_copy(2))
"""copy_vector and copy_pair(target, target_at, source, source_at): one vector and two."""
copy_group = intrinsic(_copy_group)
"""copy_group(target, target_at, source, source_at): `GROUP` elements."""
combine_pair = intrinsic(_combine_pair)
"""combine_pair(target, target_at, weight, delta, at, scaling): two vectors of W + c D."""
transpose_square = intrinsic(_transpose_square)
"""transpose_square(target, target_at, target_stride, source, source_at, source_stride): a square of `lanes`."""
