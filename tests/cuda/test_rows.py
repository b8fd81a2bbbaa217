"""Operations on rows on the emulator: tables, columns, means, norms, gates, the largest, and wide cross-entropy."""

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

import nblora
from nblora.backends.device import DeviceArray
from nblora.kernels.common.cuda import simulated
from nblora.kernels.common.cuda.target import COMPILED
from tests.cuda import machine_code, mutants, rows, stub
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.cuda.machine_code import COMBINATIONS, assert_fits, compile_kernel
from tests.cuda.recorded import launched, recording_backend
from tests.cuda.rows import DTYPES, vectors
from tests.helpers import ADAPTERS, assert_close, make_adapter
from tests.processes import run

# Nothing, single elements, whole vectors and groups, and one more or less than those.
TABLES = [
    (0, 3, 5), (1, 1, 1), (3, 2, 4), (7, 5, 3), (8, 4, 8), (9, 11, 5), (33, 6, 12), (40, 2, 7), (5, 40, 129),
    (70, 1, 16), (2, 3, 131), (64, 65, 2), (30, 3, 132),
]  # fmt: skip
MEANS = [
    (0, 0, 5), (1, 1, 1), (1, 9, 4), (2, 7, 3), (3, 3, 8), (4, 41, 5), (5, 12, 12), (2, 100, 7), (1, 70, 129),
    (7, 8, 131), (6, 33, 2), (3, 64, 132), (9, 300, 1),
]  # fmt: skip
COLUMNS = [
    (0, 3, 5), (1, 1, 1), (3, 2, 4), (7, 3, 3), (8, 4, 8), (9, 2, 5), (33, 3, 12), (5, 2, 129), (2, 3, 131), (64, 1, 2),
    (10, 2, 132), (1, 5, 7),
]  # fmt: skip
WIDE = [
    (0, 5), (1, 1), (2, 2), (3, 3), (4, 7), (5, 31), (9, 33), (33, 8), (7, 64), (3, 127), (2, 130), (5, 260), (1, 1030),
]  # fmt: skip
CHECKS = {
    rows.check_tables: TABLES,
    rows.check_sums: TABLES,
    rows.check_means: MEANS,
    rows.check_columns: COLUMNS,
    rows.check_norm: WIDE,
    rows.check_largest: WIDE,
    rows.check_softmax: WIDE,
    rows.check_pointwise: WIDE,
    rows.check_dropout: WIDE,
}
CASES = [(check, shape) for check, shapes in CHECKS.items() for shape in shapes]


def name(value):
    return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("check", "shape"), CASES, ids=name)
def test_values(check, shape, dtype):
    place = CHECKS[check].index(shape) + (dtype == "float64")
    check(make_backend(ORDERS[place % 3]), dtype, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("check", "shape"), CASES, ids=name)
def test_values_in_every_order(check, shape, dtype):
    for order in ORDERS:
        check(make_backend(order), dtype, *shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("check", "shape"), [(check, shapes[6]) for check, shapes in CHECKS.items()], ids=name)
def test_arrays_that_begin_anywhere(check, shape, dtype, monkeypatch):
    """No array begins at a multiple of 16 bytes, so no vector may be used."""
    for access in ("load", "store"):
        monkeypatch.setattr(simulated, access, scalar(getattr(simulated, access)))
    check(make_backend(aligned=False), dtype, *shape)
    with pytest.raises(AssertionError, match="a vector"):
        check(make_backend(), dtype, *shape[:-1], 12)


