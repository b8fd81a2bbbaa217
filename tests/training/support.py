"""Models and data to train on, naive losses and optimisers, and bit-for-bit comparisons."""

import numpy as np

import nblora
from nblora.layers import tree

# max|error| / max|reference|
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


def relative_error(computed, reference):
    computed, reference = np.asarray(computed, np.float64), np.asarray(reference, np.float64)
    assert computed.shape == reference.shape
    return np.max(np.abs(computed - reference)) / max(np.max(np.abs(reference)), 1e-300)


def assert_close(computed, reference):
    assert relative_error(computed, reference) <= TOLERANCE[np.asarray(computed).dtype.name]


def data(samples=37, features=7, classes=3, dtype="float64", seed=0):
    """Inputs and labels that a linear model can tell apart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, features)).astype(dtype)
    return x, np.argmax(x[:, :classes] + 0.1 * rng.normal(size=(samples, classes)), axis=1)


def randomise(model, seed=5):
    """Fill every B, delta and velocity: zeros hide errors."""
    rng = np.random.default_rng(seed)
    for name in model.parameter_names():
        if name.rpartition(".")[2] in ("lora_B", "delta", "velocity"):
            model.set_parameter(name, 0.1 * rng.normal(size=model.parameter_shape(name)))
    return model


def network(dtype="float64", adapter="delta", dropout=0.0, head=True, seed=1):
    """Frozen first layer, adapted middle, head trained or adapted too: both layouts, random B, delta and velocity."""
    model = nblora.Sequential(
        {
            "first": nblora.Dense.random(7, 6, activation="tanh", dtype=dtype, seed=seed),
            "middle": nblora.FullyConnected.random(6, 5, activation="gelu", dtype=dtype, seed=seed + 1),
            "head": nblora.Dense.random(5, 3, dtype=dtype, seed=seed + 2),
        }
    )
    target = "middle" if head else ["middle", "head"]
    saved = "head" if head else None
    model.adapt(target, adapter, rank=2, modules_to_save=saved, lora_dropout=dropout, seed=seed)
    return randomise(model)


def state(model):
    """Every parameter and random state of a model."""
    arrays = {name: model.get_parameter(name) for name in model.parameter_names()}
    return arrays, {name: g.bit_generator.state for name, g in tree.generators(model).items()}


def assert_same_state(computed, reference):
    """The two states are equal bit for bit."""
    assert list(computed[0]) == list(reference[0])
    for name, array in reference[0].items():
        np.testing.assert_array_equal(computed[0][name], array, err_msg=name)
    assert computed[1] == reference[1]


def without_times(history):
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "samples_per_second", "tokens_per_second")}
        for row in history
    ]


class Interrupt(nblora.training.Callback):
    """Raises at the given step."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_end(self, step, logs):
        if step == self.step:
            raise self.error


class Watch(nblora.training.Callback):
    """Keeps the model's state after every epoch."""

    def on_train_begin(self):
        self.states = []

    def on_epoch_end(self, epoch, logs):
        self.states.append(state(self.model))


# --- naive twins, float64 --------------------------------------------------------------------------------------------


def mean_squared_error(y, t):
    return np.mean((y - t) ** 2)


def softmax_cross_entropy(z, labels):
    total = 0.0
    for row, label in zip(z, labels, strict=True):
        total += np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[label]
    return total / len(z)


def binary_cross_entropy(z, t):
    p = 1 / (1 + np.exp(-z))
    return np.mean(-t * np.log(p) - (1 - t) * np.log(1 - p))


def sgd(p, gradients, lr, momentum=0.0):
    v = 0.0
    for g in gradients:
        v = momentum * v + g
        p = p - lr * v
    return p


def adamw(p, gradients, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.01):
    first = second = 0.0
    for step, g in enumerate(gradients, 1):
        p = p * (1 - lr * decay)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        p = p - lr * (first / (1 - b1**step)) / (np.sqrt(second / (1 - b2**step)) + eps)
    return p
