"""The tree: containers of one's own, layers that run twice, what a run keeps, and what nobody computes."""

import threading

import numpy as np
import pytest

import nblora
from nblora.backends import resolve
from nblora.layers import tree
from nblora.layers.run import Run
from nblora.layers.sinks import Held, Sweep
from nblora.models.model import Model
from tests.helpers import assert_close, assert_disjoint, make_adapter, make_layer, randomise, snapshot

pytestmark = pytest.mark.small


class Block(Model):
    """x + second(first(x)) + other(x): a residual, and two readers of one value."""

    def __init__(self, first, second, other):
        self.first, self.second, self.other = first, second, other
        self.in_features, self.out_features, self.dtype = first.in_features, second.out_features, first.dtype
        self._open(first._backend)

    def _around(self, children):
        return Block(**children)

    def _forward(self, x, run):
        live = run.live
        inner = self.second._forward(self.first._forward(x, run), run)
        below, run.live = run.live, live
        other = self.other._forward(x, run)
        run.live = run.live or below
        return x + inner + other

    def _backward(self, grad, run):
        inner = self.second._backward(grad, run)
        inner = None if inner is None else self.first._backward(inner, run)
        other = self.other._backward(grad, run)
        return None if inner is None or other is None else grad + inner + other


class Twice(Model):
    """layer(layer(x))."""

    def __init__(self, layer):
        self.layer = layer
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.dtype
        self._open(layer._backend)

    def _around(self, children):
        return Twice(**children)

    def _forward(self, x, run):
        return self.layer._forward(self.layer._forward(x, run), run)

    def _backward(self, grad, run):
        grad = self.layer._backward(grad, run)
        return None if grad is None else self.layer._backward(grad, run)


def block(rng):
    return Block(
        make_layer(rng, (6, 5), activation="tanh"),
        make_layer(rng, (5, 6), nblora.FullyConnected),
        make_layer(rng, (6, 6), activation="gelu"),
    )


CONTAINERS = {
    "block": block,
    "adapted block": lambda rng: adapted(block(rng), rng),
    "twice": lambda rng: Twice(make_layer(rng, (6, 6), activation="sigmoid")),
    "adapter twice": lambda rng: Twice(make_adapter(rng, base=make_layer(rng, (6, 6), activation="tanh"))),
}


def adapted(model, rng):
    model.adapt(["first", "other"], "delta", rank=2, modules_to_save="second", seed=0)
    for _, layer, _ in tree.walk(model):
        if isinstance(layer, nblora.DeltaLoRAAdapter):
            randomise(layer, rng)
    return model


@pytest.fixture(params=CONTAINERS, ids=str)
def model(request, rng):
    return CONTAINERS[request.param](rng)


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 6))


@pytest.fixture
def grad(rng):
    return rng.normal(size=(4, 6))


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_are_central_differences(model, x, grad):
    model(x)
    grad_input = model.backward(grad)
    gradients, vector = model.get_parameter_gradients(), model.get_parameters()

    def differences(values, evaluate):
        found = np.zeros(values.size)
        for place in range(values.size):
            step = np.zeros(values.size)
            step[place] = 1e-6
            found[place] = (evaluate(values.ravel() + step) - evaluate(values.ravel() - step)) / 2e-6
        return found

    def of_parameters(values):
        model.set_parameters(values)
        return float(np.sum(grad * model(x)))

    expected = differences(vector, of_parameters)
    model.set_parameters(vector)
    np.testing.assert_allclose(gradients, expected, rtol=1e-6, atol=1e-7)
    expected = differences(x, lambda values: float(np.sum(grad * model(values.reshape(x.shape)))))
    np.testing.assert_allclose(grad_input.ravel(), expected, rtol=1e-6, atol=1e-7)


def test_one_sweep_equals_the_two_calls(model, x, grad):
    """Also for a layer that ran twice, whose gradient is whole only at the end."""
    before, after = snapshot(model), []
    two_calls = lambda: (model.backward(grad), model.update_parameters(0.1))  # noqa: E731 - beside its counterpart
    for update in (two_calls, lambda: model.backward_update(grad, 0.1)):
        model.load_weights(before)
        model(x)
        update()
        after.append(snapshot(model))
    for name, value in after[0].items():
        assert_close(after[1][name], value)
    assert any(not np.array_equal(after[0][name], value) for name, value in before.items())


def test_several_backwards_accumulate_from_one_forward(model, x, grad):
    model(x)
    model.backward(grad)
    once = model.get_parameter_gradients()
    model.backward(2 * grad, accumulate=True)
    assert_close(model.get_parameter_gradients(), 3 * once)


# --- what nobody computes, and nobody keeps ----------------------------------------------------------------------


def train(model, x, grad):
    """A step of training, of whose input nobody wants the gradient; what it gave back, and its run."""
    run = Run(model._backend, training=True, live=False)
    model._forward(x, run)
    return model._backward(grad, run.back(Held())), run


