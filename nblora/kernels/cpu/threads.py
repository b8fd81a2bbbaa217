"""Running one worker function on all of Numba's threads.

A kernel that holds a `prange` is optimised several times over with all that it calls. So one small parallel kernel,
`launch`, calls workers by their address, whatever task they work on, and each worker is compiled once.
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..jit import JIT_DISABLED, kernel
from ..linking import compile_part
from .microkernel import I8P, I64

_WORKER = ir.FunctionType(ir.VoidType(), [I8P, I64, I64])


def _trampoline(context, builder, worker, task_type):
    """The LLVM function (task*, worker, workers) that loads the task and calls `worker`."""
    signature = types.none(task_type, types.int64, types.int64)
    descriptor = compile_part(context, worker, signature)
    name = f"nblora_enter.{descriptor.mangled_name}"
    function = ir.Function(builder.module, _WORKER, name)
    function.linkage = "internal"
    inner = ir.IRBuilder(function.append_basic_block())
    pointer = inner.bitcast(function.args[0], context.get_value_type(task_type).as_pointer())
    arguments = [inner.load(pointer), *function.args[1:]]
    context.call_internal_no_propagate(inner, descriptor, signature, arguments)
    inner.ret_void()
    return function


def entry(worker):
    """Make of a part `worker(task, index, workers)` a function task -> (address of its code, address of the task)."""
    if JIT_DISABLED:
        return lambda task: (worker, task)

    def enter(task, index, workers):
        worker(task, index, workers)

    # Workers of one task type must not share a symbol: a process that loads both from the cache would mix them up.
    enter.__qualname__ = f"enter_{worker.__name__}"

    @intrinsic
    def addresses(typing_context, task):
        def generate(context, builder, signature, args):
            function = _trampoline(context, builder, enter, task)
            held = cgutils.alloca_once_value(builder, args[0])
            pair = [builder.ptrtoint(function, I64), builder.ptrtoint(held, I64)]
            return context.make_tuple(builder, signature.return_type, pair)

        return types.UniTuple(types.int64, 2)(task), generate

    return addresses


def _call(typing_context, function, task, worker, workers):
    def generate(context, builder, signature, args):
        code = builder.inttoptr(args[0], _WORKER.as_pointer())
        builder.call(code, [builder.inttoptr(args[1], I8P), args[2], args[3]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _call_twin(function, task, worker, workers):
    function(task, worker, workers)


call = _call_twin if JIT_DISABLED else intrinsic(_call)
"""call(function, task, worker, workers), with what `entry` made."""


@kernel(parallel=True)
def launch(function, task, workers):
    """Call the worker for every index below `workers`, each on a thread of its own."""
    for worker in prange(workers):
        call(function, task, np.int64(worker), np.int64(workers))
