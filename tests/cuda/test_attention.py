"""Attention and rotary positions on a GPU: values on the emulator, launches, traffic, mutants, machine code."""

import gc
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from nblora.backends.cuda.attention import ATTENTION
from nblora.backends.reference import ReferenceBackend
from nblora.kernels.common.cuda.target import COMPILED
from nblora.layers.attention import Rotary
from tests.cuda import machine_code, mutants
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.cuda.machine_code import ARCHITECTURES, EVERY, OUTPUTS, assert_fits, compile_kernel
from tests.cuda.recorded import launched, recording_backend
from tests.helpers import DTYPES
from tests.layers.support import apart, heads_of
from tests.processes import ROOT

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
REFERENCE = ReferenceBackend()

# (queries of each sequence, keys, heads, key heads, features of a head, causal, dropout, room after the keys): nothing,
# single elements, whole tiles, steps and vectors, and one more or less than those; queries that see no key.
SHAPES = [
    ([0], [0], 1, 1, 4, False, 0, 0),
    ([5], [1], 1, 1, 1, False, 0, 0),
    ([8], [16], 1, 1, 4, False, 0, 0),
    ([9], [17], 2, 1, 5, True, 0, 0),
    ([7], [15], 2, 2, 16, False, 0, 0),
    ([0, 1, 13, 0, 5], [0, 1, 13, 0, 5], 2, 1, 3, True, 0, 0),
    ([3, 9, 2], [7, 4, 0], 4, 2, 8, False, 0, 3),
    ([3, 9, 2], [7, 4, 0], 4, 2, 7, True, 0, 0),
    ([6, 2], [33, 18], 3, 1, 15, True, 0, 2),
    ([6, 5], [3, 9], 2, 1, 17, False, 0.4, 3),
    ([12], [12], 3, 3, 6, True, 0.3, 0),
    ([16, 8], [16, 8], 1, 1, 33, True, 0, 0),
    ([5, 0, 7], [5, 0, 7], 4, 1, 12, True, 0, 1),
    ([9], [34], 1, 1, 20, False, 0, 0),
    ([5], [9], 1, 1, 130, True, 0, 0),
]
# The same where no sequence has more than four queries.
FEW = [
    ([1], [1], 1, 1, 1, True, 0, 0),
    ([1, 1], [16, 17], 2, 1, 4, True, 0, 3),
    ([1, 1, 1], [5, 0, 33], 4, 2, 16, False, 0, 0),
    ([4, 1, 0], [3, 40, 2], 3, 1, 5, True, 0, 0),
    ([1], [15], 5, 1, 8, False, 0, 2),
    ([2, 1], [17, 16], 4, 1, 9, False, 0, 0),
    ([4], [4], 2, 2, 3, True, 0, 0),
    ([3], [1], 6, 2, 20, True, 0, 0),
    ([1, 1, 1, 1], [2, 9, 1, 18], 2, 2, 12, True, 0, 3),
    ([1], [50], 1, 1, 7, False, 0, 0),
    ([1], [7], 5, 1, 33, True, 0, 0),
    ([0, 0, 1], [3, 3, 3], 2, 1, 129, True, 0, 0),
    ([2, 1], [5, 6], 3, 1, 6, True, 0.4, 1),
]
# (rows, heads, features of a head, pairs that turn)
ROTATED = [
    (0, 1, 2, 1), (1, 1, 2, 1), (3, 2, 6, 3), (5, 1, 8, 4), (9, 3, 10, 2), (7, 2, 16, 8), (33, 1, 5, 2), (4, 4, 12, 6),
    (2, 2, 130, 65), (40, 2, 20, 8), (6, 1, 64, 32), (1, 9, 4, 2), (2, 3, 7, 0),
]  # fmt: skip

RUNS = [
    *(("float32", order) for order in ORDERS),
    ("float64", "random"),
    *(pytest.param("float64", order, marks=pytest.mark.slow) for order in ORDERS[:2]),
]


def problem(case, dtype):
    """q, k, v, the gradient, and how attention reads them."""
    lengths, key_lengths, heads, key_heads, size, causal, dropout, room = case
    rng = np.random.default_rng(size)
    shape = heads_of(lengths, key_lengths, heads, key_heads, causal, 0.7 / np.sqrt(size))
    q, grad = rng.normal(size=(2, sum(lengths), heads * size)).astype(dtype)
    k, v = rng.normal(size=(2, sum(key_lengths), key_heads * size)).astype(dtype)
    if room:
        shape, _, k, v = apart(shape, k, v, room)
    return q, k, v, grad, shape._replace(dropout=dropout, seed=(1 << 61) + 5)