def test_nothing_below_the_lowest_trained_layer_is_kept_or_runs_backward(rng, monkeypatch):
    layers = [make_layer(rng, (6, 6), activation="tanh") for _ in range(4)]
    model = nblora.Sequential(*layers)
    model.adapt("2", "lora", rank=2, seed=0)
    asked = []
    original = type(resolve("cpu")).backward

    def spy(self, grad, saved, operands, input_gradient=True):
        asked.append((operands.low_rank is not None, input_gradient))
        return original(self, grad, saved, operands, input_gradient=input_gradient)

    monkeypatch.setattr(type(resolve("cpu")), "backward", spy)
    found, run = train(model, rng.normal(size=(4, 6)), rng.normal(size=(4, 6)))
    assert found is None
    assert asked == [(False, True), (True, False)]  # the frozen head, then the adapter; nobody asks for its input's
    assert [run._kept[layer][0] is None for layer in model] == [True, True, False, False]


def test_the_first_trained_readers_of_one_value_compute_no_input_gradient(rng, monkeypatch):
    model, asked = adapted(block(rng), rng), []
    original = type(resolve("cpu")).backward

    def spy(self, grad, saved, operands, input_gradient=True):
        asked.append((operands.activation, input_gradient))
        return original(self, grad, saved, operands, input_gradient=input_gradient)

    monkeypatch.setattr(type(resolve("cpu")), "backward", spy)
    found, _ = train(model, rng.normal(size=(4, 6)), rng.normal(size=(4, 6)))
    assert found is None
    assert asked == [(0, True), (3, False), (2, False)]


def test_evaluation_keeps_nothing(model, x):
    run = Run(model._backend)
    model._forward(x, run)
    assert run._kept == {}


# --- runs of one's own -------------------------------------------------------------------------------------------


def test_threads_train_one_model_each_with_a_run_of_its_own(rng):
    model = nblora.Sequential(make_layer(rng, (6, 6), activation="tanh"), make_layer(rng, (6, 6)))
    inputs = [(rng.normal(size=(n + 1, 6)), rng.normal(size=(n + 1, 6))) for n in range(8)]

    def gradients(x, grad):
        run, sweep = Run(model._backend, training=True), Sweep(0.0, 0.0)
        sweep.fuses = lambda operands: False
        model._forward(x, run)
        barrier.wait()
        model._backward(grad, run.back(sweep))
        return [sweep.pending[p] for p in tree.trained(model, [])]

    barrier = threading.Barrier(1)
    expected = [gradients(*pair) for pair in inputs]
    barrier, found = threading.Barrier(len(inputs)), {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: gradients(*inputs[n])})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, arrays in enumerate(expected):
        for array, reference in zip(found[place], arrays, strict=True):
            assert_close(array, reference)


def test_a_forward_of_a_part_leaves_the_model_its_own(rng, x, grad):
    model = block(rng)
    twin = (
        model.clone() if hasattr(model, "_config_of") else Block(*(part.clone() for part in model.children().values()))
    )
    model(x)
    model.first(rng.normal(size=(9, 6)))
    twin(x)
    assert_close(model.backward_update(grad, 0.1), twin.backward_update(grad, 0.1))
    assert_close(model.get_parameters(), twin.get_parameters())


@pytest.mark.parametrize("spoil", ["reset_state", "eval", "update"])
def test_a_part_that_was_changed_makes_the_forward_stale(rng, x, grad, spoil):
    model = block(rng)
    model(x)
    before = snapshot(model)
    if spoil == "update":
        model.first.zero_gradients()
        model.first.update_parameters(0.1)
    else:
        getattr(model.first, spoil)()
    with pytest.raises(RuntimeError, match="forward"):
        model.backward_update(grad, 0.1)
    for name, value in snapshot(model).items():
        np.testing.assert_array_equal(value, before[name])


# --- walks -------------------------------------------------------------------------------------------------------


def test_names_modes_counts_and_moves_follow_from_the_attributes(rng):
    model = block(rng)
    assert model.parameter_names() == [
        f"{part}.{name}" for part in ("first", "second", "other") for name in ("weight", "bias")
    ]
    assert model.parameter_count == sum(part.parameter_count for part in model.children().values())
    model.eval()
    assert not any(part.training for part in model.children().values())
    assert model.to("cpu") is model


def test_adapting_and_merging_any_tree(rng, x):
    model = block(rng)
    expected = model(x)
    adapted(model, rng)
    changed = model(x)
    assert not np.allclose(changed, expected)
    with model.disable_adapter():
        assert_close(model(x), expected)
    merged = model.merge()
    assert type(merged) is Block
    assert_disjoint(merged, model)
    assert_close(merged(x), changed)


def test_one_parameter_of_two_layers_is_one(rng):
    one, two = make_layer(rng, (6, 6)), make_layer(rng, (6, 6))
    two._weight = one._weight
    model = nblora.Sequential(one, two)
    before, x, grad = model["0"].weight.copy(), rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    model(x)
    model.backward(grad)
    total = model["0"]._weight.gradient
    first, second = make_layer(rng, (6, 6)), make_layer(rng, (6, 6))
    for plain, layer in ((first, one), (second, two)):
        plain.load_weights({"weight": layer.get_parameter("weight"), "bias": layer.get_parameter("bias")})
    separate = nblora.Sequential(first, second)
    separate(x)
    separate.backward(grad)
    assert_close(total, first._weight.gradient + second._weight.gradient)
    np.testing.assert_array_equal(before, model["0"].weight)
