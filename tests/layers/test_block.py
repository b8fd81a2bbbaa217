"""Blocks of transformers written by hand, table and head one parameter: gradients and updates equal plain NumPy's."""

import numpy as np
import pytest

import nblora
from nblora import checks
from nblora.layers import Layer, tree
from nblora.layers.attention import Attention, Rotary
from nblora.layers.functions import Activation, Gate, fan_in, fan_out, join, rejoin
from nblora.layers.run import Sequences
from tests import oracle
from tests.helpers import relative_error

pytestmark = pytest.mark.small
COUNT, WIDTH, HEADS, KEY_HEADS, INNER, LENGTHS = 11, 8, 4, 2, 6, (3, 0, 1, 5)
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])


def projection(rng, inputs, outputs, activation="identity"):
    return nblora.FullyConnected(
        rng.normal(size=(outputs, inputs)) / 2, rng.normal(size=outputs), activation=activation
    )


class Llama(Layer, abstract=True):
    """Norm before: x + attention(norm(x)), then x + down(silu(gate(norm(x))) ∘ up(norm(x)))."""

    in_features, out_features, dtype = COUNT, COUNT, np.dtype(np.float64)

    def __init__(self, rng):
        size = WIDTH // HEADS
        self.table = nblora.Embedding(rng.normal(size=(COUNT, WIDTH)))
        self.norm1, self.norm2, self.norm3 = (nblora.RMSNorm(rng.normal(size=WIDTH)) for _ in range(3))
        self.q, self.k, self.v = (projection(rng, WIDTH, size * h) for h in (HEADS, KEY_HEADS, KEY_HEADS))
        self.o, self.gate, self.up = (projection(rng, WIDTH, w) for w in (WIDTH, INNER, INNER))
        self.down, self.head = projection(rng, INNER, WIDTH), nblora.FullyConnected(np.zeros((COUNT, WIDTH)))
        self.attention, self.gated = Attention(HEADS, KEY_HEADS, causal=True, rotary=Rotary(size, 100.0)), Gate("silu")
        self.head._tie(self.table)
        self._open(self.table._backend)

    def _as_input(self, name, value):
        return checks.as_indices(name, value)

    def _forward(self, x, run):
        run.sequences = Sequences.of(LENGTHS)
        x = self.table._forward(x, run)
        q, k, v = fan_out((self.q, self.k, self.v), self.norm1._forward(x, run), run)
        x = join(self.o._forward(self.attention._forward(q, k, v, run), run), x, run)
        gate, up = fan_out((self.gate, self.up), self.norm2._forward(x, run), run)
        x = join(self.down._forward(self.gated._forward(gate, up, run), run), x, run)
        return self.head._forward(self.norm3._forward(x, run), run)

    def _backward(self, grad, run):
        grad = self.norm3._backward(self.head._backward(grad, run), run)
        below = self.gated._backward(self.down._backward(grad, run), run)
        grad = rejoin(self.norm2._backward(fan_in((self.gate, self.up), below, run), run), grad, run)
        below = self.attention._backward(self.o._backward(grad, run), run)
        grad = rejoin(self.norm1._backward(fan_in((self.q, self.k, self.v), below, run), run), grad, run)
        return self.table._backward(grad, run)


def linear(x, p, name):
    return x @ p[f"{name}.weight"] + p.get(f"{name}.bias", 0)


def back(found, name, x, grad, p):
    """Gradients of a projection into `found`; its input's is returned."""
    found[f"{name}.weight"], found[f"{name}.bias"] = x.T @ grad, grad.sum(axis=0)
    return grad @ p[f"{name}.weight"].T