def run(backend, q, k, v, grad, shape):
    """What attention and its gradient give: o, sums, gq, gk, gv."""
    q, k, v, grad = (backend.from_host(array) for array in (q, k, v, grad))
    o, sums = backend.attention(q, k, v, shape)
    found = o, sums, *backend.attention_gradient(grad, q, k, v, o, sums, shape)
    return [backend.to_host(array) for array in found]


def check(backend, case, dtype):
    """Values, and how many launches they take."""
    *arrays, shape = problem(case, dtype)
    expected = run(REFERENCE, *(array.astype(np.float64) for array in arrays), shape)
    backend._device.launches.clear()
    found = run(backend, *arrays, shape)
    for one, reference in zip(found, expected, strict=True):
        assert one.dtype == np.dtype(dtype)
        largest = abs(reference).max(initial=1)
        np.testing.assert_allclose(one, reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * largest)
    assert len(backend._device.launches) <= 4
    return found


def check_rotated(backend, shape, dtype):
    """Turned, and turned back."""
    rows, heads, size, half = shape
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(rows, heads * size)).astype(dtype), rng.integers(70, size=rows)
    angles = rng.normal(size=(70, half)).astype(dtype)
    tables = np.cos(angles), np.sin(angles)
    held, expected = backend.from_host(x), x.copy()
    for back in (False, True):
        backend.rotate(held, positions, *tables, heads, back)
        if rows:
            REFERENCE.rotate(expected, positions, *tables, heads, back)
        found = backend.to_host(held)
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    np.testing.assert_allclose(found, x, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "order"), RUNS)
@pytest.mark.parametrize("case", [*SHAPES, *FEW], ids=str)
def test_values(case, dtype, order):
    backend = make_backend(order, aligned=order != "random")
    check(backend, case, dtype)
    names = {launch[0].py_func.__name__ for launch in backend._device.launches}
    assert ("attention_few" in names) == (sum(case[0]) > 0 and max(case[0]) <= 4 and not case[6])


@pytest.mark.parametrize(("dtype", "order"), RUNS)
@pytest.mark.parametrize("shape", ROTATED, ids=str)
def test_rotary_positions(shape, dtype, order):
    check_rotated(make_backend(order, aligned=order != "random"), shape, dtype)


def test_same_bits_in_every_order():
    for case in (SHAPES[4], SHAPES[10], FEW[7]):
        found = [check(make_backend(order), case, "float32") for order in ORDERS]
        for other in found[1:]:
            for one, same in zip(found[0], other, strict=True):
                np.testing.assert_array_equal(one, same)


def test_same_bits_with_room_between_keys():
    case = ([3, 1, 0, 5], [7, 40, 2, 5], 4, 2, 6, True, 0, 0)
    *arrays, shape = problem(case, "float32")
    spread, rows, *wide = apart(shape, *arrays[1:3], 3)
    found, other = run(make_backend(), *arrays, shape), run(make_backend(), arrays[0], *wide, arrays[3], spread)
    for one, same in zip(found[:3], other[:3], strict=True):
        np.testing.assert_array_equal(one, same)
    for one, same in zip(found[3:], other[3:], strict=True):
        np.testing.assert_array_equal(one, same[rows])
        assert not np.delete(same, rows, axis=0).any()


def test_large_scores_overflow_nothing():
    for lengths in ([9], [2]):
        *arrays, shape = problem((lengths, [40], 1, 1, 8, False, 0, 0), "float32")
        shape = shape._replace(scale=300.0)
        found = run(make_backend(), *arrays, shape)
        expected = run(REFERENCE, *(array.astype(np.float64) for array in arrays), shape)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=1e-3)
        assert all(np.isfinite(array).all() for array in found)


def test_nan_stays_in_its_row_and_head():
    *arrays, shape = problem(([9], [9], 2, 2, 4, True, 0, 0), "float32")
    arrays[0][3, 5] = np.nan
    o, sums = run(make_backend(), *arrays, shape)[:2]
    assert np.isnan(o[3, 4:]).all()
    assert np.isnan(sums[3, 1])
    assert np.isfinite(np.delete(o, 3, axis=0)).all()
    assert np.isfinite(o[3, :4]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [20, 64, 100, 200] if EVERY else [20, 64])
