"""Every kernel's values on the emulator against the formulas: the body is the one that tests the CPU kernels."""

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from nblora.backends.cuda.shapes import PLAIN, TENSOR
from tests.cuda import mutants
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.test_kernels import CASES, IDENTITY, RELU, Case, run

TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "tf32": 1e-3, "bf16-base": 1e-5}

# (N, in, out, rank): nothing, single elements, whole tiles and vectors, and one more or less than those everywhere
SHAPES = [
    (0, 5, 7, 1),
    (1, 1, 1, 1),
    (1, 33, 17, 2),
    (1, 40, 64, 8),
    (1, 37, 66, 4),
    (2, 3, 5, 1),
    (7, 31, 33, 3),
    (8, 16, 16, 4),
    (9, 12, 40, 9),
    (16, 32, 16, 8),
    (17, 18, 19, 5),
    (33, 20, 21, 1),
    (9, 20, 24, 64),
]

# One sample: (in, out, rank). Its products have kernels of their own.
SINGLE = [
    (1, 1, 1), (2, 1, 1), (1, 5, 1), (3, 4, 2), (4, 4, 4), (7, 8, 1), (16, 24, 16), (31, 33, 3), (64, 40, 8),
    (37, 33, 64), (33, 65, 2), (67, 20, 5), (20, 67, 1),
]  # fmt: skip
SIZES = [1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 129, 300]
LOSSES = [(1, 1), (1, 2), (1, 37), (2, 1), (2, 3), (3, 64), (5, 32), (7, 31), (8, 33), (33, 2), (40, 5), (3, 129)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SINGLE, ids=str)
def test_one_sample(shape, dtype):
    for transposed in (False, True):
        order = ORDERS[SINGLE.index(shape) % 3]
        run((1, *shape), dtype, transposed, CASES[1], make_backend(order), TOLERANCE[dtype])


@pytest.mark.parametrize("size", SIZES)
def test_updates(size):
    mutants.check_updates(make_backend(ORDERS[SIZES.index(size) % 3]), size)


@pytest.mark.parametrize("shape", LOSSES, ids=str)
def test_losses(shape):
    mutants.check_losses(make_backend(ORDERS[LOSSES.index(shape) % 3]), *shape)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    place = SHAPES.index(shape)
    backend = make_backend(ORDERS[place % 3])
    run(shape, dtype, (place + (dtype == "float64")) % 2 == 0, CASES[1], backend, TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES[2:], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 9, 12, 2), (9, 18, 20, 5)], ids=str)
def test_parts(shape, transposed, case):
    if case.base or not transposed:
        run(shape, "float32", transposed, case, make_backend("random"), TOLERANCE["float32"])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_orders_of_threads(dtype, order):
    run((17, 18, 19, 5), dtype, True, CASES[1], make_backend(order), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_parts_and_orders(shape, dtype, transposed, order):
    for case in CASES:
        if case.base or not transposed:
            run(shape, dtype, transposed, case, make_backend(order), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 16, 24, 4), (9, 16, 24, 4)], ids=str)
def test_arrays_that_begin_anywhere(shape, dtype):
    run(shape, dtype, False, Case(train=True, masked=True), make_backend(aligned=False), TOLERANCE[dtype])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(5, 70, 20, 3), (5, 20, 70, 3), (40, 50, 20, 8)], ids=str)
def test_split_inner_dimension(shape, transposed):
    backend = make_backend("random")
    backend._device.multiprocessors = 8
    run(shape, "float32", transposed, Case(activation=RELU), backend, TOLERANCE["float32"])
    assert any(isinstance(grid, tuple) and len(grid) == 3 and grid[2] > 1 for _, grid, *_ in backend._device.launches)


