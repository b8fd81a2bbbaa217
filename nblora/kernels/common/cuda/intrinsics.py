"""Building blocks below the level of Python: vectors, register tiles kept in tuples, tensor cores.

A tuple of values is what LLVM keeps in registers on every architecture; a local array is not (on compute capability
8.0 and 9.0 an 8 x 8 one goes to memory). Without a compiler the same names are the plain functions of `simulated`.
Arrays are taken as memory: C-contiguous, whatever their number of dimensions, `offset` counting elements.
uint16 arrays hold bfloat16 values and are read as float32.
"""

from .target import COMPILED

if not COMPILED:
    from .simulated import (
        above,
        add_scaled,
        exp2,
        kept,
        lane_maxima,
        lane_sums,
        load,
        load_shared,
        maximum,
        memory,
        mixed,
        multiply,
        outer_accumulate,
        part,
        repeated,
        scale,
        shifted,
        store,
        store_shared,
        stretched,
        tensor_accumulate,
        to_tf32,
        turned,
        with_part,
        within,
        zeros,
    )
else:
    from llvmlite import ir
    from numba.core.errors import TypingError
    from numba.cuda import cgutils, types
    from numba.cuda.extending import intrinsic

    from nblora.kernels.common.mixing import FIRST_MIX, SECOND_MIX

    from .simulated import mma_wiring

    I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

    def _llvm(dtype):
        return F32 if dtype == types.float32 else ir.DoubleType()

    def _element(array):
        return types.float32 if array.dtype == types.uint16 else array.dtype

    def _pointer(context, builder, array_type, array, offset_type, offset):
        data = context.make_array(array_type)(context, builder, array).data
        if offset_type.bitwidth < 64:
            offset = builder.sext(offset, I64)
        return builder.gep(data, [offset])

    def _unpack(builder, values, count):
        return [builder.extract_value(values, lane) for lane in range(count)]

    def _widen(builder, array_type, value):
        """A loaded scalar or vector as what kernels compute with."""
        if array_type.dtype != types.uint16:
            return value
        vector = isinstance(value.type, ir.VectorType)
        wide, real = (ir.VectorType(t, value.type.count) if vector else t for t in (I32, F32))
        sixteen = ir.Constant(wide, [16] * value.type.count if vector else 16)
        return builder.bitcast(builder.shl(builder.zext(value, wide), sixteen), real)

    def _load_vector(builder, array_type, pointer, lanes):
        vector = ir.VectorType(pointer.type.pointee, lanes)
        size = array_type.dtype.bitwidth // 8 * lanes
        whole = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=size)
        whole = _widen(builder, array_type, whole)
        return [builder.extract_element(whole, I32(lane)) for lane in range(lanes)]

    def _store_vector(builder, pointer, values, size):
        vector = ir.VectorType(values[0].type, len(values))
        whole = ir.Constant(vector, ir.Undefined)
        for lane, value in enumerate(values):
            whole = builder.insert_element(whole, value, I32(lane))
        builder.store(whole, builder.bitcast(pointer, vector.as_pointer()), align=size)

    def _whole(builder, valid, aligned, lanes):
        """Whether one aligned vector will do."""
        flag = builder.icmp_signed("!=", aligned, aligned.type(0))
        return builder.and_(flag, builder.icmp_signed(">=", valid, valid.type(lanes)))

    @intrinsic
    def memory(typingctx, address, count, zero):
        """`count` elements from an address, as a vector; `zero` tells their type."""
        result = types.Array(zero, 1, "C")

        def generate(context, builder, signature, args):
            held = context.make_array(result)(context, builder)
            held.data = builder.inttoptr(args[0], held.data.type)
            size = ir.Constant(I64, zero.bitwidth // 8)
            held.nitems, held.itemsize = args[1], size
            held.shape = builder.insert_value(ir.Constant(ir.ArrayType(I64, 1), ir.Undefined), args[1], 0)
            held.strides = builder.insert_value(ir.Constant(ir.ArrayType(I64, 1), ir.Undefined), size, 0)
            return held._getvalue()

        return result(types.int64, types.int64, zero), generate

    @intrinsic
    def load(typingctx, array, offset, valid, aligned, lanes):
        """`lanes` elements from `offset`, those from `valid` on replaced by zero; one vector where `aligned`."""
        if not isinstance(lanes, types.IntegerLiteral):
            return None
        count = lanes.literal_value
        result = types.UniTuple(_element(array), count)

        def generate(context, builder, signature, args):
            kind = signature.args[0]
            pointer = _pointer(context, builder, kind, args[0], signature.args[1], args[1])
            valid, aligned = args[2], args[3]
            zero = ir.Constant(_llvm(_element(kind)), 0.0)
            with builder.if_else(_whole(builder, valid, aligned, count)) as (fast, slow):
                with fast:
                    vector = _load_vector(builder, kind, pointer, count)
                    fast_end = builder.block
                with slow:
                    scalars = []
                    for lane in range(count):
                        before = builder.block
                        with builder.if_then(builder.icmp_signed(">", valid, valid.type(lane))):
                            value = _widen(builder, kind, builder.load(builder.gep(pointer, [I64(lane)])))
                            inside = builder.block
                        merged = builder.phi(zero.type)
                        merged.add_incoming(zero, before)
                        merged.add_incoming(value, inside)
                        scalars.append(merged)
                    slow_end = builder.block
            lanes_out = []
            for one, other in zip(vector, scalars, strict=True):
                merged = builder.phi(zero.type)
                merged.add_incoming(one, fast_end)
                merged.add_incoming(other, slow_end)
                lanes_out.append(merged)
            return context.make_tuple(builder, result, lanes_out)

        return result(array, offset, valid, aligned, lanes), generate

    @intrinsic
    def store(typingctx, array, offset, valid, aligned, values):
        """Store those of `values` before `valid`; one vector where `aligned`."""
        if values.dtype != array.dtype:
            raise TypingError(f"values of {values.dtype} are stored in an array of {array.dtype}")

        def generate(context, builder, signature, args):
            kind = signature.args[0]
            pointer = _pointer(context, builder, kind, args[0], signature.args[1], args[1])
            valid, aligned = args[2], args[3]
            lanes = _unpack(builder, args[4], signature.args[4].count)
            with builder.if_else(_whole(builder, valid, aligned, len(lanes))) as (fast, slow):
                with fast:
                    _store_vector(builder, pointer, lanes, kind.dtype.bitwidth // 8 * len(lanes))
                with slow:
                    for lane, value in enumerate(lanes):
                        with builder.if_then(builder.icmp_signed(">", valid, valid.type(lane))):
                            builder.store(value, builder.gep(pointer, [I64(lane)]))
            return context.get_dummy_value()

        return types.void(array, offset, valid, aligned, values), generate

    @intrinsic
    def load_shared(typingctx, array, offset, lanes):
        """`lanes` elements of shared memory as one vector."""
        if not isinstance(lanes, types.IntegerLiteral):
            return None
        result = types.UniTuple(array.dtype, lanes.literal_value)

        def generate(context, builder, signature, args):
            pointer = _pointer(context, builder, signature.args[0], args[0], signature.args[1], args[1])
            values = _load_vector(builder, signature.args[0], pointer, result.count)
            return context.make_tuple(builder, result, values)

        return result(array, offset, lanes), generate

    @intrinsic
    def store_shared(typingctx, array, offset, values):
        """One vector into shared memory."""

        def generate(context, builder, signature, args):
            pointer = _pointer(context, builder, signature.args[0], args[0], signature.args[1], args[1])
            count = signature.args[2].count
            size = signature.args[0].dtype.bitwidth // 8 * count
            _store_vector(builder, pointer, _unpack(builder, args[2], count), size)
            return context.get_dummy_value()

        return types.void(array, offset, values), generate

    @intrinsic
    def zeros(typingctx, count, zero):
        """A tuple of `count` times `zero`."""
        if not isinstance(count, types.IntegerLiteral):
            return None
        result = types.UniTuple(zero, count.literal_value)

        def generate(context, builder, signature, args):
            return context.make_tuple(builder, result, [args[1]] * result.count)

        return result(count, zero), generate

    @intrinsic
    def outer_accumulate(typingctx, sums, x, y):
        """sums[i, j] + x[i] y[j], the tuple `sums` being row-major."""

        def generate(context, builder, signature, args):
            rows, columns = _unpack(builder, args[1], x.count), _unpack(builder, args[2], y.count)
            held = _unpack(builder, args[0], sums.count)
            pairs = [(a, b) for a in rows for b in columns]
            out = [builder.fma(a, b, c) for (a, b), c in zip(pairs, held, strict=True)]
            return context.make_tuple(builder, sums, out)

        return sums(sums, x, y), generate

    def _lanewise(rule, values, *others):
        """Signature and generator of a rule applied lane by lane; `others` are tuples or scalars."""

        def generate(context, builder, signature, args):
            columns = []
            for kind, arg in zip(signature.args, args, strict=True):
                whole = isinstance(kind, types.BaseTuple)
                columns.append(_unpack(builder, arg, values.count) if whole else [arg] * values.count)
            out = [rule(builder, *lane) for lane in zip(*columns, strict=True)]
            return context.make_tuple(builder, values, out)

        return values(values, *others), generate

    @intrinsic
    def add_scaled(typingctx, values, others, factor):
        """values + factor others, lane by lane."""
        return _lanewise(lambda builder, v, o, f: builder.fma(f, o, v), values, others, values.dtype)

    @intrinsic
    def multiply(typingctx, values, others):
        """Values times others, lane by lane."""
        return _lanewise(lambda builder, v, o: builder.fmul(v, o), values, others)

    @intrinsic
    def scale(typingctx, values, factor):
        """Values times a scalar."""
        return _lanewise(lambda builder, v, f: builder.fmul(v, f), values, values.dtype)

    @intrinsic
    def part(typingctx, values, index, lanes):
        """The `index`-th group of `lanes` elements of a tuple, chosen by selects: no address, so no memory."""
        if not isinstance(lanes, types.IntegerLiteral):
            return None
        result = types.UniTuple(values.dtype, lanes.literal_value)

        def generate(context, builder, signature, args):
            held, width = _unpack(builder, args[0], values.count), result.count
            out = held[:width]
            for group in range(1, values.count // width):
                chosen = builder.icmp_signed("==", args[1], args[1].type(group))
                out = [builder.select(chosen, held[group * width + lane], out[lane]) for lane in range(width)]
            return context.make_tuple(builder, result, out)

        return result(values, index, lanes), generate

    @intrinsic
    def with_part(typingctx, values, index, group):
        """`values` with its `index`-th group replaced."""

        def generate(context, builder, signature, args):
            held, new = _unpack(builder, args[0], values.count), _unpack(builder, args[2], group.count)
            out = []
            for place, value in enumerate(held):
                chosen = builder.icmp_signed("==", args[1], args[1].type(place // group.count))
                out.append(builder.select(chosen, new[place % group.count], value))
            return context.make_tuple(builder, values, out)

        return values(values, index, group), generate

    def _rearranged(values, count, source):
        """Signature and generator of a tuple of `count` elements of which `source` tells the old place of each."""
        result = types.UniTuple(values.dtype, count)

        def generate(context, builder, signature, args):
            held = _unpack(builder, args[0], values.count)
            return context.make_tuple(builder, result, [held[source(place)] for place in range(count)])

        return result, generate

    @intrinsic
    def repeated(typingctx, values, count):
        """The whole tuple, `count` times."""
        if not isinstance(count, types.IntegerLiteral):
            return None
        size = values.count
        result, generate = _rearranged(values, size * count.literal_value, lambda place: place % size)
        return result(values, count), generate

    @intrinsic
    def stretched(typingctx, values, count):
        """Each element `count` times."""
        if not isinstance(count, types.IntegerLiteral):
            return None
        times = count.literal_value
        result, generate = _rearranged(values, values.count * times, lambda place: place // times)
        return result(values, count), generate

    @intrinsic
    def turned(typingctx, values, lanes):
        """Each square of `lanes` x `lanes` elements transposed."""
        if not isinstance(lanes, types.IntegerLiteral):
            return None
        side = lanes.literal_value

        def source(place):
            square, row, column = place // side**2, place // side % side, place % side
            return square * side**2 + column * side + row

        result, generate = _rearranged(values, values.count, source)
        return result(values, lanes), generate

    def _larger(builder, one, other):
        name = "llvm.maxnum.f32" if one.type == F32 else "llvm.maxnum.f64"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(one.type, [one.type, one.type]), name)
        return builder.call(function, [one, other])

    def _folded(rule, values, lanes):
        """Signature and generator of a rule that joins the groups of `lanes` elements, lane by lane, one by one."""
        if not isinstance(lanes, types.IntegerLiteral):
            return None
        result = types.UniTuple(values.dtype, lanes.literal_value)

        def generate(context, builder, signature, args):
            held = _unpack(builder, args[0], values.count)
            joined = held[: result.count]
            for first in range(result.count, values.count, result.count):
                group = held[first : first + result.count]
                joined = [rule(builder, *pair) for pair in zip(joined, group, strict=True)]
            return context.make_tuple(builder, result, joined)

        return result(values, lanes), generate

    @intrinsic
    def lane_sums(typingctx, values, lanes):
        """Sums over the groups of `lanes` elements, lane by lane."""
        return _folded(lambda builder, one, other: builder.fadd(one, other), values, lanes)

    @intrinsic
    def lane_maxima(typingctx, values, lanes):
        """Largest elements of the groups of `lanes`, lane by lane; NaN only where there is nothing else."""
        return _folded(_larger, values, lanes)

    @intrinsic
    def maximum(typingctx, values, others):
        """The larger of two, lane by lane; NaN only where there is nothing else."""
        return _lanewise(_larger, values, others)

    @intrinsic
    def above(typingctx, values, least):
        """Values that are more than `least`, 0 for the others and for NaN."""

        def rule(builder, value, bound):
            more = builder.fcmp_ordered(">", value, bound)
            return builder.select(more, value, ir.Constant(value.type, 0.0))

        return _lanewise(rule, values, values.dtype)

    @intrinsic
    def exp2(typingctx, values):
        """2 to the power of each; float32 with an error of two in the last place, and 0 for what is not normal."""

        def rule(builder, value):
            if value.type == F32:
                return _assembly(builder, F32, [value], "ex2.approx.ftz.f32 $0, $1;", "=f,f")
            kind = ir.FunctionType(value.type, [value.type])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, "__nv_exp2"), [value])

        return _lanewise(rule, values)

    def _integer(builder, value, kind):
        if value.type.width < kind.width:
            return builder.sext(value, kind)
        return builder.trunc(value, kind) if value.type.width > kind.width else value

    @intrinsic
    def shifted(typingctx, numbers, by):
        """Integers plus one, lane by lane, of its type."""
        result = types.UniTuple(by, numbers.count)

        def generate(context, builder, signature, args):
            held = [_integer(builder, value, args[1].type) for value in _unpack(builder, args[0], numbers.count)]
            return context.make_tuple(builder, result, [builder.add(value, args[1]) for value in held])

        return result(numbers, by), generate

    @intrinsic
    def within(typingctx, values, numbers, lows, ends, otherwise):
        """Values whose number is in the range of their lane, lows <= number < ends; for the others `otherwise`.

        A group of as many values as there are lanes has one number.
        """

        def generate(context, builder, signature, args):
            held = _unpack(builder, args[0], values.count)
            kind = context.get_value_type(signature.args[2].dtype)
            places, least, most = (
                [_integer(builder, value, kind) for value in _unpack(builder, arg, tuple_.count)]
                for arg, tuple_ in zip(args[1:4], (numbers, lows, ends), strict=True)
            )
            out = []
            for place, value in enumerate(held):
                number, lane = places[place // lows.count], place % lows.count
                after = builder.icmp_signed("<=", least[lane], number)
                before = builder.icmp_signed("<", number, most[lane])
                out.append(builder.select(builder.and_(after, before), value, args[4]))
            return context.make_tuple(builder, values, out)

        return values(values, numbers, lows, ends, values.dtype), generate

    def _mix(builder, z):
        for distance, factor in ((30, FIRST_MIX), (27, SECOND_MIX), (31, 1)):
            z = builder.xor(z, builder.lshr(z, I64(distance)))
            z = builder.mul(z, I64(factor)) if factor > 1 else z
        return z

    @intrinsic
    def mixed(typingctx, numbers):
        """`SplitMix64`'s mix of integers of 64 bits, lane by lane."""
        return _lanewise(_mix, numbers)

    @intrinsic
    def kept(typingctx, values, states, steps, bar, gain):
        """Gain values where the upper 53 bits of mixed(states + steps) are at least `bar`, else 0, lane by lane."""

        def rule(builder, value, state, step, bar, gain):
            number = builder.lshr(_mix(builder, builder.add(state, step)), I64(11))
            chosen = builder.icmp_unsigned(">=", number, bar)
            return builder.select(chosen, builder.fmul(gain, value), ir.Constant(value.type, 0.0))

        return _lanewise(rule, values, states, steps, types.int64, values.dtype)

    def _assembly(builder, result, args, text, constraints, side_effect=False):
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=side_effect), args)

    @intrinsic
    def to_tf32(typingctx, values):
        """float32 rounded to what tensor cores take, lane by lane (compute capability 8.0)."""

        def rounded(builder, value):
            return builder.bitcast(_assembly(builder, I32, [value], "cvt.rna.tf32.f32 $0, $1;", "=r,f"), F32)

        return _lanewise(rounded, values)

    @intrinsic
    def tensor_accumulate(typingctx, sums, p0, p1, q0, q1):
        """Sums of a warp's 32 x 32 plus P Q over eight inner elements, on tensor cores: PTX `mma.sync.m16n8k8`.

        A lane brings four neighbouring rows of P at one inner element (`p0`) and four beyond it (`p1`), likewise of
        Q; `simulated.mma_wiring` tells how they become fragments.
        """
        text = (
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
        )
        constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)

        def generate(context, builder, signature, args):
            held = _unpack(builder, args[0], sums.count)
            bits = [[builder.bitcast(v, I32) for v in _unpack(builder, arg, 4)] for arg in args[1:]]
            for a, b, c in mma_wiring():
                operands = [bits[which][lane] for which, lane in a] + [bits[2 + which][lane] for which, lane in b]
                operands += [held[place] for place in c]
                kind = ir.LiteralStructType([F32] * 4)
                out = _assembly(builder, kind, operands, text, constraints, side_effect=True)
                for place, value in zip(c, _unpack(builder, out, 4), strict=True):
                    held[place] = value
            return context.make_tuple(builder, sums, held)

        return sums(sums, p0, p1, q0, q1), generate