def test_tiles_of_a_device(size, dtype):
    """With the blocks that a device gets."""
    for lengths, dropout in (([70], 0), ([2, 1], 0), ([35], 0.2)):
        backend = make_backend("random")
        backend._attention = ATTENTION
        check(backend, (lengths, [length + 3 for length in lengths], 4, 2, size, True, dropout, 0), dtype)


def test_the_largest_head():
    backend = make_backend()
    for name in ("attention", "attention_gradient"):
        *arrays, shape = problem(([5], [5], 1, 1, 257, False, 0, 0), "float32")
        q, k, v, grad = map(backend.from_host, arrays)
        given = (q, k, v) if name == "attention" else (grad, q, k, v, q, q, shape)
        with pytest.raises(ValueError, match="at most 256 features, got 257"):
            getattr(backend, name)(*given, *([shape] if name == "attention" else []))


# --- launches, memory ------------------------------------------------------------------------------------------------


def test_tables_are_made_once_for_as_long_as_the_sequences_live(monkeypatch):
    backend, allocated = make_backend(), []
    allocate = backend._device._allocate
    monkeypatch.setattr(backend._device, "_allocate", lambda *given: allocated.append(given) or allocate(*given))
    *arrays, shape = problem(SHAPES[8], "float32")
    q, k, v, grad = map(backend.from_host, arrays)

    def step(shape):
        allocated.clear()
        o, sums = backend.attention(q, k, v, shape)
        backend.attention_gradient(grad, q, k, v, o, sums, shape)
        return len(allocated)

    first = step(shape)
    assert step(shape) == 6  # o, sums, products of o and its gradient, and three gradients
    # Where sequences begin and end, the tiles of queries, and those of keys.
    assert first == 6 + 5
    assert backend._tables
    known = len(backend._known)
    del shape
    backend._device.launches.clear()
    gc.collect()
    assert not backend._tables
    assert len(backend._known) == known - 5


def test_what_was_put_off_comes_first(monkeypatch):
    backend, called = make_backend(), []
    q, k, v, _, shape = problem(SHAPES[2], "float32")
    held = [backend.from_host(array) for array in (q, k, v)]
    monkeypatch.setattr(backend._device, "settle", lambda: called.append("settled"))
    backend.attention(*held, shape)
    assert called == ["settled"]
    monkeypatch.setattr(backend, "_before_writing", lambda *arrays: called.append(arrays))
    backend.rotate(held[0], np.zeros(len(q), np.int64), *Rotary(4).tables(1, q.dtype), 1)
    assert called[1:] == [(held[0],)]


def tiles_of(lengths, rows):
    """(sequence, first row, rows) of each tile."""
    return [(s, i, min(rows, n - i)) for s, n in enumerate(lengths) for i in range(0, n, rows)]