def _launched(backend):
    return [kernel.py_func.__name__ for kernel, *_ in backend._device.launches]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "multiprocessors", "how"), [
    ((9, 30, 40, 3), 1, "wide"), ((9, 30, 40, 3), 100, "small"), ((70, 7, 6, 2), 100, "split"),
    ((131, 9, 13, 1), 50, "split"), ((15, 9, 13, 1), 50, "small"),
], ids=str)  # fmt: skip
def test_dense_updates(shape, multiprocessors, how, dtype, order):
    """Large weights, small ones, and small ones with many samples, whose splits are added up in order."""
    for case in (CASES[0], CASES[1], CASES[3]):  # the delta alone, with the base, the base alone
        backend = make_backend(order)
        backend._device.multiprocessors = multiprocessors
        run(shape, dtype, order == "reverse", case, backend, TOLERANCE[dtype])
        assert ("descend_sums" in _launched(backend)) == (how == "split")
        assert ("dense_update" in _launched(backend)) != (how == "split")
        used = {launch[2] for launch in backend._device.launches if launch[0].py_func.__name__ == "dense_update"}
        if how != "split":
            assert used == {getattr(backend._shapes[dtype], how).threads}


def test_one_row_of_tiles_is_split_among_many_blocks():
    """64 samples and a small rank: a few hundred blocks, not one."""
    backend = make_backend(shapes=PLAIN)
    backend._device.busy, backend._device.multiprocessors = 512, 132
    narrow = PLAIN["float32"].narrow
    for samples, inner, blocks in ((64, 768, 12), (64, 4096, 32), (2048, 4096, 416), (64, 511, 1)):
        grid, chunk = backend._splits(narrow, samples, 8, inner)
        assert np.prod(grid) == blocks
        assert (grid[2] - 1) * chunk < inner <= grid[2] * chunk
        assert chunk % narrow.depth == 0


# N = 1 takes the kernels for one sample, whatever the precision.
TENSOR_SHAPES = [
    (1, 37, 66, 4), *SHAPES[5:12], (33, 40, 35, 5), (64, 40, 33, 8), (3, 70, 36, 2), (34, 8, 64, 1), (32, 32, 32, 16),
    (5, 12, 100, 64), (65, 33, 31, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", TENSOR_SHAPES, ids=str)
def test_tensor_cores(shape):
    order, transposed = ORDERS[shape[0] % 3], shape[2] % 2 == 1
    run(shape, "float32", transposed, Case(masked=shape[0] % 2 == 0), make_backend(order, precision="tf32"),
        TOLERANCE["tf32"])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("float32", "float32"), ("float32", "float64"), ("tf32", "float32")])
@pytest.mark.parametrize("shape", [(131, 70, 133, 3), (20, 41, 140, 64), (1, 300, 270, 2)], ids=str)
def test_tiles_of_a_device(shape, precision, dtype, transposed):
    """With the blocks that a device gets, of 256 threads."""
    backend = make_backend("random", precision=precision, shapes=TENSOR if precision == "tf32" else PLAIN)
    backend._plain = PLAIN
    tolerance = TOLERANCE["tf32" if precision == "tf32" else dtype]
    activation = IDENTITY if precision == "tf32" else RELU  # rounding takes a few z across relu's edge
    run(shape, dtype, transposed, Case(train=True, masked=True, activation=activation), backend, tolerance)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 33, 18, 2), (9, 12, 40, 9), (17, 18, 19, 5), (8, 16, 16, 4)], ids=str)
def test_bfloat16_base(shape, transposed):
    """The base's weight is rounded once, and from then on everything is float32."""
    from nblora.kernels.common.cuda.simulated import from_bfloat16, to_bfloat16
    from tests.test_kernels import Problem, brought

    problem = Problem(shape, "float32", transposed, Case())
    problem.arrays["W"] = from_bfloat16(to_bfloat16(problem.arrays["W"]))
    expected = problem.expected()
    backend = make_backend(precision="bf16-base")
    operands = brought(problem.operands(), backend.from_host)
    weight = backend.base_from_host(problem.operands().base.weight)
    assert weight.nbytes * 2 == operands.base.weight.nbytes
    operands = operands._replace(base=operands.base._replace(weight=weight))
    y, saved = backend.forward(backend.from_host(problem.arrays["x"]), operands, None, True)
    problem.check("y", y.copy_to_host(), expected["y"], TOLERANCE["bf16-base"])
    problem.check("merged", backend.merge(operands).copy_to_host(), expected["merged"], TOLERANCE["bf16-base"])
    gradients = backend.backward_update(backend.from_host(problem.arrays["gy"]), saved, operands, 0.1, 0.2)
    problem.check("x", gradients.x.copy_to_host(), expected["x"], TOLERANCE["bf16-base"])


