"""Running one worker function on several threads at once.

A kernel posts its task on a board and computes. Threads that stand by (`serve`, started by `backends.crew`) take it up
when they are running; when the kernel finds no more jobs it takes the post back from those that never came. So a
thread that another process keeps from its core holds nothing up, unless it has a job in hand: with OpenMP's barrier a
step of 0.4 ms took 12 ms beside busy neighbours, and takes 0.8 ms now. Workers are called by their address, whatever
task they work on.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .atomics import exchange_if, fetch_add, idle
from .jit import kernel, part
from .linking import compile_part
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


call = intrinsic(_call)
"""call(function, task, worker, workers), with what `entry` made."""


FUNCTION, TASK, WORKERS = range(3)
"""Where on the board the post is: addresses of the worker function and of the task, and the number of shares."""
SLOT = 16
"""Elements from one thread's state to the next, two cache lines; thread w's is at w·SLOT, w >= 1."""
IDLE, POSTED, RUNNING, ASLEEP = range(4)


@part
def launch(function, task, workers, board, helpers):
    """Work off the task, in `workers` shares, with the threads 1 to `helpers` that stand by at the board."""
    if helpers == 0:
        call(function, task, 0, workers)
        return
    board[FUNCTION], board[TASK], board[WORKERS] = function, task, workers
    for helper in range(1, helpers + 1):
        exchange_if(board, helper * SLOT, IDLE, POSTED)
    call(function, task, 0, workers)
    for helper in range(1, helpers + 1):
        if not exchange_if(board, helper * SLOT, POSTED, IDLE):
            turns = 0
            while fetch_add(board, helper * SLOT, 0) == RUNNING:
                turns = idle(turns)


@kernel
def serve(board, helper, patience):
    """Stand by at the board as thread `helper`: take up what is posted, until nothing was for `patience` turns."""
    slot, turns = helper * SLOT, 0
    while True:
        if exchange_if(board, slot, POSTED, RUNNING):
            call(board[FUNCTION], board[TASK], helper, board[WORKERS])
            exchange_if(board, slot, RUNNING, IDLE)
            turns = 0
        elif turns >= patience:
            if exchange_if(board, slot, IDLE, ASLEEP):
                return
        else:
            turns = idle(turns)
