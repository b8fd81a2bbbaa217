"""`Embedding` and adapters on it: the product of rows with a single 1, by number."""

import pickle

import numpy as np
import pytest

import nblora
from nblora.backends import resolve
from nblora.backends.protocol import Delta, Rows
from nblora.backends.reference import ReferenceBackend
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
COUNT, FEATURES = 11, 5
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_kind = pytest.mark.parametrize("kind", [None, *ADAPTERS])


def make(rng, kind, dtype="float64", frozen=False, **settings):
    base = nblora.Embedding(rng.normal(size=(COUNT, FEATURES)).astype(dtype))
    return base if kind is None else make_adapter(rng, kind, base, frozen=frozen, **settings)


def gradients(indices, grad, state):
    """The oracle's, without that of the rows with a single 1."""
    found = oracle.gradients(oracle.one_hot(indices, COUNT), grad.reshape(-1, FEATURES), state)
    return {name: value for name, value in found.items() if name != "x"}


@each_kind
@each_dtype
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (7,), (3, 4)])
def test_forward_and_gradients(rng, kind, dtype, shape):
    layer = make(rng, kind, dtype)
    x = rng.integers(0, COUNT // 2, shape)  # some rows several times, some never
    y = layer.forward(x)
    assert y.shape == (*shape, FEATURES)
    assert y.dtype == dtype
    assert_close(y.reshape(-1, FEATURES), oracle.forward(oracle.one_hot(x, COUNT), state_of(layer)))
    grad = rng.normal(size=y.shape).astype(dtype)
    assert layer.backward(grad) is None
    assert_close(layer.get_parameter_gradients(), packed(gradients(x, grad, state_of(layer))), dtype)


@each_kind
@each_dtype
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "two calls"])
def test_three_updates(rng, kind, dtype, frozen, fused):
    layer = make(rng, kind, dtype, frozen)
    state = state_of(layer)
    for _ in range(3):
        x = rng.integers(0, COUNT, (2, 3))
        grad = rng.normal(size=(2, 3, FEATURES)).astype(dtype)
        state = oracle.update(state, gradients(x, grad, state), LR)
        layer.forward(x)
        if fused:
            assert layer.backward_update(grad, LR) is None
        else:
            layer.backward(grad)
            layer.update_parameters(LR)
    assert_close(layer.get_parameters(), packed_state(state), dtype)
    if kind is nblora.DeltaLoRAAdapter:
        assert_close(layer.get_parameter("velocity"), state.velocity, dtype)  # rows that nobody took decay too


