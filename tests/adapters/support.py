"""Bases of every kind, and adapters of any method that have learnt something."""

import numpy as np

import nblora


def bases(dtype="float64"):
    """Layers that adapters wrap, by name, each with an input."""
    rng = np.random.default_rng(5)
    made = {
        "dense": nblora.Dense.random(7, 6, activation="tanh", dtype=dtype, seed=1),
        "fully_connected": nblora.FullyConnected.random(7, 6, activation="gelu", bias=False, dtype=dtype, seed=2),
        "conv1d": nblora.Conv1d.random(3, 5, 3, padding=1, dtype=dtype, seed=3),
        "conv2d": nblora.Conv2d.random(3, 5, 3, stride=2, activation="tanh", dtype=dtype, seed=4),
        "embedding": nblora.Embedding.random(9, 6, dtype=dtype, seed=5),
    }
    inputs = {
        "dense": rng.normal(size=(4, 7)),
        "fully_connected": rng.normal(size=(2, 3, 7)),
        "conv1d": rng.normal(size=(2, 3, 8)),
        "conv2d": rng.normal(size=(2, 3, 7, 6)),
        "embedding": rng.integers(0, 9, (2, 5)),
    }
    return {name: (layer, inputs[name]) for name, layer in made.items()}


KINDS = tuple(bases())


def base_of(kind, dtype="float64"):
    """One of them, new, and its input."""
    layer, x = bases(dtype)[kind]
    return layer, x if x.dtype.kind == "i" else x.astype(dtype)


def taught(adapter, x, rng, steps=3):
    """The adapter after some steps along random gradients, none of its factors zero any more."""
    name = "lora_B" if "lora_B" in adapter.parameter_names() else "block"
    adapter.set_parameter(name, 0.3 * rng.normal(size=adapter.parameter_shape(name)))
    for _ in range(steps):
        adapter.backward_update(rng.normal(size=adapter.forward(x).shape), 0.02)
    return adapter