@pytest.mark.parametrize("case", [SHAPES[3], SHAPES[7], SHAPES[8], SHAPES[13], FEW[3], FEW[5]], ids=str)
def test_traffic(case):
    """Elements read and written, as docs/gpu-proofs.md derives."""
    lengths, key_lengths, heads, key_heads, size, causal, _, _ = case
    backend = make_backend()
    *arrays, shape = problem((*case[:7], 0), "float32")
    q, k, v, grad = map(backend.from_host, arrays)
    traffic, tile = backend._device.traffic, backend._attention["float32"].gradient[0]
    group, width = heads // key_heads, heads * size

    def moved(array, direction="read"):
        return traffic[id(array.memory.base), direction]

    def seen(sequence, row):
        """Keys that a query sees."""
        ahead = key_lengths[sequence] - lengths[sequence]
        return max(0, row + ahead + 1) if causal else key_lengths[sequence]

    def steps(count):
        return -(-count // tile.columns)

    o, sums = backend.attention(q, k, v, shape)
    if max(lengths) <= 4:
        keys = sum(seen(s, row) for s, n in enumerate(lengths) for row in range(n)) * -(-group // 4) * key_heads * size
        assert moved(q) == q.size
    else:
        mine = [(n, seen(s, i + n - 1)) for s, i, n in tiles_of(lengths, tile.rows)]
        keys = width * sum(end for _, end in mine)
        assert moved(q) == width * sum(n * steps(end) for n, end in mine)
    assert moved(k) == moved(v) == keys
    assert moved(o, "written") == q.size
    assert moved(sums, "written") == sums.size
    traffic.clear()
    gq, gk, gv = backend.attention_gradient(grad, q, k, v, o, sums, shape)
    mine = [(n, seen(s, i + n - 1)) for s, i, n in tiles_of(lengths, tile.rows)]
    own, keys = width * sum(n * steps(end) for n, end in mine), width * sum(end for _, end in mine)
    theirs = []
    for s, i, n in tiles_of(key_lengths, tile.rows):
        first = max(0, i - key_lengths[s] + lengths[s]) if causal else 0
        theirs.append((n, max(0, lengths[s] - first)))
    queries, others = width * sum(m for _, m in theirs), width * sum(n * steps(m) for n, m in theirs)
    assert moved(o) == q.size
    assert moved(q) == own + 2 * queries
    assert moved(grad) == q.size + own + 2 * queries
    assert moved(k) == 2 * keys + others
    assert moved(v) == keys + others
    assert [moved(array, "written") for array in (gq, gk, gv)] == [q.size, k.size, v.size]


# --- mutants ---------------------------------------------------------------------------------------------------------

MODULES = tuple(f"attention.cuda.{name}" for name in ("tiles", "forward", "gradients", "few", "rotary"))
GUARDS = [
    (r"if t < CARRIERS:", "if True:"),  # threads that bring nothing
    (r"valid = size - column if row < rows\.end else int32\(0\)", "valid = size - column"),  # rows beyond the tile
    (r"size - column(?= if row < rows\.end)", "LANES"),  # the tail of a head
    (r" if row < real else zeros\(LANES, ZERO\)", ""),  # keys that there are not
    (r"int32\(1\) if row \+ i < (?:end|here\.q1) else int32\(0\)", "int32(1)"),  # figures of rows
    (r"int32\(rows\.column \+ size\)", "int32(rows.column + size + LANES)"),  # a head's end
    (r"shifted\(LANE, last\) if causal else ", ""),
    (r"if causal:", "if False:"),
    (r"repeated\(\(most,\), LANES\)", "repeated((int32(1 << 20),), LANES)"),  # the last keys
    (r"min\(here\.row \+ ROWS, here\.q1\)", "here.row + ROWS"),
    (r"min\(start \+ COLUMNS, end\)", "start + COLUMNS"),
    (r"max\(here\.q0, (here\.row \+ before)\)", r"\1"),
    (r"if summed != ZERO(?=:)", "if True"),  # a query that sees no key
    (r" if summed != ZERO else ZERO", ""),
    (r"above\(new, NONE\)", "new"),
    (r" if row < products\.size else int32\(0\)", ""),
    (r"if member == 0 and row < products\.size:", "if member == 0:"),
    (r"valid = size - column(?= if row < (?:products|count))", "valid = LANES"),
    (r"valid = size - column(?= if key < end)", "valid = LANES"),
    (r"valid = size - feature", "valid = LANES"),
    (r"stop - start - i(?=\n)", "int32(1)"),
    (r"while i < COLUMNS", "while i < COLUMNS - 1"),
    (r" if row < count else int32\(0\)", ""),
    (r"min\(ROWS, group - before\)", "ROWS"),  # heads of another block
    (r" if key < end else int32\(0\)", ""),
    (r" if start \+ i < end else repeated\(\(NONE,\), ROWS\)", ""),
    (r" if start \+ place < end else int32\(0\)", ""),
    (r"size - column(?=, aligned, scale)", "LANES"),
    (r"half - feature", "LANES"),
    (r"n < positions\.shape\[0\]", r"\g<0> + 1"),
    (r"i < heads \* across", r"\g<0> + 1"),
    (r"\(half \+ LANES - 1\)", "half"),
]
MUTANTS = mutants.mutants(MODULES, GUARDS)

# Small ones that together reach everything.
CHECKED = [
    ([6, 2], [19, 3], 2, 1, 5, True, 0, 2),
    ([3, 9, 2], [7, 4, 0], 2, 1, 8, True, 0, 0),
    ([5], [18], 1, 1, 6, False, 0, 2),
    ([2, 5], [4, 7], 1, 1, 3, False, 0, 3),
    ([16], [3], 1, 1, 4, False, 0, 0),
    ([2, 1], [18, 5], 3, 1, 5, False, 0, 2),
    ([3, 1], [1, 5], 6, 1, 8, True, 0, 0),
]


def idle(backend):
    """The backend with a tile of which not every thread brings something."""
    shapes = backend._attention["float32"]
    tiles = (replace(shapes.forward[0], columns=32, size=32, threads=16),)
    backend._attention = {"float32": replace(shapes, forward=tiles, gradient=tiles)}
    return backend


def checks(emulated):
    """Callables that raise where a kernel is wrong: together they reach every barrier, bound and tail."""
    for order in ("forward", "reverse"):
        for case in CHECKED:
            yield lambda case=case, order=order: check(emulated.make_backend(order), case, "float32")
        yield lambda order=order: check(idle(emulated.make_backend(order)), CHECKED[0], "float32")
        for shape in ((3, 2, 7, 3), (5, 2, 12, 6)):
            yield lambda shape=shape, order=order: check_rotated(emulated.make_backend(order), shape, "float32")


def assert_killed(mutant):
    _, module, mutate = mutant
    assert mutants.killed_by(module, mutate, checks) is not None


def test_threads_that_bring_nothing():
    for order in ORDERS:
        check(idle(make_backend(order)), CHECKED[0], "float32")


def test_no_guard_is_missed():
    assert sum("syncthreads" in name for name, *_ in MUTANTS) == 13
    assert len(MUTANTS) == 52


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if "syncthreads" in m[0]], ids=lambda m: m[0])
def test_mutants_without_a_barrier(mutant):
    assert_killed(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if "syncthreads" not in m[0]], ids=lambda m: m[0])
