"""Operations on images: values on the emulator against the reference, machine code, traffic, and mutants."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from nblora.backends import reference, resolve
from nblora.backends.blocks import Pooling
from nblora.backends.cuda import images as room
from nblora.backends.protocol import Base, Delta, LowRank, Operands
from nblora.kernels.common.cuda.target import COMPILED
from nblora.kernels.common.elementwise import GELU, IDENTITY, QUICK_GELU, RELU, SILU
from nblora.kernels.patches.window import Slide
from nblora.layers import AvgPool2d, BatchNorm2d, GlobalAvgPool2d, MaxPool2d
from nblora.layers.run import Run
from nblora.layers.sinks import Held
from nblora.pretrained.families.vit import ClassToken
from tests.cuda import machine_code, mutants, stub
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.cuda.machine_code import COMBINATIONS, assert_fits, compile_kernel
from tests.cuda.recorded import launched, recording_backend

ROOT = Path(__file__).parents[2]
REFERENCE = reference.ReferenceBackend()
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
DTYPES = list(TOLERANCE)


def same(found, expected, dtype, backend, slack=1):
    """Values, shape and dtype; float32 within its rounding of the reference's in float64."""
    found = backend.to_host(found)
    assert found.dtype == np.dtype(dtype)
    assert found.shape == expected.shape
    scale = abs(expected[np.isfinite(expected)]).max(initial=1.0)
    bound = slack * TOLERANCE[dtype]
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * scale)


def drawn(shape, dtype, seed=0):
    """Numbers of the dtype, and the same in float64."""
    values = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    return values, values.astype(np.float64)


# --- patches ---------------------------------------------------------------------------------------------------------

# Images (N, channels, height, width), then kernel, stride, padding, dilation
PATCHES = [
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((0, 2, 4, 4), (2, 2), (1, 1), (0, 0), (1, 1)),
    ((2, 3, 5, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 2, 7, 6), (3, 2), (2, 1), (1, 0), (1, 1)),
    ((2, 1, 9, 9), (3, 3), (2, 2), (2, 2), (2, 2)),
    ((3, 2, 6, 7), (2, 3), (1, 2), (1, 2), (3, 1)),
    ((1, 4, 8, 8), (4, 4), (4, 4), (0, 0), (1, 1)),
    ((2, 2, 9, 10), (2, 3), (3, 4), (0, 1), (1, 1)),
    ((2, 17, 3, 5), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 16, 4, 4), (1, 1), (2, 2), (0, 0), (1, 1)),
    ((2, 9, 1, 33), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 3, 2, 3), (2, 3), (1, 1), (0, 0), (1, 1)),
    ((1, 1, 2, 2), (5, 5), (2, 2), (2, 2), (1, 1)),
    ((2, 3, 1, 9), (1, 3), (1, 2), (0, 1), (1, 2)),
    ((1, 2, 5, 5), (1, 1), (1, 1), (1, 1), (1, 1)),
    ((2, 2, 3, 4), (2, 2), (1, 3), (0, 0), (2, 2)),
]  # fmt: skip


