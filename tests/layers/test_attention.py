"""Attention over ragged rows: kernels and reference against loops; gradients; the layer's own checks."""

import numpy as np
import pytest

from nblora.backends import resolve
from nblora.backends.blocks import weights_kept
from nblora.layers.attention import Attention, Rotary
from nblora.layers.run import Run, Sequences
from tests import oracle
from tests.helpers import DTYPES, assert_close

from .support import BACKENDS, apart, each_head, heads_of

small = pytest.mark.small


def expected(q, k, v, grad, shape):
    size = q.shape[1] // shape.heads
    o, gq, gk, gv = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for at, place in each_head(shape, size):
        o[at] = oracle.attention(q[at], k[place], v[place], shape.causal, shape.scale)[0]
        parts = oracle.attention_gradients(q[at], k[place], v[place], grad[at], shape.causal, shape.scale)
        gq[at], gk[place], gv[place] = parts[0], gk[place] + parts[1], gv[place] + parts[2]
    return o, gq, gk, gv


def check(rng, backend, dtype, lengths, key_lengths, heads, key_heads, size, causal, against=expected):
    shape = heads_of(lengths, key_lengths, heads, key_heads, causal, 0.7 / np.sqrt(size))
    q, grad = rng.normal(size=(2, sum(lengths), heads * size)).astype(dtype)
    k, v = rng.normal(size=(2, sum(key_lengths), key_heads * size)).astype(dtype)
    o, sums = backend.attention(q, k, v, shape)
    computed = o, *backend.attention_gradient(grad, q, k, v, o, sums, shape)
    exact = [a.astype(np.float64) for a in (q, k, v, grad)]
    for found, reference in zip(computed, against(*exact, shape), strict=True):
        assert found.dtype == q.dtype
        assert_close(found, reference)
    return o, computed


@small
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(2, 1, 5), (3, 3, 16), (4, 2, 3)])
def test_against_loops(rng, backend, dtype, causal, heads, key_heads, size):
    check(rng, BACKENDS[backend], dtype, [0, 1, 13, 0, 5], [0, 1, 13, 0, 5], heads, key_heads, size, causal)
    check(rng, BACKENDS[backend], dtype, [3, 9, 2], [7, 4, 0], heads, key_heads, size, causal)


def reference(q, k, v, grad, shape):
    o, sums = BACKENDS["reference"].attention(q, k, v, shape)
    return o, *BACKENDS["reference"].attention_gradient(grad, q, k, v, o, sums, shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(3, 1, 64), (2, 2, 32), (1, 1, 128), (2, 1, 20), (1, 1, 300)])
def test_many_rows_against_the_reference(rng, dtype, causal, heads, key_heads, size):
    lengths = [0, 1, 300, 70]
    check(rng, BACKENDS["cpu"], dtype, lengths, lengths, heads, key_heads, size, causal, reference)
    check(rng, BACKENDS["cpu"], dtype, [600, 40, 5], [300, 261, 0], heads, key_heads, size, causal, reference)


@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_overflow_nothing(rng, causal):
    lengths = [600]
    shape = heads_of(lengths, lengths, 1, 1, causal, 30.0)
    q, k, v = rng.normal(size=(3, 600, 16))
    o = BACKENDS["cpu"].attention(q, k, v, shape)[0]
    assert_close(o, BACKENDS["reference"].attention(q, k, v, shape)[0])


def test_results_repeat_bit_for_bit(rng):
    first = check(np.random.default_rng(1), BACKENDS["cpu"], "float32", [300, 41], [300, 41], 4, 2, 32, True, reference)
    again = check(np.random.default_rng(1), BACKENDS["cpu"], "float32", [300, 41], [300, 41], 4, 2, 32, True, reference)
    for one, other in zip(first[1], again[1], strict=True):
        np.testing.assert_array_equal(one, other)


@small
def test_central_differences(rng):
    shape = heads_of([4, 3], [4, 3], 2, 1, True, 0.5)
    q, grad = rng.normal(size=(2, 7, 6))
    k, v = rng.normal(size=(2, 7, 3))
    backend = resolve("cpu")
    o, sums = backend.attention(q, k, v, shape)
    for array, gradient in zip((q, k, v), backend.attention_gradient(grad, q, k, v, o, sums, shape), strict=True):
        for place in np.ndindex(*array.shape):
            kept, values = array[place], []
            for step in (1e-6, -1e-6):
                array[place] = kept + step
                values.append(float((backend.attention(q, k, v, shape)[0] * grad).sum()))
            array[place] = kept
            assert abs((values[0] - values[1]) / 2e-6 - gradient[place]) <= 1e-6


@small
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_with_room_between(rng, backend, dtype):
    shape = heads_of([3, 1, 0, 5], [7, 40, 2, 5], 4, 2, True, 0.4)
    q, grad = rng.normal(size=(2, 9, 24)).astype(dtype)
    k, v = rng.normal(size=(2, 54, 12)).astype(dtype)
    spread, rows, *wide = apart(shape, k, v, 3)
    o, sums = BACKENDS[backend].attention(q, k, v, shape)
    np.testing.assert_array_equal(BACKENDS[backend].attention(q, *wide, spread)[0], o)
    expected = BACKENDS[backend].attention_gradient(grad, q, k, v, o, sums, shape)
    found = BACKENDS[backend].attention_gradient(grad, q, *wide, o, sums, spread)
    np.testing.assert_array_equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(one[rows], other)
        assert not np.delete(one, rows, axis=0).any()