def test_mutants(mutant):
    assert_killed(mutant)


@pytest.mark.slow
def test_whole_kernels_pass():
    found = mutants.killed_by(MODULES[0], lambda source: source, checks)
    assert found is None, found


# --- machine code ----------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not COMPILED or machine_code.disassembler() is None,
    reason="needs numba-cuda and nvdisasm: pip install 'nblora[cuda12]' nvidia-cuda-nvdisasm",
)
MAIN = ("attention", "query_gradient", "key_gradients")


def recorded(dtype, size, group=2, dropout=0.0):
    """(name, kernel, threads, types) of what the operations launch, with a device's blocks."""
    backend = recording_backend()

    def new(*shape):
        return backend.from_host(np.zeros(shape, dtype))

    for lengths in ([70], [1, 1]):
        shape = heads_of(lengths, lengths, 2 * group, 2, True, 0.3)._replace(dropout=dropout)
        q, k = new(sum(lengths), 2 * group * size), new(sum(lengths), 2 * size)
        o, sums = backend.attention(q, k, k, shape)
        backend.attention_gradient(q, q, k, k, o, sums, shape)
        backend.rotate(q, np.zeros(len(q), np.int64), *Rotary(size).tables(1, q.dtype), 2 * group)
    return launched(backend)


def assert_code(name, kernel, threads, types, architecture, output, dtype):
    code = compile_kernel(kernel, types, architecture, output)
    assert_fits(code, kernel, threads)
    assert code.count("LDG.E.128") > 0
    if dtype == "float32":
        assert not [op for op in code.opcodes if op in ("DFMA", "DADD", "DMUL")], name
    if name in MAIN:
        assert code.shared_vectors >= 4
        loops = code.main_loops("FFMA" if dtype == "float32" else "DFMA")
        assert len(loops) >= {"attention": 2, "query_gradient": 3, "key_gradients": 4}[name]
        least = 0.35 if dtype == "float32" else 0.15
        assert all(count >= 32 and count / length >= least for count, length in loops), (name, loops)
    return code


@needs_compiler
def test_machine_code():
    found = recorded("float32", 64)
    assert {name for name, *_ in found} == {*MAIN, "attention_few", "output_products", "rotate"}
    for one in found:
        code = assert_code(*one, (9, 0), "ltoir", "float32")
        if one[0] in MAIN:
            assert all(count / length >= 0.8 for count, length in code.main_loops("FFMA"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_machine_code_of_every_architecture(size, dtype, architecture, output):
    usual = (size, dtype) == (64, "float32")
    if not (EVERY or usual or (output == "ltoir" and (size == 128 or architecture == (12, 0)))):
        pytest.skip("takes an hour together: set NBLORA_EVERY_KERNEL=1")
    for settings in ({}, {"dropout": 0.1}, {"group": 1}) if usual or EVERY else ({},):
        for one in recorded(dtype, size, **settings):
            assert_code(*one, architecture, output, dtype)


# --- the simulator ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_the_simulator():
    script = """
from nblora.backends import resolve
from tests.cuda import test_attention as tests
backend = resolve("cuda")
backend._device.launches = []
for case in (tests.SHAPES[3], tests.SHAPES[9], tests.FEW[4]):
    for dtype in tests.DTYPES:
        tests.check(backend, case, dtype)
tests.check_rotated(backend, (3, 2, 6, 3), "float32")
print("all")
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all\n")