def pieces(total):
    """All patches, some from the middle on, one, and none."""
    return {(0, total), (total // 3, total), (total // 2, min(total // 2 + 1, total)), (total, total)}


def check_patches(backend, case, dtype):
    """`unfold`, and `fold` added and, where no place is met twice, written, of several pieces."""
    shape, window = case[0], Slide(*case[1:]).on(*case[0][1:])
    x, exact = drawn(shape, dtype)
    images, total = backend.from_host(x), shape[0] * window.places
    for start, stop in pieces(total):
        rows = backend.unfold(images, window, start, stop)
        same(rows, REFERENCE.unfold(exact, window, start, stop), dtype, backend)
        values, wide = drawn((stop - start, window.features), dtype, 1)
        apart = room.patches.Steps.of(window).apart or window.places == 1
        for add in (True, False)[: 1 + apart]:
            target, expected = backend.from_host(x), exact.copy()
            backend.fold(backend.from_host(values), window, start, target, add)
            REFERENCE.fold(wide, window, start, expected, add)
            same(target, expected, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patches(case, dtype):
    place = PATCHES.index(case) + (dtype == "float64")
    check_patches(make_backend(ORDERS[place % 3], aligned=place % 2 == 0), case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_patches_in_every_order(case, dtype, order, aligned):
    check_patches(make_backend(order, aligned), case, dtype)


# Features, and channels, that blocks go round in
SHARED = [((1, 60, 2, 2), (1, 1), (1, 1), (0, 0), (1, 1)), ((1, 30, 3, 2), (2, 2), (1, 1), (1, 1), (1, 1))]


def narrow(backend):
    """A device of two blocks."""
    backend._device.waves, backend._device.multiprocessors = 1, 2
    return backend


def wide(backend):
    """A device of many blocks."""
    backend._device.multiprocessors = 8
    return backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_patches_shared_among_blocks(case, dtype):
    for order in ORDERS:
        backend = narrow(make_backend(order))
        check_patches(backend, case, dtype)
        assert {grid[1] for _, grid, *_ in backend._device.launches} >= {2}


def test_each_number_adds_its_patches_in_order():
    """The same bits in every order of threads, and one after the other by place."""
    window, found = Slide((3, 3), (1, 1), (1, 1), (1, 1)).on(2, 5, 5), []
    values = drawn((2 * window.places, window.features), "float32")[0]
    for order in ORDERS:
        backend = make_backend(order)
        target = backend.zeros((2, 2, 5, 5), np.dtype(np.float32))
        backend.fold(backend.from_host(values), window, 0, target, True)
        found.append(target.copy_to_host())
    expected = np.zeros((2, 2, 5, 5), np.float32)
    REFERENCE.fold(values, window, 0, expected, True)
    for each in found:
        np.testing.assert_array_equal(each, expected)


# --- pooling ---------------------------------------------------------------------------------------------------------

# Images, then kernel, stride, padding
POOLS = [
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    ((0, 2, 4, 4), (2, 2), (2, 2), (0, 0)),
    ((2, 3, 7, 5), (2, 2), (2, 2), (0, 0)),
    ((2, 3, 7, 5), (3, 3), (2, 2), (1, 1)),
    ((1, 5, 6, 6), (3, 2), (1, 2), (1, 0)),
    ((3, 1, 9, 8), (1, 1), (3, 1), (0, 0)),
    ((1, 2, 12, 12), (3, 3), (1, 1), (1, 1)),
    ((1, 1, 11, 13), (5, 4), (2, 3), (2, 2)),
    ((2, 2, 8, 8), (8, 8), (1, 1), (0, 0)),
    ((1, 33, 2, 2), (2, 2), (1, 1), (1, 1)),
    ((4, 17, 3, 3), (2, 2), (3, 3), (0, 0)),
    ((1, 1, 1, 65), (1, 3), (1, 2), (0, 1)),
    ((1, 2, 5, 1), (2, 1), (4, 1), (1, 0)),
]  # fmt: skip


def check_pool(backend, case, dtype):
    """Maxima, where they are, means, and their gradients."""
    x, exact = drawn(case[0], dtype)
    x, exact = np.round(x, 1), np.round(exact, 1).astype(dtype).astype(np.float64)  # some equal
    images = backend.from_host(x)
    for maximum in (True, False):
        window = Pooling(maximum, *case[1:])
        y, places = backend.pool(images, window)
        expected, where = REFERENCE.pool(exact, window)
        same(y, expected, dtype, backend)
        np.testing.assert_array_equal(backend.to_host(places), where)
        grad, wide = drawn(expected.shape, dtype, 1)
        for given in (places, where):
            gx = backend.pool_gradient(backend.from_host(grad), given, window, *case[0][2:])
            same(gx, REFERENCE.pool_gradient(wide, where, window, *case[0][2:]), dtype, backend)


def check_means(backend, shape, dtype):
    """Means of channels, and their gradients."""
    x, exact = drawn(shape, dtype)
    same(backend.means(backend.from_host(x)), REFERENCE.means(exact), dtype, backend)
    grad, wide = drawn(shape[:2], dtype, 1)
    gx = backend.means_gradient(backend.from_host(grad), *shape[2:])
    same(gx, REFERENCE.means_gradient(wide, *shape[2:]), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool(case, dtype):
    place = POOLS.index(case) + (dtype == "float64")
    backend = make_backend(ORDERS[place % 3], aligned=place % 2 == 0)
    check_pool(backend, case, dtype)
    check_means(backend, case[0], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool_in_every_order(case, dtype, order, aligned):
    check_pool(make_backend(order, aligned), case, dtype)
    check_means(make_backend(order, aligned), case[0], dtype)


def check_largest(backend, dtype="float32"):
    """Of equal ones the first, and NaN where there is any, the first of several."""
    nan, inf = np.nan, np.inf
    x = np.array([[[[1, nan], [nan, 5]]], [[[3, 3], [3, 3]]], [[[-inf, -inf], [-inf, -inf]]], [[[0, inf], [2, nan]]]])
    for padding in (0, 1):
        y, places = backend.pool(backend.from_host(x.astype(dtype)), Pooling(True, (2, 2), (2, 2), (padding, padding)))
        expected = [*x.ravel()] if padding else [nan, 3, -inf, nan]
        np.testing.assert_array_equal(backend.to_host(y).ravel(), expected)
        np.testing.assert_array_equal(backend.to_host(places).ravel(), [*range(4)] * 4 if padding else [1, 0, 0, 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_the_largest_and_of_equal_ones_the_first(dtype):
    for backend in (make_backend(), resolve("cpu"), REFERENCE):
        check_largest(backend, dtype)


def test_more_places_than_a_grid_is_wide(monkeypatch):
    monkeypatch.setattr(room, "MOST_ACROSS", 2)
    backend = make_backend("random")
    for dtype in DTYPES:
        check_pool(backend, ((1, 2, 17, 19), (2, 3), (1, 1), (1, 1)), dtype)
        check_means(backend, (2, 1, 17, 68), dtype)
        check_channels(backend, (1, 2, 17, 68), dtype, RELU)
        check_patches(backend, ((1, 90, 2, 2), (1, 1), (1, 1), (0, 0), (1, 1)), dtype)


# --- channels --------------------------------------------------------------------------------------------------------

CHANNELS = [
    (1, 1, 1, 1), (0, 3, 2, 2), (2, 3, 4, 5), (3, 5, 7, 7), (1, 2, 16, 16), (2, 1, 1, 257), (5, 33, 2, 2),
    (2, 65, 1, 3), (9, 4, 1, 1), (1, 1), (7, 5), (0, 4), (33, 3), (65, 64), (3, 130), (300, 1),
]  # fmt: skip
CODES = [IDENTITY, RELU, GELU, SILU, QUICK_GELU]


def check_channels(backend, shape, dtype, code):
    """act(x scale + shift), and the gradients."""
    x, exact = drawn(shape, dtype)
    grad, wide_grad = drawn(shape, dtype, 1)
    (scale, shift), wide = drawn((2, shape[1]), dtype, 2)
    given = [backend.from_host(np.ascontiguousarray(array)) for array in (x, scale, shift)]
    same(backend.channels(*given, code), REFERENCE.channels(exact, *wide, code), dtype, backend)
    found = backend.channels_gradient(backend.from_host(grad), *given, code)
    for one, other in zip(found, REFERENCE.channels_gradient(wide_grad, exact, *wide, code), strict=True):
        same(one, other, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CHANNELS, ids=str)
def test_channels(shape, dtype):
    place = CHANNELS.index(shape) + (dtype == "float64")
    check_channels(make_backend(ORDERS[place % 3], place % 2 == 0), shape, dtype, CODES[place % len(CODES)])


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CHANNELS, ids=str)
def test_channels_in_every_order(shape, dtype, order, aligned):
    for code in CODES:
        check_channels(make_backend(order, aligned), shape, dtype, code)


@pytest.mark.parametrize("shape", [(40, 3, 5, 5), (70, 9, 2, 4), (400, 5), (90, 70)], ids=str)
def test_sums_of_channels_are_shared_among_blocks(shape):
    found = []
    for order in ORDERS:
        backend = wide(make_backend(order))
        check_channels(backend, shape, "float32", RELU)
        _, grid, *_ = next(one for one in backend._device.launches if "gradient" in one[0].py_func.__name__)
        assert grid[1] > 1
        found.append([argument for one in backend._device.launches for argument in one[3]])
    for one, other in zip(found[0], found[1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4, 5, 31, 32, 33, 64, 65, 300])
def test_channel_scale(channels, dtype):
    backend = make_backend(ORDERS[channels % 3], aligned=channels % 2 == 0)
    check_scales(backend, channels, dtype)


def check_scales(backend, channels, dtype):
    """A batch norm's scale and shift, and the gradient of its weight."""
    values, exact = drawn((4, channels), dtype)
    values[3], exact[3] = abs(values[3]), abs(exact[3])
    given = [backend.from_host(np.ascontiguousarray(array)) for array in values]
    for name in ("channel_scale", "channel_scale_gradient"):
        found, expected = getattr(backend, name)(*given, 1e-3), getattr(REFERENCE, name)(*exact, 1e-3)
        pairs = zip(found, expected, strict=True) if name == "channel_scale" else [(found, expected)]
        for one, other in pairs:
            same(one, other, dtype, backend)


# --- the product, and layers -----------------------------------------------------------------------------------------


def operands_of(window, bring, dtype, outputs=5, rank=2, **parts):
    """A convolution's weight, factors and delta."""
    shapes = (outputs, window.features), (outputs,), (window.features, rank), (rank, outputs)
    weight, bias, A, B = (bring(drawn(shape, dtype, seed)[0]) for seed, shape in enumerate(shapes))
    D, V = (bring(drawn(shapes[0], dtype, seed)[0]) for seed in (4, 5))
    made = Operands(Base(weight, bias, True), LowRank(A, B, 0.5), Delta(D, V, 0.3, 0.9), GELU, True)
    return made._replace(**parts)


def check_convolution(backend, case, dtype, piece, fused, masked=True, **parts):
    """Forward and backward of a product in pieces: values, every gradient, and what an update leaves."""
    shape, slide = case[0], Slide(*case[1:])
    window, results = slide.on(*shape[1:]), []
    for other, kind in ((backend, dtype), (REFERENCE, "float64")):
        product, bring = other.convolution(slide), lambda array, to=other, kind=kind: to.from_host(array.astype(kind))
        product.piece = piece
        operands = operands_of(window, bring, dtype, **parts)
        x, mask = (bring(drawn(shape, dtype, seed)[0]) for seed in (6, 7))
        y, saved = product.forward(x, operands, mask if masked else None, True)
        grad = bring(drawn(y.shape, dtype, 8)[0])
        if fused:
            found = product.backward_update(grad, saved, operands, 0.1, 0.2)
            changed = operands.base.weight, *(operands.delta[:2] if operands.delta else ())
        else:
            found, changed = product.backward(grad, saved, operands), ()
        results.append((saved.pieces, [y, *(one for one in (*found, *changed) if one is not None)]))
    (pieces_, found), (_, expected) = results
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        same(one, other, dtype, backend, 4)
    return len(pieces_)


@pytest.mark.parametrize("case", [case for case in PATCHES if case[0][0] < 3], ids=str)
def test_convolution(case):
    place = PATCHES.index(case)
    check_pieces(case, DTYPES[place % 2], place % 4 > 1, ORDERS[place % 3])


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["held", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_convolution_in_every_order(case, dtype, fused):
    for order in ORDERS:
        check_pieces(case, dtype, fused, order)


def check_pieces(case, dtype, fused, order):
    """A product in one piece, and in about three."""
    some = {} if PATCHES.index(case) % 2 else {"delta": None}
    check_convolution(make_backend(order), case, dtype, None, fused, masked=not some, **some)
    window = Slide(*case[1:]).on(*case[0][1:])
    total = case[0][0] * window.places
    if total > 2:
        piece = -(-total // 3) * window.features * np.dtype(dtype).itemsize
        assert check_convolution(make_backend(order), case, dtype, piece, fused, masked=bool(some)) > 1


def test_gradients_of_factors_in_pieces_of_two_lengths():
    """A piece whose product was launched at once, then one that waits: both are there when they are added."""
    backend = make_backend()
    backend._device.multiprocessors = 1
    assert check_convolution(backend, ((3, 2, 6, 5), (3, 3), (1, 1), (1, 1), (1, 1)), "float32", 3600, False) > 1


def test_pieces_of_a_device():
    assert make_backend().convolution(Slide((1, 1), (1, 1), (0, 0), (1, 1))).piece == room.PIECE == 64 << 20


def emulated_run(layers, backend, x, grad):
    """Output, gradient of x and of every parameter of a chain of layers on a backend."""
    held = [parameter for layer in layers for parameter in layer._own_parameters().values()]
    for parameter in held:
        parameter.array, parameter.gradient = backend.from_host(np.array(parameter.array)), None
    run, y = Run(backend, training=True), backend.from_host(x)
    run.live = True
    for layer in layers:
        y = layer._forward(y, run)
    sink = Held()
    run.back(sink)
    back = backend.from_host(grad(y.shape))
    for layer in reversed(layers):
        back = layer._backward(back, run)
    found = [y, back, *(parameter.gradient for parameter in held if parameter.gradient is not None)]
    return [np.array(backend.to_host(array)) for array in found]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers(dtype):
    """Norms with fixed statistics, pooling and the class token, as on the CPU; nothing passes through the host."""
    rng = np.random.default_rng(0)
    norm = BatchNorm2d(*rng.uniform(0.5, 2, (4, 3)).astype(dtype), activation="gelu")
    pools = MaxPool2d(3, 3, stride=2, padding=1, dtype=dtype), AvgPool2d(3, 2, stride=1, dtype=dtype)
    token = ClassToken(*(rng.normal(size=shape).astype(dtype) for shape in ((1, 1, 3), (1, 13, 3))))
    x = rng.normal(size=(2, 3, 9, 8)).astype(dtype)
    for layers in ([norm, *pools, token], [norm, GlobalAvgPool2d(3, dtype=dtype)]):

        def grad(shape):
            return drawn(shape, dtype, 3)[0]

        expected = emulated_run(layers, REFERENCE, x, grad)
        assert len(expected) == (6 if token in layers else 4)
        for order in ORDERS:
            for one, other in zip(emulated_run(layers, make_backend(order), x, grad), expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_a_class_token_uploads_its_places_once():
    token = ClassToken(*(drawn(shape, "float32")[0] for shape in ((1, 1, 3), (1, 13, 3))))
    backend, x = make_backend(), drawn((2, 3, 4, 3), "float32")[0]
    uploads = []
    for _ in range(3):
        before = len(backend._known)
        emulated_run([token], backend, x, lambda shape: drawn(shape, "float32", 1)[0])
        uploads.append(len(backend._known) - before)
    assert uploads[0] > 0
    assert uploads[1:] == [0, 0]
    for count in range(1, 9):
        token._places(count)
    assert len(token._known) == 4


@pytest.mark.slow
def test_on_the_simulator():
    script = """
from nblora.backends.cuda import open_backend
from tests.cuda import test_images as images
backend = open_backend(0, "float32")
for dtype in images.DTYPES:
    for case in images.PATCHES[2:9:3]:
        images.check_patches(backend, case, dtype)
    for case in images.POOLS[2:4]:
        images.check_pool(backend, case, dtype)
        images.check_means(backend, case[0], dtype)
    for shape in ((2, 3, 4, 5), (7, 5)):
        images.check_channels(backend, shape, dtype, images.GELU)
    images.check_scales(backend, 5, dtype)
    images.check_largest(backend, dtype)
print("all images")
"""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all images\n")


# --- traffic ---------------------------------------------------------------------------------------------------------


def moved(backend, array):
    """How often an element of an array is read, and written, on the average."""
    owner = id(array.memory.base)
    return tuple(backend._device.traffic[owner, direction] for direction in ("read", "written"))


@pytest.mark.parametrize("case", PATCHES, ids=str)
def test_traffic_of_patches(case):
    """Every number of a patch that lies in the image is moved once, and of an image each that a patch meets."""
    window = Slide(*case[1:]).on(*case[0][1:])
    total = case[0][0] * window.places
    inside, met = REFERENCE.unfold(np.ones(case[0]), window, 0, total), np.zeros(case[0])
    REFERENCE.fold(np.ones((total, window.features)), window, 0, met, True)
    backend = make_backend()
    x = backend.zeros(case[0], np.dtype(np.float32))
    backend._device.traffic.clear()
    rows = backend.unfold(x, window, 0, total)
    assert moved(backend, x) == (inside.sum(), 0)
    assert moved(backend, rows) == (0, rows.size)
    backend._device.traffic.clear()
    backend.fold(rows, window, 0, x, True)
    assert moved(backend, x) == (np.count_nonzero(met),) * 2
    assert moved(backend, rows) == (rows.size if room.patches.Steps.of(window).apart else inside.sum(), 0)


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_traffic_of_pools(case):
    """A window reads what it covers; on the way back a number reads the windows that gave it, or cover it."""
    backend = make_backend()
    x, traffic = backend.from_host(drawn(case[0], "float32")[0]), backend._device.traffic
    for maximum in (True, False):
        window = Pooling(maximum, *case[1:])
        means = window._replace(maximum=False)
        covered = REFERENCE.pool(np.ones(case[0]), means)[0].sum() * np.prod(case[1])
        traffic.clear()
        y, places = backend.pool(x, window)
        assert moved(backend, x) == (pytest.approx(covered), 0)
        assert moved(backend, y) == (0, y.size)
        traffic.clear()
        gx = backend.pool_gradient(y, places, window, *case[0][2:])
        assert moved(backend, y) == (pytest.approx(y.size if maximum else covered), 0)
        assert moved(backend, gx) == (0, gx.size)


@pytest.mark.parametrize("shape", CHANNELS, ids=str)
def test_traffic_of_channels(shape):
    """Images and rows are read once and written once, however many sums there are."""
    backend = wide(make_backend())
    x, numbers = backend.from_host(drawn(shape, "float32")[0]), backend.from_host(np.ones(shape[1], np.float32))
    traffic = backend._device.traffic
    traffic.clear()
    y = backend.channels(x, numbers, numbers, RELU)
    assert moved(backend, x) == (x.size, 0)
    assert moved(backend, y) == (0, x.size)
    traffic.clear()
    gx, *_ = backend.channels_gradient(y, x, numbers, numbers, RELU)
    assert moved(backend, x) == moved(backend, y) == (x.size, 0)
    assert moved(backend, gx) == (0, x.size)
    if len(shape) == 4:
        traffic.clear()
        means = backend.means(x)
        assert moved(backend, x) == (x.size, 0)
        assert moved(backend, means) == (0, means.size)
        gx = backend.means_gradient(means, *shape[2:])
        assert moved(backend, gx) == (0, gx.size)
        assert moved(backend, means) == (means.size * -(-shape[2] * shape[3] // 4), means.size)


# --- mutants ---------------------------------------------------------------------------------------------------------

GUARDS = [
    # patches beyond those there are, features beyond those of a patch, places outside of the image
    (r"if lane >= tall:", "if False:"),
    (r"if k < tall:", "if True:"),
    (r" if before \+ t < features else int32\(FAR\)", ""),
    (r"if before \+ lane < features:", "if True:"),
    (r"(?:row|column) >= 0 and ", ""),
    (r" and (?:row < height|column < width)(?= and|:)", ""),
    # of a gathering: channels, and which patches lie on a place
    (r"while c < channels:", "while c < channels + 1:"),
    (r" and r (?:>= 0|< rows)", ""),
    (r"h \* SH \+ i \* DH == bottom and ", ""),
    (r" and w \* SW \+ j \* DW == right", ""),
    (r"if met > 0:", "if True:"),
    (r" if (?:top|left) > 0 else int64\(0\)", ""),
    (r"\((?:top \+ SH|left \+ SW) - 1\) // S[HW](?= if)", "int64(0)"),
    (r"min\((bottom // SH|right // SW), int64\(out_(?:height|width)\) - 1\)", r"\1"),
    # planes, their places, and windows that end with the image
    (r"plane < (?:x|y|gx)\.shape\[0\](?: \* count)? and ", ""),
    (r"place < (?:last|places)(?=:)", r"\g<0> + 1"),
    (r"max\((top|left), 0\)", r"\1"),
    (r"min\((top \+ kh|left \+ kw), (?:height|width)\)", r"\1"),
    (r" or \(value != value and found == found\)", ""),
    (r" and found == found", ""),
    (r" if (?:bottom >= kh|right >= kw) else int32\(0\)", ""),
    (r"\((?:bottom - kh|right - kw)\) // S[HW] \+ 1(?= if)", "int32(0)"),
    (r"min\((bottom // SH|right // SW), out_(?:height|width) - 1\)", r"\1"),
    (r"if not MAXIMUM or places\[window\] == place:", "if True:"),
    # channels: tails of vectors, trees, shares, columns
    (r"\(places \+ LANES - 1\) // LANES", "places // LANES"),
    (r"(?<=valid = plane \* places \+ begin, )places - begin", "int64(LANES)"),
    (r"(?<=valid = \(n \* count \+ channel\) \* places \+ begin, )places - begin", "int64(LANES)"),
    (r"(?<=store\(gx, plane \* places \+ begin, )places - begin", "int64(LANES)"),
    (r"if member < width:", "if True:"),
    (r"if member == 0 and (?=plane)", "if "),
    (r"(?<=if member == 0) and plane < x\.shape\[0\]", ""),
    (r"min\((split \* chunk \+ chunk), int64\(x\.shape\[0\]\)\)", r"\1"),
    (r"if column < count:", "if True:"),
    (r"column < count and ", ""),
    (r"n < x\.shape\[0\](?=:)", r"\g<0> + 1"),
    (r"i < (?:factor|weight)\.size", r"\g<0> + 1"),
]
MUTANTS = mutants.mutants(("patches.cuda", "pool.cuda"), GUARDS)


def checks(emulated):
    """Callables that raise where a kernel is wrong: together they reach every barrier, bound and tail."""
    for order in ("forward", "reverse"):
        for case in PATCHES:
            yield lambda case=case, order=order: check_patches(emulated.make_backend(order), case, "float32")
        for case in POOLS:
            yield lambda case=case, order=order: check_pool(emulated.make_backend(order), case, "float32")
            yield lambda case=case, order=order: check_means(emulated.make_backend(order), case[0], "float32")
        for shape in CHANNELS:
            yield lambda shape=shape, order=order: check_channels(emulated.make_backend(order), shape, "float32", GELU)
        yield lambda order=order: check_scales(emulated.make_backend(order), 37, "float32")
        yield lambda order=order: check_largest(emulated.make_backend(order))
        yield lambda order=order: check_channels(wide(emulated.make_backend(order)), (70, 3, 2, 4), "float32", RELU)
        for case in SHARED:
            yield lambda case=case, order=order: check_patches(narrow(emulated.make_backend(order)), case, "float32")


def test_no_guard_is_missed():
    assert sum("syncthreads" in name for name, *_ in MUTANTS) == 6
    assert len(MUTANTS) == 69


def assert_killed(mutant):
    _, module, mutate = mutant
    assert mutants.killed_by(module, mutate, checks) is not None


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if "syncthreads" in m[0]], ids=lambda m: m[0])
def test_mutants_without_a_barrier(mutant):
    assert_killed(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if "syncthreads" not in m[0]], ids=lambda m: m[0])
def test_mutants(mutant):
    assert_killed(mutant)


@pytest.mark.slow
def test_whole_kernels_pass():
    found = mutants.killed_by("pool.cuda", lambda source: source, checks)
    assert found is None, found


# --- machine code ----------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not COMPILED or machine_code.disassembler() is None,
    reason="needs numba-cuda and nvdisasm: pip install 'nblora[cuda12]' nvidia-cuda-nvdisasm",
)
KERNELS = 16
"""Kernels that the operations launch, patches of three kinds of windows and pools of two among them."""


def recorded(dtype):
    """(name, kernel, threads, types) of what the operations launch, with a device's blocks."""
    backend = recording_backend()

    def new(*shape):
        return backend.from_host(np.zeros(shape, dtype))

    x, rows, numbers = new(40, 8, 12, 12), new(600, 8), new(8)
    backend._device.launches.clear()
    for slide in (Slide((3, 3), (1, 1), (1, 1), (1, 1)), Slide((1, 1), (1, 1), (0, 0), (1, 1))):
        window = slide.on(*x.shape[1:])
        backend.fold(backend.unfold(x, window, 0, 40 * window.places), window, 0, x, True)
    for maximum in (True, False):
        window = Pooling(maximum, (3, 3), (2, 2), (1, 1))
        y, places = backend.pool(x, window)
        backend.pool_gradient(y, places, window, 12, 12)
    backend.means_gradient(backend.means(x), 12, 12)
    for given in (x, rows):
        backend.channels_gradient(backend.channels(given, numbers, numbers, GELU), given, numbers, numbers, GELU)
    backend.channel_scale(*[numbers] * 4, 1e-5)
    backend.channel_scale_gradient(*[numbers] * 4, 1e-5)
    return [one for one in launched(backend) if one[0] != "finish"]


def assert_code(name, kernel, threads, types, architecture, output, dtype):
    """It fits, and vectors are moved by the kernels that have them."""
    code = compile_kernel(kernel, types, architecture, output)
    assert_fits(code, kernel, threads)
    if name in ("of_images", "of_images_gradient"):
        assert code.count("LDG.E.128") > 0
    if name in ("of_images", "of_images_gradient", "means_gradient"):
        assert code.count("STG.E.128") > 0
    if dtype == "float32" and name != "of_images_gradient":  # whose block adds up in float64
        assert not [op for op in code.opcodes if op in ("DFMA", "DADD", "DMUL")], name
    return code


@needs_compiler
def test_machine_code():
    found = recorded("float32")
    assert len(found) == KERNELS
    for one in found:
        assert_code(*one, (9, 0), "ltoir", "float32")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "output"), COMBINATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_of_every_architecture(dtype, architecture, output):
    for one in recorded(dtype):
        assert_code(*one, architecture, output, dtype)


# --- the host's part -------------------------------------------------------------------------------------------------

STEPS = """
ones = np.ones(4, np.float32)
model = nblora.Sequential(
    nblora.Conv2d.random(3, 4, 3, padding=1, seed=0),
    nblora.layers.BatchNorm2d(ones, ones, ones, ones, activation="relu"),
    nblora.layers.MaxPool2d(4, 2),
    nblora.Conv2d.random(4, 4, 1, seed=1),
    nblora.layers.AvgPool2d(4, 2),
    nblora.layers.GlobalAvgPool2d(4),
    nblora.Dense.random(4, 2, seed=2),
)
model.adapt(["0", "3"], "lora", rank=2, seed=0, modules_to_save="6")
model.to("cuda")
bring = model[0]._backend.from_host
x, grad = bring(normal(6, 3, 8, 8)), bring(normal(6, 2))


def step():
    model(x)
    model.backward_update(grad, 0.1)


for _ in range(4):
    step()
say(steps=[counted(step) for _ in range(20)])
"""


@pytest.mark.slow
@stub.needs_driver[0]
@stub.needs_driver[1]
@stub.needs_driver[2]
def test_steps_of_a_convolutional_network_allocate_nothing(folder):
    """Nor do they wait, copy to the host, or launch more as they go on."""
    steps = stub.script(folder, STEPS)["steps"]
    assert all(step == steps[0] for step in steps)
    assert steps[0]["launch"] <= 35
    assert {steps[0][name] for name in ("alloc", "free", "d2h", "sync")} == {0}