def scalar(access):
    def checked(array, offset, valid, aligned, what):
        lanes = what if isinstance(what, int) else len(what)
        assert not (aligned and valid >= lanes), "a vector"
        return access(array, offset, valid, aligned, what)

    return checked


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_order(dtype):
    def values(order):
        backend = make_backend(order)
        rows.run_everything(backend, dtype, rows=9, width=40)
        arguments = [a for launch in backend._device.launches for a in launch[3] if isinstance(a, np.ndarray)]
        return [a for a in arguments if a.dtype.kind == "f"]

    first = values("forward")
    for order in ("reverse", "random"):
        for one, other in zip(first, values(order), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_way_back_lets_gradients_wait():
    """What copies rows does not launch what is put off; what changes an array that this reads does."""
    backend = make_backend()
    new = [backend.from_host(np.ones((4, 8), np.float32)) for _ in range(2)]
    waiting = backend._factor_gradient(*new)
    rows_, begins = np.arange(4), np.array([0, 1, 4])
    backend.join_columns(backend.split_columns(new[0], 2))
    backend.row_means_gradient(backend.gather(new[0], np.arange(2)), begins)
    backend.multiplied(*new)
    backend.dropout_gradient(new[0], 0.5, 3)
    backend.scatter(backend.zeros((4, 8), new[0].dtype), rows_, new[0])
    assert backend._products
    backend.scatter(new[0], rows_, new[1], add=True)
    assert not backend._products
    np.testing.assert_array_equal(waiting.copy_to_host(), np.full((8, 8), 4))


def test_nothing_is_read_back_and_a_step_launches_what_the_last_one_did():
    """But `largest`, which brings places and numbers over in one copy."""
    backend = make_backend()
    copies = []
    backend._device._to_host = lambda source: copies.append(source) or np.array(source)
    counts = []
    for _ in range(3):
        backend._device.launches.clear()
        rows.run_everything(backend, "float32", 6, 8)
        backend.softmax_cross_entropy(backend.zeros((3, 5), np.dtype(np.float32)), np.array([1, -100, 2]))
        counts.append((len(backend._device.launches), len(copies)))
        copies.clear()
        backend._numbers = None
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][1] == 2  # `largest`, and labels that were on the device and are counted on the host


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_layer_of_rows(rng, kind, frozen):
    """Embeddings and adapters on them, forward, back and in a sweep; of integers that their owner changes, too."""
    base = nblora.Embedding(rng.normal(size=(11, 6)).astype(np.float32))
    base.trainable = not frozen
    host = base if kind is None else make_adapter(rng, kind, base, frozen=frozen)
    device = host.clone()
    device._move(make_backend("random"))
    x = rng.integers(0, 7, 20)
    for _ in range(2):
        assert_close(device.forward(x), host.forward(x))
        grad = rng.normal(size=(20, 6)).astype(np.float32)
        for layer in (device, host):
            assert layer.backward(grad) is None
        if host.parameter_count:
            assert_close(device.get_parameter_gradients(), host.get_parameter_gradients())
        for layer in (device, host):
            assert layer.backward_update(grad, 0.1) is None
        for parameter in host.parameter_names():
            assert_close(device.get_parameter(parameter), host.get_parameter(parameter))
        x[...] = rng.integers(4, 11, 20)
    there = device._backend.from_host(x)
    y = device.forward(there)
    assert isinstance(y, DeviceArray)
    assert_close(np.asarray(y), host.forward(x))
    with pytest.raises(IndexError, match="from 0 to 10"):
        device.forward(there.copy_to_host() + 7)


SIMULATED = """
from nblora import backends
from tests.cuda import rows
backend = backends.resolve("cuda")
for dtype in rows.DTYPES:
    rows.check_tables(backend, dtype, 7, 5, 3)
    rows.check_sums(backend, dtype, 100, 3, 7)
    rows.check_means(backend, dtype, 4, 41, 5)
    rows.check_columns(backend, dtype, 9, 2, 5)
    rows.check_norm(backend, dtype, 9, 34)
    rows.check_largest(backend, dtype, 4, 33)
    rows.check_softmax(backend, dtype, 4, 7)
    rows.check_pointwise(backend, dtype, 3, 5)
    rows.check_dropout(backend, dtype, 3, 7)
print("whole rows")
"""


@pytest.mark.slow
def test_on_the_simulator():
    done = run(SIMULATED, options=(), NUMBA_ENABLE_CUDASIM="1")  # of infinities NumPy warns
    assert done.stdout == "whole rows\n"


STEPS = """
from tests.cuda import rows
backend = nblora.backends.resolve("cuda")


def step():
    rows.run_everything(backend, "float32")
    backend.read([])  # as a step does with its losses


for _ in range(3):
    step()
say(steps=[counted(step) for _ in range(10)])
"""


@pytest.mark.slow
@stub.needs_driver[0]
@stub.needs_driver[1]
@stub.needs_driver[2]
def test_no_step_allocates_or_launches_more_than_the_last(folder):
    """On a driver that computes nothing. To the host come labels that were on the device, to be counted, and what
    `largest` found."""
    steps = stub.script(folder, STEPS)["steps"]
    assert all(step == steps[0] for step in steps)
    assert {name: steps[0][name] for name in ("alloc", "free", "d2h")} == {"alloc": 0, "free": 0, "d2h": 2}


# --- machine code ------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not COMPILED or machine_code.disassembler() is None,
    reason="needs numba-cuda and nvdisasm: pip install 'nblora[cuda12]' nvidia-cuda-nvdisasm",
)


def check_machine_code(dtype, architecture, output):
    backend = recording_backend()
    backend._device.launches.clear()
    rows.run_everything(backend, dtype, 40, 768)
    found = launched(backend)
    assert len({kernel.py_func.__name__ for _, kernel, *_ in found}) == 16
    for kernel_name, kernel, threads, types in found:
        code = compile_kernel(kernel, types, architecture, output)
        assert_fits(code, kernel, threads)
        if kernel_name != "add_parts":
            assert vectors(code, "LD") > 0, kernel_name
        if kernel_name not in ("add_parts", "largest"):
            assert vectors(code, "ST") > 0, kernel_name
        if dtype == "float32" and kernel_name != "softmax_cross_entropy":  # whose sum is float64's
            assert not [op for op in code.opcodes if op in ("DFMA", "DADD", "DMUL")], kernel_name


