"""Builders of layers and adapters with random contents, their oracle state, and the one comparison."""

import numpy as np

import nblora
from tests import oracle

# The only tolerances: max|error| / max|reference|.
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}

DTYPES = ("float32", "float64")
LAYOUTS = (nblora.Dense, nblora.FullyConnected)
ADAPTERS = (nblora.LoRAAdapter, nblora.DeltaLoRAAdapter)


def relative_error(computed, reference):
    """max|computed - reference| / max|reference|; 0 for what is empty."""
    computed, reference = np.asarray(computed, np.float64), np.asarray(reference, np.float64)
    assert computed.shape == reference.shape
    if reference.size == 0:
        return 0.0
    error, scale = np.max(np.abs(computed - reference)), np.max(np.abs(reference))
    return float(error / scale) if scale > 0 else float(error)


def assert_close(computed, reference, dtype=None):
    """Within the tolerance of `dtype`, by default that of `computed`."""
    error = relative_error(computed, reference)
    bound = TOLERANCE[np.dtype(dtype or np.asarray(computed).dtype)]
    assert error <= bound, f"relative error {error:.3g} above {bound:.3g}"


def make_layer(rng, sizes=(7, 5), layout=nblora.Dense, dtype="float64", activation="identity", bias=True):
    """A layer with random weight and bias."""
    shape = sizes if layout is nblora.Dense else sizes[::-1]
    weight = rng.normal(size=shape).astype(dtype) / np.dtype(dtype).type(np.sqrt(sizes[0]))
    return layout(weight, rng.normal(size=sizes[1]).astype(dtype) if bias else None, activation=activation)


def randomise(adapter, rng):
    """Fill B, and delta and velocity where there are any: zeros hide errors."""
    for name in ("lora_B", "delta", "velocity"):
        if name in adapter.parameter_names():
            adapter.set_parameter(name, rng.normal(size=adapter.parameter_shape(name)))
    return adapter


def make_adapter(rng, kind=nblora.DeltaLoRAAdapter, base=None, rank=3, alpha=2.0, frozen=True, **settings):
    """An adapter with random B, delta and velocity."""
    base = make_layer(rng) if base is None else base
    seed = int(rng.integers(2**32))  # a generator would be shared with the adapter
    return randomise(kind(base, rank, alpha, freeze_base_layer=frozen, seed=seed, **settings), rng)


def state_of(layer, mask=None):
    """The oracle's state of a `Dense`, `FullyConnected`, `LoRALayer` or adapter, in float64 copies."""
    arrays = {
        name.removeprefix("base."): layer.get_parameter(name).astype(np.float64) for name in layer.parameter_names()
    }
    base = getattr(layer, "base_layer", layer)
    adapted = base is not layer
    return oracle.State(
        weight=arrays.get("weight"),
        bias=arrays.get("bias"),
        A=arrays.get("lora_A"),
        B=arrays.get("lora_B"),
        delta=arrays.get("delta"),
        velocity=arrays.get("velocity"),
        scaling=getattr(layer, "scaling", 1.0),
        delta_scaling=getattr(layer, "delta_scaling", 0.1),
        momentum=getattr(layer, "momentum_factor", 0.9),
        activation=getattr(base, "activation", "identity"),
        train_base=not layer.is_base_layer_frozen if adapted else layer.trainable,
        mask=mask,
    )


def packed(by_name):
    """Values under oracle names as one vector in the packing order of `get_parameters`."""
    order = ("weight", "bias", "lora_A", "lora_B", "delta")
    return np.concatenate([by_name[name].ravel() for name in order if name in by_name])


def packed_state(state):
    """The trainable values of an oracle state, packed."""
    by_name = {"lora_A": state.A, "lora_B": state.B, "delta": state.delta}
    if state.train_base:
        by_name |= {"weight": state.weight, "bias": state.bias}
    return packed({name: value for name, value in by_name.items() if value is not None})


def snapshot(layer):
    """Copies of every named parameter."""
    return {name: layer.get_parameter(name) for name in layer.parameter_names()}


def assert_unchanged(layer, before):
    """Every named parameter is bit for bit what it was."""
    after = snapshot(layer)
    assert list(after) == list(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def memory_of(layer):
    """Every array that the layer or what it holds keeps, as objects."""
    found = []
    for value in vars(layer).values():
        if isinstance(value, np.ndarray):
            found.append(value)
        elif isinstance(value, nblora.layers.Layer):
            found.extend(memory_of(value))
        elif isinstance(value, dict):
            for item in value.values():
                if isinstance(item, np.ndarray):
                    found.append(item)
                elif isinstance(item, nblora.layers.Layer):
                    found.extend(memory_of(item))
    return found


def assert_disjoint(first, second):
    """The two objects share no memory."""
    for one in memory_of(first):
        for other in memory_of(second):
            assert not np.shares_memory(one, other)