@small
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_dropped_weights(rng, backend, causal):
    shape = heads_of([4, 3], [4, 3], 2, 1, causal, 0.5)._replace(dropout=0.4, seed=1 << 61)
    q, grad = rng.normal(size=(2, 7, 6))
    k, v = rng.normal(size=(2, 7, 3))
    o, sums = BACKENDS[backend].attention(q, k, v, shape)
    plain = BACKENDS[backend].attention(q, k, v, shape._replace(dropout=0.0))
    np.testing.assert_array_equal(sums, plain[1])
    assert not np.allclose(o, plain[0])
    for at, place in each_head(shape, 3):  # the weights, of values that name their key
        keys = np.zeros_like(v)
        for key in range(place[0].start, place[0].stop):
            keys[:] = 0
            keys[key] = 1
            weights = [BACKENDS[backend].attention(q, k, keys, s)[0][at][:, 0] for s in (shape, shape._replace(seed=9))]
            whole = BACKENDS[backend].attention(q, k, keys, shape._replace(dropout=0.0))[0][at][:, 0]
            for one in weights:
                assert_close(one, np.where(one == 0, 0, whole / 0.6))
    for array, gradient in zip(
        (q, k, v), BACKENDS[backend].attention_gradient(grad, q, k, v, o, sums, shape), strict=True
    ):
        for spot in np.ndindex(*array.shape):
            kept, values = array[spot], []
            for step in (1e-6, -1e-6):
                array[spot] = kept + step
                values.append(float((BACKENDS[backend].attention(q, k, v, shape)[0] * grad).sum()))
            array[spot] = kept
            assert abs((values[0] - values[1]) / 2e-6 - gradient[spot]) <= 1e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_weights_against_the_reference(rng, dtype, causal):
    lengths = [0, 1, 300, 70]
    shape = heads_of(lengths, lengths, 3, 1, causal, 0.1)._replace(dropout=0.3, seed=77)
    q, grad = rng.normal(size=(2, 371, 96)).astype(dtype)
    k, v = rng.normal(size=(2, 371, 32)).astype(dtype)
    o, sums = BACKENDS["cpu"].attention(q, k, v, shape)
    found = o, *BACKENDS["cpu"].attention_gradient(grad, q, k, v, o, sums, shape)
    exact = [a.astype(np.float64) for a in (q, k, v, grad)]
    for one, other in zip(found, reference(*exact, shape), strict=True):
        assert_close(one, other)


def test_how_many_weights_are_dropped():
    kept = weights_kept(12345, np.arange(200), 3, 500, round(0.3 * 2**53))
    assert abs(kept.mean() - 0.7) < 0.005
    assert np.abs(kept.mean(axis=0) - 0.7).max() < 0.15
    assert np.abs(kept.mean(axis=1) - 0.7).max() < 0.1
    for other in (weights_kept(12346, np.arange(200), 3, 500, round(0.3 * 2**53)), kept[::-1], kept[:, ::-1]):
        assert abs((kept & other).mean() - 0.49) < 0.01  # as of independent ones


# --- rotary positions ----------------------------------------------------------------------------------------------


@small
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "turned"), [(6, 6), (10, 4)])
def test_rotary_positions(rng, backend, dtype, size, turned):
    x = rng.normal(size=(9, 2 * size)).astype(dtype)
    positions = np.array([0, 1, 2, 40, 3, 0, 1, 1000, 5])
    tables = Rotary(turned, 500.0).tables(1001, np.dtype(dtype))
    exact = x.astype(np.float64)
    for head in (0, size):
        part = slice(head, head + turned)
        exact[:, part] = oracle.rotated(exact[:, part], positions, turned, 500.0, np.dtype(dtype).type)
    y = x.copy()
    BACKENDS[backend].rotate(y, positions, *tables, 2)
    assert_close(y, exact)
    BACKENDS[backend].rotate(y, positions, *tables, 2, back=True)
    assert_close(y, x)


def test_frequencies_are_computed_in_float32():
    frequencies = Rotary(8, 10000.0).frequencies
    assert frequencies.dtype == np.float32
    np.testing.assert_array_equal(frequencies, np.float32([1.0, 0.1, 0.01, 0.001]))


# --- the function of families of models ----------------------------------------------------------------------------


def run_of(lengths):
    run = Run(resolve("cpu"), training=True)
    run.sequences = Sequences.of(lengths)
    return run


@small
def test_it_names_itself_where_shapes_do_not_fit(rng):
    attention, q = Attention(4, 2, causal=True), rng.normal(size=(3, 8))
    with pytest.raises(RuntimeError, match=r"Attention\(4, 2, causal=True\).*run.sequences"):
        attention._forward(q, q[:, :4].copy(), q[:, :4].copy(), Run(resolve("cpu")))
    with pytest.raises(ValueError, match=r"Attention\(4, 2, causal=True\) takes q"):
        attention._forward(q, q, q, run_of([3]))
    with pytest.raises(ValueError, match=r"Attention\(4, 2, causal=True\) got 3 queries"):
        attention._forward(q, q[:, :4].copy(), q[:, :4].copy(), run_of([4]))
    with pytest.raises(ValueError, match="heads must be a multiple of key_heads, got 4 and 3"):
        Attention(4, 3)
    with pytest.raises(ValueError, match="turns 8 features of a head, which has 2"):
        Attention(4, rotary=Rotary(8))._forward(q, q.copy(), q.copy(), run_of([3]))
    with pytest.raises(ValueError, match="size must be even"):
        Rotary(5)


def test_sequences_of_lengths():
    sequences = Sequences.of([2, 0, 3])
    np.testing.assert_array_equal(sequences.begins, [0, 2, 2, 5])
    np.testing.assert_array_equal(sequences.positions, [0, 1, 0, 1, 2])
