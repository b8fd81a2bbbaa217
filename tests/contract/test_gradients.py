"""Central differences in float64, for every parameter and the input."""

import numpy as np
import pytest

import nblora
from tests import oracle
from tests.helpers import ADAPTERS, LAYOUTS, make_adapter, make_layer, randomise, relative_error

pytestmark = pytest.mark.small
STEP = 1e-6
BOUND = 1e-7  # of the differences, not of the gradients: the step's own error is about 1e-9


def loss(layer, x, weights):
    return float(np.sum(weights * layer.forward(x)))


def differences(function, vector):
    """The gradient of `function` at `vector` by central differences."""
    found = np.zeros(vector.size)
    for place in range(vector.size):
        ends = []
        for sign in (1, -1):
            moved = vector.copy()
            moved[place] += sign * STEP
            ends.append(function(moved))
        found[place] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def check(layer, rng):
    x = rng.normal(size=(2, 2, layer.in_features))
    weights = rng.normal(size=(2, 2, layer.out_features))
    layer.forward(x)
    grad_input = layer.backward(weights)
    gradients = layer.get_parameter_gradients()
    by_input = differences(lambda v: loss(layer, v.reshape(x.shape), weights), x.ravel())
    assert relative_error(grad_input.ravel(), by_input) < BOUND

    def at(vector):
        layer.set_parameters(vector)
        return loss(layer, x, weights)

    assert relative_error(gradients, differences(at, layer.get_parameters())) < BOUND


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_adapters(rng, kind, layout, activation, frozen):
    check(make_adapter(rng, kind, make_layer(rng, (4, 3), layout, activation=activation), rank=2, frozen=frozen), rng)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_layers(rng, layout, activation):
    check(make_layer(rng, (4, 3), layout, activation=activation), rng)


def test_low_rank_layer(rng):
    check(randomise(nblora.LoRALayer(5, 4, 2, 3.0, dtype="float64", seed=rng), rng), rng)


def test_model(rng):
    hidden = make_adapter(rng, base=make_layer(rng, (5, 4), activation="gelu"), frozen=False)
    head = make_adapter(rng, nblora.LoRAAdapter, make_layer(rng, (4, 3), nblora.FullyConnected), rank=2)
    check(nblora.Sequential(hidden, make_layer(rng, (4, 4), activation="tanh"), head), rng)


def test_an_adapter_on_a_model(rng):
    base = nblora.Sequential(make_layer(rng, (5, 4), activation="tanh"), make_layer(rng, (4, 3)))
    check(make_adapter(rng, base=base, rank=2, frozen=False), rng)
