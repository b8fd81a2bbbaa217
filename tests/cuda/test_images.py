"""Operations on images: values on the emulator against the reference, machine code, traffic, and mutants."""

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from nblora.backends import reference
from nblora.backends.blocks import Pooling
from nblora.backends.cuda import images as room
from nblora.kernels.common.cuda.target import COMPILED
from nblora.kernels.common.elementwise import GELU, IDENTITY, QUICK_GELU, RELU, SILU
from nblora.kernels.patches.window import Slide
from tests.cuda import machine_code
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.cuda.machine_code import ARCHITECTURES, OUTPUTS, assert_fits, compile_kernel
from tests.cuda.recorded import launched, recording_backend

REFERENCE = reference.ReferenceBackend()
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
DTYPES = list(TOLERANCE)


def same(found, expected, dtype, backend):
    """Values, shape and dtype; float32 within its rounding of the reference's in float64."""
    found = backend.to_host(found)
    assert found.dtype == np.dtype(dtype)
    assert found.shape == expected.shape
    scale = abs(expected[np.isfinite(expected)]).max(initial=1.0)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


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
        for add in (True, False)[: 2 if room.patches.Steps.of(window).apart else 1]:
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_shared_among_blocks(dtype):
    """Features, and channels, that blocks share out and go round in."""
    for case in (((1, 60, 2, 2), (1, 1), (1, 1), (0, 0), (1, 1)), ((1, 30, 3, 2), (2, 2), (1, 1), (1, 1), (1, 1))):
        backend = make_backend("random")
        backend._device.waves, backend._device.multiprocessors = 1, 2
        check_patches(backend, case, dtype)
        assert any(grid[1] > 1 for _, grid, *_ in backend._device.launches)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_the_largest_and_of_equal_ones_the_first(dtype):
    nan, inf = np.nan, np.inf
    x = np.array([[[[1, nan], [nan, 5]]], [[[3, 3], [3, 3]]], [[[-inf, -inf], [-inf, -inf]]], [[[0, inf], [2, nan]]]])
    for window in (Pooling(True, (2, 2), (2, 2), (0, 0)), Pooling(True, (2, 2), (2, 2), (1, 1))):
        for backend in (make_backend(), REFERENCE):
            y, places = backend.pool(backend.from_host(x.astype(dtype)), window)
            expected = [nan, 3, -inf, nan] if window.padding == (0, 0) else [*x.ravel()]
            np.testing.assert_array_equal(backend.to_host(y).ravel(), expected)
            found = backend.to_host(places).ravel()
            np.testing.assert_array_equal(found, [1, 0, 0, 3] if window.padding == (0, 0) else [*range(4)] * 4)


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
        backend = make_backend(order)
        backend._device.multiprocessors = 8
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
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_of_every_architecture(dtype, architecture, output):
    for one in recorded(dtype):
        assert_code(*one, architecture, output, dtype)