def test_same_bits_in_every_order():
    problems = []
    for order in ORDERS:
        backend = make_backend(order)
        backend._device.multiprocessors = 8
        run((5, 60, 20, 3), "float32", False, Case(masked=True, train=True), backend)
        problems.append([a for launch in backend._device.launches for a in launch[3] if _holds_values(a)])
    for first, other in zip(problems[0], problems[1], strict=True):
        np.testing.assert_array_equal(first, other)


def _holds_values(argument):
    return isinstance(argument, np.ndarray) and argument.dtype != np.int64  # which would be a table of addresses


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("samples", [1, 7, 16, 40])
def test_traffic_of_weight_sized_arrays(samples, transposed):
    """The forward reads W and D once a block row of N; the sweep moves 2·⌈N / rows⌉ + 4 arrays of that size."""
    from tests.test_kernels import Problem, brought

    problem = Problem((samples, 20, 24, 3), "float32", transposed, Case())
    backend = make_backend()
    backend._device.multiprocessors = 1
    operands = brought(problem.operands(), backend.from_host)
    x, gy = (backend.from_host(problem.arrays[name]) for name in ("x", "gy"))
    traffic, size = backend._device.traffic, 20 * 24
    owners = {
        name: id(array.memory.base)
        for name, array in (("W", operands.base.weight), ("D", operands.delta.delta), ("V", operands.delta.velocity))
    }

    def moved(name, direction):
        return traffic[owners[name], direction] / size

    _, saved = backend.forward(x, operands, None, True)
    rows = -(-samples // backend._tile(samples, np.dtype(np.float32)).rows)
    assert moved("W", "read") == moved("D", "read") == rows
    assert moved("W", "written") == moved("D", "written") == 0
    traffic.clear()
    backend.backward_update(gy, saved, operands, 0.1, 0.1)
    total = sum(moved(name, direction) for name in "WDV" for direction in ("read", "written"))
    assert total == 2 * rows + 4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("samples", [7, 40])
def test_traffic_of_activations(samples, transposed):
    """x and gz are read once for each tile that lies across them, as docs/gpu-proofs.md derives."""
    from tests.test_kernels import Problem, brought

    inputs, outputs, rank = 20, 24, 3
    problem = Problem((samples, inputs, outputs, rank), "float32", transposed, Case())
    backend = make_backend()
    backend._device.multiprocessors = 1
    operands = brought(problem.operands(), backend.from_host)
    x, gy = (backend.from_host(problem.arrays[name]) for name in ("x", "gy"))
    traffic = backend._device.traffic
    narrow = backend._shapes["float32"].narrow
    dense = backend._shapes["float32"].wide  # its four tiles keep one multiprocessor busy
    tile = backend._tile(samples, np.dtype(np.float32))

    def reads(array):
        return traffic[id(array.memory.base), "read"] / array.size

    def tiles(extent, size):
        return -(-extent // size)

    _, saved = backend.forward(x, operands, None, True)
    assert reads(x) == tiles(rank, narrow.columns) + tiles(outputs, tile.columns)
    traffic.clear()
    backend.backward_update(gy, saved, operands, 0.1, 0.1)
    backend._device.settle()
    rows_of, columns_of = (outputs, inputs) if transposed else (inputs, outputs)  # of the weight as it is stored
    update = {"x": tiles(columns_of, dense.columns), "gz": tiles(rows_of, dense.rows)}
    if transposed:
        update = {"x": tiles(rows_of, dense.rows), "gz": tiles(columns_of, dense.columns)}
    assert reads(x) == tiles(rank, narrow.columns) + update["x"]
    skinny = tiles(rank, narrow.columns) + tiles(rank, narrow.rows)
    assert reads(gy) == skinny + tiles(inputs, tile.columns) + update["gz"]
