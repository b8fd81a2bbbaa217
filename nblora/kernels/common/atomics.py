"""Counters that threads share: jobs are drawn from them, and finished jobs are counted on them."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import part
from .microkernel import element_pointer


def _fetch_add(typing_context, counters, index, amount):
    def generate(context, builder, signature, args):
        address = element_pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.atomic_rmw("add", address, args[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), generate


def _exchange_if(typing_context, counters, index, expected, value):
    def generate(context, builder, signature, args):
        address = element_pointer(context, builder, signature.args[0], args[0], args[1])
        pair = builder.cmpxchg(address, args[2], args[3], "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(pair, 1), context.get_value_type(types.boolean))

    return types.boolean(counters, types.intp, types.int64, types.int64), generate


def _pause(typing_context):
    """The processor's hint for a spinning loop, where it has one."""

    def generate(context, builder, signature, args):
        if "x86_64" in builder.module.triple:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


def _give_way(typing_context):
    """Let another thread run on this core, where the system has POSIX's call for it."""

    def generate(context, builder, signature, args):
        if "windows" not in builder.module.triple:
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


fetch_add = intrinsic(_fetch_add)
"""fetch_add(counters, index, amount): add to an int64 element and return what it was, in one step."""
exchange_if = intrinsic(_exchange_if)
"""exchange_if(counters, index, expected, value): where the element is `expected`, set it; whether it was."""
pause, give_way = intrinsic(_pause), intrinsic(_give_way)

PATIENCE = 2000
"""Turns of a spinning loop before it gives way at each: some 50 µs, in which a worker that runs has finished its job.
One that does not run may be waiting for this very core."""


@part
def wait_for(counters, index, count):
    """Return once `counters[index]` has reached `count`."""
    turns = 0
    while fetch_add(counters, index, 0) < count:
        turns = idle(turns)


@part
def idle(turns):
    """One turn of a spinning loop; return the number of turns."""
    if turns > PATIENCE:
        give_way()
    else:
        pause()
    return turns + 1


@part
def draw(counters, first, jobs, worker, workers):
    """The next of `jobs` jobs for this worker, -1 where none is left; counted on `workers` elements from `first` on.

    Every worker has a share of its own, the same in every call, so that it finds what it used before in its own cache;
    when that is done it takes from the others'. One that is held up by another process loses only the job in hand.
    """
    for step in range(workers):
        share = (worker + step) % workers
        begin, end = jobs * share // workers, jobs * (share + 1) // workers
        taken = fetch_add(counters, first + share, 1) if end > begin else 0
        if taken < end - begin:
            return begin + taken
    return -1