@each_dtype
def test_kernels_against_the_reference(rng, dtype):
    indices = rng.integers(0, COUNT // 2, 40)
    table, second, gradient = (rng.normal(size=(n, FEATURES)).astype(dtype) for n in (COUNT, COUNT, 40))
    starts = np.searchsorted(np.sort(indices), np.arange(COUNT + 1))
    rows = Rows(np.argsort(indices, kind="stable"), starts)
    found = []
    for backend in (resolve("cpu"), ReferenceBackend()):
        taken = [np.ones_like(gradient) for _ in range(3)]
        backend.take_rows([table], [0.5], indices, taken[0], False)
        backend.take_rows([table, second], [0.5, -2.0], indices, taken[1], False)
        backend.take_rows([table, second], [0.5, -2.0], indices, taken[2], True)
        summed, moved, D, V = np.full_like(table, np.nan), table.copy(), table.copy(), second.copy()
        backend.sum_rows(gradient, rows, 0.3, summed)
        backend.descend_rows(gradient, rows, 0.3, moved)
        backend.follow_rows(gradient, rows, Delta(D, V, 0.2, 0.8), 0.1)
        found.append([*taken, summed, moved, D, V])
    np.testing.assert_allclose(found[1][3], 0.3 * oracle.one_hot(indices, COUNT).T @ gradient, rtol=1e-4, atol=1e-5)
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@each_kind
def test_central_differences(rng, kind):
    layer = make(rng, kind)
    x = rng.integers(0, COUNT, (4, 3))
    weights = rng.normal(size=(4, 3, FEATURES))
    layer.forward(x)
    layer.backward(weights)
    grads, vector = layer.get_parameter_gradients(), layer.get_parameters()
    for place in rng.integers(0, vector.size, 20):
        sides = []
        for side in (1e-6, -1e-6):
            moved = vector.copy()
            moved[place] += side
            layer.set_parameters(moved)
            sides.append(float((layer.forward(x) * weights).sum()))
        assert abs((sides[0] - sides[1]) / 2e-6 - grads[place]) <= 1e-6 * max(1, np.abs(grads).max())


def test_results_repeat_bit_for_bit(rng):
    """With many threads, and rows that many samples share."""
    base = nblora.Embedding.random(50, 300, seed=0)
    x, grad = rng.integers(0, 7, 3000), rng.normal(size=(3000, 300)).astype("float32")
    runs = []
    for _ in range(3):
        layer = nblora.DeltaLoRAAdapter(base.clone(), 4, seed=0, freeze_base_layer=False)
        layer.set_parameter("lora_B", np.ones(layer.parameter_shape("lora_B")))
        layer.forward(x)
        layer.backward_update(grad, 0.1)
        runs.append(layer.get_parameters())
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


@pytest.mark.parametrize("kind", ADAPTERS)
@each_dtype
def test_merging_and_dropout(rng, kind, dtype):
    adapter = make(rng, kind, dtype, lora_dropout=0.9)
    merged = adapter.merge_to_original_layer()
    assert type(merged) is nblora.Embedding
    x = rng.integers(0, COUNT, 6)
    assert_close(merged.forward(x), adapter.forward(x))  # in training mode: there is no dropout
    assert_disjoint(merged, adapter)
    with adapter.disable_adapter():
        np.testing.assert_array_equal(adapter.forward(x), adapter.base_layer.forward(x))


@each_kind
def test_life(rng, kind, tmp_path):
    layer = make(rng, kind)
    x = rng.integers(0, COUNT, (2, 3))
    y = layer.forward(x)
    layer.save(tmp_path / "layer.safetensors")
    for twin in (layer.clone(), pickle.loads(pickle.dumps(layer)), nblora.load(tmp_path / "layer.safetensors")):
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        np.testing.assert_array_equal(twin.forward(x), y)
        assert_disjoint(twin, layer)
    assert layer.compile() is layer
    assert layer.diagnostics()["in_features"] == COUNT
    name = "weight" if kind is None else "base.weight"
    assert layer.parameter_shape(name) == (COUNT, FEATURES)


def test_random():
    layer = nblora.Embedding.random(2000, 3, dtype="float64", seed=0)
    assert layer.weight.shape == (2000, 3)
    assert abs(layer.weight.std() - 1) < 0.05
    np.testing.assert_array_equal(layer.weight, nblora.Embedding.random(2000, 3, dtype="float64", seed=0).weight)


def test_integers_are_kept_by_reference(rng):
    layer = nblora.Embedding(rng.normal(size=(5, 3)))
    x = np.array([1, 1, 4])
    layer.forward(x)
    x[...] = 2
    layer.backward(np.ones((3, 3)))
    gradient = layer.get_parameter_gradients().reshape(5, 3)
    np.testing.assert_array_equal(gradient, np.outer([0, 0, 3, 0, 0], np.ones(3)))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, list])
def test_integers_of_any_kind(rng, kind):
    layer, x = make(rng, nblora.LoRAAdapter), rng.integers(0, COUNT, 8)
    given = x.tolist() if kind is list else x.astype(kind)
    y = layer.forward(given)
    np.testing.assert_array_equal(y, layer.forward(x))
    assert layer.backward(np.ones_like(y)) is None
    assert layer.forward(np.arange(10)[::3]).shape == (4, FEATURES)


@each_kind
@pytest.mark.parametrize("wrong", [[1.0], np.zeros(2, np.float32), [True], ["a"], [1j], None])
def test_what_is_no_integer(rng, kind, wrong):
    with pytest.raises(TypeError, match="x must"):
        make(rng, kind).forward(wrong)


@each_kind
@pytest.mark.parametrize(
    ("wrong", "message"), [([3, 11], r"0 to 10, got 11 at \(1,\)"), ([[-1]], r"got -1 at \(0, 0\)")]
)
def test_an_index_out_of_range(rng, kind, wrong, message):
    layer = make(rng, kind)
    before = snapshot(layer)
    for one in (layer, nblora.Sequential(layer)):
        with pytest.raises(IndexError, match=message):
            one.forward(wrong)
    for name, value in before.items():
        np.testing.assert_array_equal(layer.get_parameter(name), value)


def test_at_the_begin_of_a_model(rng):
    model = nblora.Sequential(nblora.Embedding.random(9, 6, seed=0), nblora.Dense.random(6, 4, seed=1))
    model.adapt("*", "delta", rank=2, modules_to_save=None, seed=0)
    x = rng.integers(0, 9, (5, 3))
    y = model.forward(x)
    assert model.backward(np.ones_like(y)) is None
    before = model.get_parameters()
    model.forward(x)
    assert model.backward_update(np.ones_like(y), 0.1) is None
    assert (model.get_parameters() != before).any()
    labels = rng.integers(0, 4, (5, 3))
    history = nblora.fit(model, x, labels, loss="cross_entropy", epochs=8, lr=0.05, seed=0)
    assert history["loss"][-1] < history["loss"][0]
    assert_close(model.merge().forward(x), model.forward(x))
    with pytest.raises(IndexError, match="got 9"):
        nblora.fit(model, x + 1, labels, loss="cross_entropy")