@needs_compiler
def test_machine_code():
    check_machine_code("float32", (9, 0), "ltoir")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "output"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_everywhere(dtype, architecture, output):
    check_machine_code(dtype, architecture, output)


# --- mutants -----------------------------------------------------------------------------------------------------

MODULES = ("common.cuda.groups", "embedding.cuda", "rows.cuda", "norm.cuda", "pointwise.cuda")
GUARDS = [
    (r"if n < N:", "if True:"),  # rows beyond the last
    (r"(?:F - column)? if i < count else int32\(0\)", "F - column"),
    (r" if n < (?:N|stop) else int32\(0\)", ""),
    (r"if valid > 0:", "if True:"),
    (r"(?<=valid = )F - column(?=\n)", "LANES"),  # tails of vectors
    (r"F - column(?=, (?:rows|begins)\[)", "LANES"),
    (r"width - column", "LANES"),
    (r"end - column", "LANES"),
    (r"(?:y|gx)\.size - offset", "LANES"),
    (r"valid - LANES", "LANES"),
    (r"min\(column \+ LANES, end\) - first", "LANES"),
    (r"(?<= and )lane < valid|lane < valid and ", ""),
    (r"(?<=valid) > (\d)", r" > \1 - 1"),
    (r"max\(column, int32\(0\)\)", "column"),  # what lies before a row
    (r"while place < end", "while place <= end"),  # ends of loops
    (r"while row < (?:stop(?=:\n +mean)|count)", r"\g<0> + 1"),
    (r"while part < B", r"\g<0> + 1"),
    (r"min\(begin \+ chunk, N\)", "begin + chunk"),
    (r"\(array\.size \+ LANES - 1\) // LANES", "array.size // LANES"),
    (r"if (?:share|member) < width:", "if True:"),  # idle halves of trees
    (r"member < width and ", ""),
    (r"share > 0 or ", ""),  # who has the sum
    (r" or \(what == DESCEND and begin == end\)", ""),
    (r"if column < F:", "if True:"),
    (r"share == 0 and ", ""),
    (r"(?<=share == 0) and column < F", ""),
    (r"member == 0 and ", ""),
    (r"(?<=member == 0) and n < N", ""),
    (r"place < 0:", "False:"),  # who has found nothing
]
SOFTMAX = [
    (r"max\(column, int32\(0\)\)", "column"),
    (r"min\(column \+ LANES, outputs\) - begin", "LANES"),
    (r"if label < 0:", "if False:"),
    (r"(?<=valid) > (\d)", r" > \1 - 1"),
    (r"top = found if found != LOWEST else ZERO", "top = found"),
]
MUTANTS = mutants.mutants(MODULES, GUARDS) + mutants.mutants(("losses.cuda",), SOFTMAX)
SMALL = {
    "norm.cuda": [(rows.check_norm, (5, 34)), (rows.check_norm, (9, 33)), (rows.check_norm, (9, 47))],
    "pointwise.cuda": [(rows.check_pointwise, (3, 7)), (rows.check_dropout, (3, 7)), (rows.check_dropout, (1, 6))],
    "embedding.cuda": [(rows.check_sums, (100, 3, 7)), (rows.check_tables, (7, 5, 3)), (rows.check_means, (4, 41, 5))],
    "rows.cuda": [
        (rows.check_means, (4, 41, 5)), (rows.check_columns, (9, 2, 5)), (rows.check_largest, (9, 33)),
        (rows.check_tables, (7, 5, 3)),
    ],
    "losses.cuda": [(rows.check_softmax, (4, 7)), (rows.check_softmax, (3, 130))],
}  # fmt: skip
SMALL["common.cuda.groups"] = SMALL["norm.cuda"]


def checks_of(module):
    """The checks that reach a module's kernels, on a backend over the changed ones."""

    def checks(emulated):
        for check, shape in SMALL[module]:
            for dtype in DTYPES:
                for order in ("forward", "reverse"):
                    yield lambda check=check, shape=shape, dtype=dtype, order=order: check(
                        emulated.make_backend(order), dtype, *shape
                    )

    return checks


def test_every_guard_is_there():
    assert sum("syncthreads" in name for name, *_ in MUTANTS) == 11
    found = {name.partition(":")[0] for name, *_ in MUTANTS}
    assert found == {*MODULES, "losses.cuda"}
    assert len(MUTANTS) == 82


@pytest.mark.slow
@pytest.mark.parametrize("module", SMALL)
def test_whole_kernels_pass(module):
    found = mutants.killed_by(module, lambda source: source, checks_of(module))
    assert found is None, found


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m[1] in ("rows.cuda",)], ids=lambda m: m[0])
def test_mutants_of_rows(mutant):
    _, module, mutate = mutant
    assert mutants.killed_by(module, mutate, checks_of(module)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m[1] not in ("rows.cuda",)], ids=lambda m: m[0])
def test_mutants(mutant):
    _, module, mutate = mutant
    assert mutants.killed_by(module, mutate, checks_of(module)) is not None