def heads(fold, q, k, v, *more):
    """`fold(q, k, v, grad, i)` for each head of each sequence, i being its place in q; results into new arrays."""
    size, results, begin = WIDTH // HEADS, [np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)], 0
    for length in LENGTHS:
        rows = slice(begin, begin + length)
        for h in range(HEADS):
            own, key = slice(h * size, h * size + size), slice(h // 2 * size, h // 2 * size + size)
            parts = fold(q[rows, own], k[rows, key], v[rows, key], *(m[rows, own] for m in more))
            for result, part, place in zip(results, parts, (own, key, key), strict=False):
                result[rows, place] += part
        begin += length
    return results


def turned(x, back=False):
    size, positions = WIDTH // HEADS, np.concatenate([np.arange(n) for n in LENGTHS])
    parts = [oracle.rotated(x[:, i : i + size], positions, size, 100.0, back=back) for i in range(0, x.shape[1], size)]
    return np.hstack(parts)


def plain(p, grad):
    """Output of the block of these parameters, and all gradients, with nothing of the library."""
    scale, eps = 1 / np.sqrt(WIDTH // HEADS), 1e-6
    norm = lambda x, i: oracle.norm(x, p[f"norm{i}.weight"], None, eps, False)  # noqa: E731
    x0 = p["table.weight"][TOKENS]
    n1 = norm(x0, 1)
    q, k, v = turned(linear(n1, p, "q")), turned(linear(n1, p, "k")), linear(n1, p, "v")
    a = heads(lambda q, k, v: (oracle.attention(q, k, v, True, scale)[0],), q, k, v)[0]
    x1 = x0 + linear(a, p, "o")
    n2 = norm(x1, 2)
    gate, up = linear(n2, p, "gate"), linear(n2, p, "up")
    act = oracle.each(oracle.act, gate, "silu")
    x2 = x1 + linear(act * up, p, "down")
    n3 = norm(x2, 3)
    y, found = n3 @ p["table.weight"].T, {}

    def norm_back(x, i, grad):
        gx, found[f"norm{i}.weight"], _ = oracle.norm_gradients(x, p[f"norm{i}.weight"], grad, eps, False)
        return gx

    table = grad.T @ n3
    g2 = norm_back(x2, 3, grad @ p["table.weight"])
    inner = back(found, "down", act * up, g2, p)
    g = back(found, "gate", n2, inner * up * oracle.each(oracle.act_derivative, gate, "silu"), p)
    g1 = g2 + norm_back(x1, 2, g + back(found, "up", n2, inner * act, p))
    ga = back(found, "o", a, g1, p)
    gq, gk, gv = heads(lambda *parts: oracle.attention_gradients(*parts, True, scale), q, k, v, ga)
    g = back(found, "q", n1, turned(gq, True), p) + back(found, "k", n1, turned(gk, True), p)
    g0 = g1 + norm_back(x0, 1, g + back(found, "v", n1, gv, p))
    np.add.at(table, TOKENS, g0)
    return y, found | {"table.weight": table}


def test_gradients_and_ten_fused_updates(rng):
    model = Llama(rng)
    p = {name: model.get_parameter(name) for name in model.parameter_names()}
    grad = rng.normal(size=(len(TOKENS), COUNT)) / 10
    y, exact = plain(p, grad)
    assert relative_error(model(TOKENS), y) < 1e-12
    assert model.backward(grad) is None
    for name, parameter, _ in model._trainable():
        assert relative_error(parameter.logical(parameter.gradient), exact[name]) < 1e-12, name
    for _ in range(10):
        y, exact = plain(p, grad)
        assert relative_error(model(TOKENS), y) < 1e-12
        model.backward_update(grad, 0.05)
        p = {name: p[name] - 0.05 * exact[name] for name in p}
    for name, value in p.items():
        assert relative_error(model.get_parameter(name), value) < 1e-12, name


def test_adapters_below_frozen_layers_get_the_same_gradients(rng):
    """Only q, above a frozen table: nothing is kept of what is below, and the last layers hand gradients through."""
    model = Llama(rng)
    grad = rng.normal(size=(len(TOKENS), COUNT))
    for layer in model.children().values():
        layer.trainable = layer is model.q
    p = {name: model.get_parameter(name) for name in model.parameter_names()}
    model(TOKENS)
    model.backward(grad)
    assert [name for name, _, _ in model._trainable()] == ["q.weight", "q.bias"]
    exact = plain(p, grad)[1]
    assert relative_error(model.get_parameter_gradients(), np.append(exact["q.weight"], exact["q.bias"])) < 1e-12


class Bert(Layer, abstract=True):
    """Norm after: norm(x + attention(x)), norm(x + down(gelu(up(x))))."""

    in_features, out_features, dtype = WIDTH, WIDTH, np.dtype(np.float64)

    def __init__(self, rng):
        self.q, self.k, self.v, self.o = (projection(rng, WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = projection(rng, WIDTH, INNER), projection(rng, INNER, WIDTH)
        self.norm1, self.norm2 = (nblora.LayerNorm(rng.normal(size=WIDTH), rng.normal(size=WIDTH)) for _ in range(2))
        self.attention, self.act = Attention(HEADS), Activation("gelu")
        self._open(self.q._backend)

    def _forward(self, x, run):
        run.sequences = Sequences.of(LENGTHS)
        q, k, v = fan_out((self.q, self.k, self.v), x, run)
        x = self.norm1._forward(join(self.o._forward(self.attention._forward(q, k, v, run), run), x, run), run)
        y = self.down._forward(self.act._forward(self.up._forward(x, run), run), run)
        return self.norm2._forward(join(y, x, run), run)

    def _backward(self, grad, run):
        grad = self.norm2._backward(grad, run)
        below = self.up._backward(self.act._backward(self.down._backward(grad, run), run), run)
        grad = self.norm1._backward(rejoin(below, grad, run), run)
        below = self.attention._backward(self.o._backward(grad, run), run)
        return rejoin(fan_in((self.q, self.k, self.v), below, run), grad, run)


def test_central_differences_of_a_block_with_norms_after(rng):
    model, x = Bert(rng), rng.normal(size=(len(TOKENS), WIDTH))
    grad = rng.normal(size=x.shape)
    model(x)
    gx, vector = model.backward(grad), model.get_parameters()
    gradients = model.get_parameter_gradients()

    def value():
        return float((model(x) * grad).sum())

    def set_x(moved):
        x[...] = moved

    for start, gradient, assign in ((x.copy(), gx, set_x), (vector, gradients, model.set_parameters)):
        direction = rng.normal(size=start.shape)
        values = []
        for step in (1e-6, -1e-6):
            assign(start + step * direction)
            values.append(value())
        assign(start)
        slope = float((gradient * direction).sum())
        assert abs((values[0] - values[1]) / 2e-6 - slope) <= 1e-6 * max(1, abs(slope))


# --- one parameter of two layers -------------------------------------------------------------------------------------


def tied(rng, turned=True):
    first = nblora.Embedding(rng.normal(size=(5, 4))) if turned else nblora.Dense(rng.normal(size=(4, 4)))
    last = nblora.FullyConnected(np.zeros((5, 4))) if turned else nblora.Dense(np.zeros((4, 4)))
    last._tie(first)
    return nblora.Sequential({"first": first, "last": last})


@pytest.mark.parametrize("turned", [True, False])
def test_it_is_named_counted_and_moved_once(rng, turned):
    model = tied(rng, turned)
    assert model.parameter_names() == ["first.weight"]
    assert model.parameter_count == (20 if turned else 16)
    assert tree.ties(model) == {"last.weight": "first.weight"}
    model["first"].trainable = False
    assert model.parameter_count == (20 if turned else 16)  # the other trains it
    model["last"].trainable = False
    assert model.parameter_count == 0


@pytest.mark.parametrize("turned", [True, False])
def test_it_comes_back_from_files_and_clones_as_one(rng, turned, tmp_path):
    model, x = tied(rng, turned), np.array([1, 4]) if turned else rng.normal(size=(2, 4))
    model.save(tmp_path / "model")
    for twin in (nblora.load(tmp_path / "model"), model.clone()):
        np.testing.assert_array_equal(twin(x), model(x))
        assert twin.parameter_names() == ["first.weight"]
        assert twin["last"]._weight is twin["first"]._weight
        assert twin["last"].weight is not model["last"].weight


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fit_updates_it_once_by_both_gradients(rng, optimizer):
    model = tied(rng)
    before = model.get_parameter("first.weight")
    nblora.fit(
        model, np.array([1, 4]), np.array([0, 2]), loss="cross_entropy", optimizer=optimizer, lr=0.1, epochs=1,
        batch_size=2, progress=False, shuffle=False,
    )  # fmt: skip
    x = before[[1, 4]]
    z = np.exp(x @ before.T)
    slope = z / z.sum(axis=1, keepdims=True)
    slope[[0, 1], [0, 2]] -= 1
    gradient = slope.T @ x / 2
    np.add.at(gradient, [1, 4], slope @ before / 2)
    after = model.get_parameter("first.weight")
    if optimizer == "sgd":
        assert relative_error(after, before - 0.1 * gradient) < 1e-12
    else:
        np.testing.assert_array_equal(
            np.sign(before - after)[abs(gradient) > 1e-3], np.sign(gradient)[abs(gradient) > 1e-3]
        )


def test_layers_that_do_not_fit_share_nothing(rng):
    with pytest.raises(ValueError, match=r"FullyConnected\(5, 4.* cannot share the weight of Embedding\(5, 4\)"):
        nblora.FullyConnected(np.zeros((4, 5)))._tie(nblora.Embedding(np.zeros((5, 4))))


def test_merging_keeps_what_is_still_one(rng):
    model = tied(rng)
    assert model.merge().parameter_names() == ["first.weight"]
    model.adapt("last", rank=2, seed=0)
    model["last"].set_parameter("lora_B", rng.normal(size=(2, 5)))
    merged = model.merge()
    assert merged.parameter_names() == ["first.weight", "last.weight"]
    assert relative_error(merged(np.array([1, 3])), model(np.array([1, 3]))) < 1e-12
