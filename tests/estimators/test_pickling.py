"""Layers cross process boundaries: what is learned and the device by name, nothing else."""

import copy
import pickle

import numpy as np
import pytest

import nblora


def layers(rng):
    dense = nblora.Dense(rng.normal(size=(5, 4)), rng.normal(size=4), activation="gelu")
    delta = nblora.DeltaLoRAAdapter(nblora.FullyConnected.random(5, 4, seed=1), 2, lora_dropout=0.3, seed=2)
    for name in ("lora_B", "delta", "velocity"):
        delta.set_parameter(name, rng.normal(size=delta.parameter_shape(name)))
    lora = nblora.LoRAAdapter(nblora.Dense.random(4, 3, seed=3), 2, freeze_base_layer=False, seed=4)
    return dense, delta, nblora.LoRALayer(3, 6, 2, seed=5), nblora.Sequential({"first": delta, "second": lora})


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("duplicate", [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy])
def test_round_trip(place, duplicate, rng):
    layer = layers(rng)[place]
    x = rng.normal(size=(3, layer.in_features)).astype(layer.dtype)
    layer.backward(np.ones_like(layer.forward(x)))
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert twin.device == layer.device
    assert twin.training == layer.training
    for name in layer.parameter_names():
        np.testing.assert_array_equal(twin.get_parameter(name), layer.get_parameter(name))
        assert not np.shares_memory(twin.get_parameter(name), layer.get_parameter(name))
    np.testing.assert_array_equal(twin.forward(x), layer.forward(x))  # dropout goes on alike
    with pytest.raises(RuntimeError):
        duplicate(layer).get_parameter_gradients()


def test_same_bytes_for_the_same_layer(rng):
    """joblib names its cache entries by the pickle."""
    layer = layers(rng)[3]
    assert pickle.dumps(layer) == pickle.dumps(layer.clone())


def test_closed_layer(rng):
    layer = layers(rng)[0]
    layer.close()
    with pytest.raises(RuntimeError, match="closed"):
        pickle.dumps(layer)
