"""`Conv1d`, `Conv2d` and adapters on them, against loops: values, gradients, updates, shapes, bad input, memory."""

import tracemalloc

import numpy as np
import pytest

import nblora
from nblora.backends import convolution, convolution_cpu, host, resolve
from nblora.backends.protocol import Base, Delta, LowRank, Operands
from nblora.backends.reference import ReferenceBackend
from nblora.kernels.patches.window import Slide
from tests import oracle
from tests.helpers import (
    ADAPTERS,
    DTYPES,
    assert_close,
    assert_disjoint,
    make_adapter,
    packed,
    packed_state,
    snapshot,
    state_of,
)

pytestmark = pytest.mark.small
LR = 0.05

# Sizes of the image, then kernel, stride, padding, dilation.
SLIDES = {
    "plain": ((5, 6), (3, 3), (1, 1), (0, 0), (1, 1)),
    "odd": ((7, 8), (2, 3), (2, 1), (1, 2), (1, 2)),
    "strided": ((9, 5), (1, 2), (3, 3), (0, 1), (2, 1)),
    "one": ((4, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
    "padded": ((1, 2), (3, 3), (2, 2), (4, 3), (1, 1)),
    "whole": ((3, 4), (3, 4), (1, 1), (0, 0), (1, 1)),
    "sparse": ((6, 9), (2, 1), (1, 4), (0, 0), (3, 1)),
}
each_slide = pytest.mark.parametrize("name", SLIDES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def make_conv(rng, name="odd", dtype="float64", activation="identity", bias=True, channels=(3, 4)):
    _, kernel, stride, padding, dilation = SLIDES[name]
    weight = rng.normal(size=(channels[1], channels[0], *kernel)).astype(dtype) / 3
    return nblora.Conv2d(
        weight,
        rng.normal(size=channels[1]).astype(dtype) if bias else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
    )


def make_layer(rng, kind, name, dtype, activation="identity", frozen=True):
    base = make_conv(rng, name, dtype, activation)
    return base if kind is None else make_adapter(rng, kind, base, frozen=frozen)


def images(rng, name, dtype, count=2, channels=3):
    return rng.normal(size=(count, channels, *SLIDES[name][0])).astype(dtype)


def slide_of(name):
    return oracle.Slide(*SLIDES[name][1:])


# --- patches, and many blocks ---------------------------------------------------------------------------------------


@each_slide
@each_dtype
@pytest.mark.parametrize("part", ["whole", "middle", "none"])
def test_patches(rng, name, dtype, part):
    x = images(rng, name, dtype, 3, 5)
    slide = slide_of(name)
    window = Slide(*SLIDES[name][1:]).on(*x.shape[1:])
    total = 3 * window.places
    start, stop = {"whole": (0, total), "middle": (total // 3, 2 * total // 3 + 1), "none": (0, 0)}[part]
    expected = oracle.patches(x, slide)[start:stop]
    backend = ReferenceBackend()
    np.testing.assert_array_equal(backend.unfold(x, window, start, stop), expected.astype(dtype))
    rows = np.zeros((total, window.features))
    rows[start:stop] = rng.normal(size=expected.shape)
    before = rng.normal(size=x.shape).astype(dtype)
    target = before.copy()
    backend.fold(np.ascontiguousarray(rows[start:stop], dtype), window, start, target, True)
    assert_close(target - before, oracle.unpatch(rows.astype(dtype), x.shape, slide), "float32")


# Channels, outputs and sizes beyond a block of channels, of rows, of places and of panels; then as above.
LARGE = {
    "3x3": (40, 70, (33, 31), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 narrow": (40, 70, (13, 14), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 narrow, stride 2": (70, 20, (9, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3, stride 2": (20, 70, (33, 64), (3, 3), (2, 2), (1, 1), (1, 1)),
    "7x7, stride 2": (3, 64, (45, 38), (7, 7), (2, 2), (3, 3), (1, 1)),
    "5x3, dilated": (33, 5, (20, 47), (5, 3), (1, 1), (2, 1), (2, 3)),
    "1x1": (300, 20, (10, 53), (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 narrow": (20, 300, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, stride 2": (70, 33, (13, 40), (1, 1), (2, 2), (0, 0), (1, 1)),
    "17x17": (2, 13, (40, 41), (17, 17), (1, 1), (8, 8), (1, 1)),
    "sequence": (12, 13, (1, 2000), (1, 9), (1, 3), (0, 4), (1, 2)),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("kind", [None, "lora", "delta", "masked"])
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
@each_dtype
def test_many_blocks(rng, monkeypatch, name, kind, train, dtype):
    """Against the reference in float64; a packed gradient in several pieces."""
    monkeypatch.setattr(convolution_cpu, "PACKED", 1 << 16)
    channels, outputs, sizes, *settings = LARGE[name]
    features, rank = channels * settings[0][0] * settings[0][1], 3

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    x, weight = normal(3, channels, *sizes), normal(outputs, features) / features**0.5
    low_rank = None if kind is None else LowRank(normal(features, rank) / features**0.5, normal(rank, outputs), 0.7)
    delta = Delta(normal(outputs, features), normal(outputs, features), 0.02, 0.9) if kind == "delta" else None
    operands = Operands(Base(weight, normal(outputs), True), low_rank, delta, 1, train)
    mask = 2 * (rng.random(x.shape) < 0.5).astype(dtype) if kind == "masked" else None
    slide = Slide(*settings)
    wide = _widened(operands)
    y, saved = (
        ReferenceBackend()
        .convolution(slide)
        .forward(x.astype(float), wide, None if mask is None else mask.astype(float), True)
    )
    grad = normal(*y.shape)
    expected = y, *ReferenceBackend().convolution(slide).backward(grad.astype(float), saved, wide)
    product = resolve("cpu").convolution(slide)
    y, saved = product.forward(x, operands, mask, True)
    found = y, *product.backward(grad, saved, operands)
    for value, wanted in zip(found, expected, strict=True):
        assert (value is None) == (wanted is None)
        if value is not None:
            assert value.dtype == dtype
            assert_close(value, wanted, dtype)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["3x3", "3x3 narrow, stride 2"])
def test_results_repeat_bit_for_bit_with_any_number_of_threads(rng, monkeypatch, kind, name):
    channels, outputs, sizes, kernel, stride, padding, _ = LARGE[name]
    weight = rng.normal(size=(outputs, channels, *kernel)).astype("float32")
    layer = make_adapter(rng, kind, nblora.Conv2d(weight, stride=stride, padding=padding))
    x = rng.normal(size=(3, channels, *sizes)).astype("float32")
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(host, "thread_count", lambda threads=threads: threads)
        y = layer.forward(x)
        found.append([y, layer.backward(np.cos(y)), layer.get_parameter_gradients()])
    for later in found[1:]:
        for value, first in zip(later, found[0], strict=True):
            np.testing.assert_array_equal(value, first)


def _widened(operands):
    """The same in float64."""

    def widen(value):
        if isinstance(value, tuple):
            return type(value)(*map(widen, value))
        return value.astype(float) if isinstance(value, np.ndarray) else value

    return widen(operands)


# --- values -------------------------------------------------------------------------------------------------------


@each_slide
@each_dtype
@pytest.mark.parametrize("kind", [None, *ADAPTERS])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_forward_and_gradients(rng, name, dtype, kind, count):
    layer = make_layer(rng, kind, name, dtype, "tanh", frozen=False)
    x, slide = images(rng, name, dtype, count), slide_of(name)
    y = layer.forward(x)
    assert_close(y, oracle.convolve(x, state_of(layer), slide))
    grad = rng.normal(size=y.shape).astype(dtype)
    expected = oracle.convolution_gradients(x, grad, state_of(layer), slide)
    assert_close(layer.backward(grad), expected["x"], dtype)
    assert_close(layer.get_parameter_gradients(), packed(expected), dtype)


@each_dtype
@pytest.mark.parametrize("kind", [None, *ADAPTERS])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "two calls"])
@pytest.mark.parametrize("piece", [1, 3000], ids=["pieces of one", "pieces"])
def test_three_updates_in_pieces(rng, monkeypatch, dtype, kind, frozen, fused, piece):
    monkeypatch.setattr(convolution, "PIECE", piece)
    monkeypatch.setattr(convolution_cpu, "PACKED", piece)
    layer, slide = make_layer(rng, kind, "odd", dtype, "gelu", frozen), slide_of("odd")
    state = state_of(layer)
    for _ in range(3):
        x = images(rng, "odd", dtype, 3)
        grad = rng.normal(size=layer.forward(x).shape).astype(dtype)
        expected = oracle.convolution_gradients(x, grad, state, slide)
        state = oracle.update(state, expected, LR)
        if fused:
            grad_input = layer.backward_update(grad, LR)
        else:
            grad_input = layer.backward(grad)
            layer.update_parameters(LR)
        assert_close(grad_input, expected["x"], dtype)
    assert_close(layer.get_parameters(), packed_state(state), dtype)
    if kind is nblora.DeltaLoRAAdapter:
        assert_close(layer.get_parameter("velocity"), state.velocity, dtype)


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
@each_slide
def test_central_differences(rng, kind, name):
    layer = make_layer(rng, kind, name, "float64", "sigmoid", frozen=False)
    x = images(rng, name, "float64")
    weights = rng.normal(size=layer.forward(x).shape)
    grad_input, grads, vector = layer.backward(weights), layer.get_parameter_gradients(), layer.get_parameters()
    step = 1e-6

    def difference(array, place, value):
        before = array.flat[place]
        sides = []
        for side in (step, -step):
            array.flat[place] = before + side
            sides.append(value())
        array.flat[place] = before
        return (sides[0] - sides[1]) / (2 * step)

    def of_parameters():
        layer.set_parameters(vector)
        return float((layer.forward(x) * weights).sum())

    for place in rng.integers(0, x.size, 6):
        found = difference(x, place, lambda: float((layer.forward(x) * weights).sum()))
        assert abs(found - grad_input.flat[place]) <= 1e-6 * max(1, np.abs(grad_input).max())
    for place in rng.integers(0, vector.size, 12):
        assert abs(difference(vector, place, of_parameters) - grads[place]) <= 1e-6 * max(1, np.abs(grads).max())


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
def test_a_sequence_is_an_image_of_one_row(rng, kind):
    weight, bias = rng.normal(size=(4, 3, 5)), rng.normal(size=4)
    flat = nblora.Conv1d(weight, bias, stride=2, padding=(3,), dilation=2, activation="relu")
    wide = nblora.Conv2d(weight[:, :, None], bias, stride=(1, 2), padding=(0, 3), dilation=(1, 2), activation="relu")
    if kind is not None:
        flat, wide = kind(flat, 2, seed=3), kind(wide, 2, seed=3)
    assert flat.in_features == wide.in_features == 15
    x = rng.normal(size=(2, 3, 19))
    y = flat.forward(x)
    np.testing.assert_array_equal(y, wide.forward(x[:, :, None])[:, :, 0])
    grad = rng.normal(size=y.shape)
    np.testing.assert_array_equal(flat.backward(grad), wide.backward(grad[:, :, None])[:, :, 0])
    np.testing.assert_array_equal(flat.get_parameter_gradients(), wide.get_parameter_gradients())


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
def test_one_sample_and_other_layouts_of_memory(rng, kind):
    layer = make_layer(rng, kind, "odd", "float64")
    x = images(rng, "odd", "float64")
    y = layer.forward(x)
    grad = rng.normal(size=y.shape)
    back = layer.backward(grad)
    assert_close(layer.forward(x[1]), y[1])
    assert_close(layer.backward(grad[1]), back[1])
    assert layer.forward(x[1]).shape == y.shape[1:]
    turned = np.asfortranarray(x)
    np.testing.assert_array_equal(layer.forward(turned), y)
    np.testing.assert_array_equal(layer.backward(np.asfortranarray(grad)), back)
    integers = rng.integers(-3, 4, x.shape)
    np.testing.assert_array_equal(layer.forward(integers), layer.forward(integers.astype(float)))
    assert_close(layer.forward(x.tolist()), y)


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
@each_dtype
def test_merging(rng, kind, dtype):
    adapter = make_layer(rng, kind, "odd", dtype, "tanh")
    merged = adapter.merge_to_original_layer()
    assert type(merged) is nblora.Conv2d
    base = adapter.base_layer
    for name in ("stride", "padding", "dilation", "kernel_size", "activation"):
        assert getattr(merged, name) == getattr(base, name)
    assert merged.weight.shape == base.weight.shape
    x = images(rng, "odd", dtype)
    assert_close(merged.forward(x), adapter.forward(x))
    assert_close(merged.get_parameter("weight"), oracle.merge(state_of(adapter)).weight, dtype)
    assert_disjoint(merged, adapter)


def test_logical_shapes(rng):
    adapter = make_layer(rng, nblora.DeltaLoRAAdapter, "odd", "float64", frozen=False)
    shapes = {name: adapter.parameter_shape(name) for name in adapter.parameter_names()}
    assert shapes == {
        "base.weight": (18, 4),
        "base.bias": (4,),
        "lora_A": (18, 3),
        "lora_B": (3, 4),
        "delta": (18, 4),
        "velocity": (18, 4),
    }
    weight = adapter.base_layer.weight
    np.testing.assert_array_equal(adapter.get_parameter("base.weight"), weight.reshape(4, 18).T)
    assert adapter.delta.shape == (18, 4)
    assert (adapter.in_features, adapter.out_features) == (18, 4)
    with pytest.raises(ValueError, match="rank"):
        nblora.LoRAAdapter(adapter.base_layer, 5)
    vector = adapter.get_parameters()
    assert vector.size == adapter.parameter_count == 18 * 4 + 4 + 18 * 3 + 3 * 4 + 18 * 4
    adapter.set_parameters(2 * vector)
    np.testing.assert_array_equal(adapter.get_parameters(), 2 * vector)
    good = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    assert adapter.validate_weights(good).is_valid
    assert adapter.load_weights(good, strict=True).success
    before = snapshot(adapter)
    assert adapter.load_weights(good | {"delta": np.zeros((4, 18))}).failed == ["delta"]
    np.testing.assert_array_equal(adapter.get_parameter("delta"), before["delta"])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_dropout_acts_on_the_image(rng, kind):
    adapter = make_adapter(rng, kind, make_conv(rng, "odd"), lora_dropout=0.4)
    x, slide = images(rng, "odd", "float64"), slide_of("odd")
    twin = adapter.clone()
    y = adapter.forward(x)
    mask = (twin._rng.random(x.shape, np.float64) >= 0.4) / 0.6
    state = state_of(adapter, mask)
    assert_close(y, oracle.convolve(x, state, slide))
    grad = rng.normal(size=y.shape)
    expected = oracle.convolution_gradients(x, grad, state, slide)
    assert_close(adapter.backward(grad), expected["x"])
    assert_close(adapter.get_parameter_gradients(), packed(expected))
    assert_close(adapter.eval().forward(x), oracle.convolve(x, state_of(adapter), slide))


def test_a_new_adapter_computes_its_base(rng):
    base, x = make_conv(rng, dtype="float32"), images(rng, "odd", "float32")
    adapter = nblora.LoRAAdapter(base, 2, seed=0)
    np.testing.assert_array_equal(adapter.forward(x), base.forward(x))
    adapter = make_adapter(rng, base=base)
    with adapter.disable_adapter():
        np.testing.assert_array_equal(adapter.forward(x), base.forward(x))


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
def test_life(rng, kind, tmp_path):
    import pickle

    layer = make_layer(rng, kind, "odd", "float64", "gelu")
    x = images(rng, "odd", "float64")
    y = layer.forward(x)
    layer.save(tmp_path / "layer.safetensors")
    for twin in (layer.clone(), pickle.loads(pickle.dumps(layer)), nblora.load(tmp_path / "layer.safetensors")):
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        np.testing.assert_array_equal(twin.forward(x), y)
        assert_disjoint(twin, layer)
    assert layer.compile() is layer
    described = layer.diagnostics()
    assert (described["in_features"], described["out_features"]) == (18, 4)
    layer.backward(np.ones_like(y))
    layer.close()
    with pytest.raises(RuntimeError, match="closed"):
        layer.forward(x)


def test_random():
    layer = nblora.Conv2d.random(3, 5, (2, 4), stride=2, padding=1, dtype="float64", seed=1, bias=False)
    assert layer.weight.shape == (5, 3, 2, 4)
    assert layer.bias is None
    assert layer.stride == (2, 2)
    assert 0.5 / np.sqrt(24) < np.abs(layer.weight).max() <= 1 / np.sqrt(24)
    again = nblora.Conv2d.random(3, 5, (2, 4), dtype="float64", seed=1, bias=False)
    np.testing.assert_array_equal(layer.weight, again.weight)
    assert nblora.Conv1d.random(3, 5, 2, seed=0).weight.shape == (5, 3, 2)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groups": 3}, ValueError, "groups must be 1, got 3.*Conv2d"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": (1, 2, 3)}, ValueError, "stride must be an integer or 2"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": "same"}, TypeError, "padding must be an integer"),
        ({"dilation": 1.5}, TypeError, "dilation must be an integer"),
        ({"activation": "softplus"}, ValueError, "activation"),
        ({"bias": np.zeros(3)}, ValueError, "bias must have shape"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        nblora.Conv2d(np.zeros((4, 3, 2, 2)), **settings)


def test_bad_arrays(rng):
    with pytest.raises(ValueError, match="weight must have shape"):
        nblora.Conv2d(np.zeros((4, 3, 2)))
    with pytest.raises(ValueError, match="weight must not be empty"):
        nblora.Conv1d(np.zeros((4, 3, 0)))
    layer = make_adapter(rng, base=make_conv(rng, "plain"))
    before = snapshot(layer)
    for shape in ((2, 4, 5, 6), (5, 6), (2, 2, 3, 5, 6), ()):
        with pytest.raises(ValueError, match=r"x must have shape \(N, 3, height, width\)"):
            layer.forward(np.zeros(shape))
    with pytest.raises(ValueError, match=r"x of shape \(2, 3, 2, 9\) is too small for Conv2d\(3, 4"):
        layer.forward(np.zeros((2, 3, 2, 9)))
    with pytest.raises(TypeError, match="x must be an array of real numbers"):
        layer.forward(np.zeros((2, 3, 5, 6), complex))
    y = layer.forward(images(rng, "plain", "float64"))
    for shape in (y.shape[1:], (*y.shape[:-1], 7), (2, 3, *y.shape[2:])):
        with pytest.raises(ValueError, match="grad_output must have"):
            layer.backward_update(np.zeros(shape), 0.1)
    assert snapshot(layer).keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(layer.get_parameter(name), value)


# --- neighbours, training, memory ----------------------------------------------------------------------------------


def test_in_a_row(rng):
    first, second = nblora.Conv2d.random(1, 4, 3, seed=0), nblora.Conv2d.random(4, 2, 3, stride=2, seed=1)
    model = nblora.Sequential(first, second)
    x = rng.normal(size=(3, 1, 8, 8)).astype("float32")
    np.testing.assert_array_equal(model.forward(x), second.forward(first.forward(x)))
    model.adapt("*", "delta", rank=2, seed=0)
    grad = rng.normal(size=model.forward(x).shape).astype("float32")
    assert model.backward_update(grad, 0.1).shape == x.shape
    assert_close(model.merge().forward(x), model.forward(x))
    with pytest.raises(ValueError, match="layer '0' has 4 outputs but layer '1' takes 1 inputs"):
        nblora.Sequential(first, first.clone())
    with pytest.raises(ValueError, match=r"too small for Conv2d\(4, 2"):
        model.forward(np.zeros((3, 1, 4, 4)))
    with pytest.raises(ValueError, match="takes no rows of features"):
        nblora.LoRAAdapter(model, 2)


def test_training(rng):
    model = nblora.Sequential(nblora.Conv1d.random(2, 3, 3, activation="relu", seed=0)).adapt("*", rank=2, seed=0)
    x, y = rng.normal(size=(12, 2, 6)), rng.normal(size=(12, 3, 4))
    history = nblora.fit(model, x, y, loss="mse", epochs=5, lr=0.05, seed=0)
    assert history["loss"][-1] < history["loss"][0]
    for wrong in (x[0], x[:, :1]):
        with pytest.raises(ValueError, match="x must"):
            nblora.fit(model, wrong, y, loss="mse")


def test_patches_are_never_all_there(rng, monkeypatch):
    """An image's patches take 18 MiB here; a step holds little more than images do."""
    monkeypatch.setattr(convolution, "PIECE", 1 << 18)
    monkeypatch.setattr(convolution_cpu, "PACKED", 1 << 18)
    layer = nblora.LoRAAdapter(nblora.Conv2d.random(8, 4, 3, padding=1, seed=0), 2, seed=0)
    x = rng.normal(size=(1, 8, 256, 256)).astype("float32")
    grad = np.ones((1, 4, 256, 256), "float32")
    layer.forward(x)
    layer.backward_update(grad, 0.1)  # compiled, and scratch made
    tracemalloc.start()
    layer.forward(x)
    layer.backward_update(grad, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    patches = 256 * 256 * 72 * 4
    assert peak < patches / 2
    assert max(convolution.PIECE, convolution_cpu.PACKED) <= 64 << 20
