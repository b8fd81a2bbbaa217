"""Masks that a GPU draws: Philox's numbers by its authors' known answers, every order of threads, any grid."""

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the emulator needs greenlet (extra test)")

from nblora.backends.reference import ReferenceBackend
from tests.cuda.emulated import make_backend
from tests.cuda.emulator import ORDERS
from tests.cuda.philox import dropout_mask, philox

# From kat_vectors of Random123, the authors' library: counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    np.testing.assert_array_equal(philox([words(counter)], words(key)), [words(answer)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (3, 5), (7, 37), (40, 33)], ids=str)
def test_masks_are_philoxs(shape, dtype):
    for order in ORDERS:
        backend = make_backend(order, aligned=order != "reverse")
        drawn = backend.dropout_mask(np.random.default_rng(3), shape, 0.3, np.dtype(dtype)).copy_to_host()
        expected = dropout_mask(ReferenceBackend(), np.random.default_rng(3), shape, 0.3, dtype)
        assert drawn.dtype == expected.dtype
        np.testing.assert_array_equal(drawn, expected)


def test_no_samples():
    assert make_backend().dropout_mask(np.random.default_rng(0), (0, 4), 0.5, np.dtype(np.float32)).shape == (0, 4)


def test_the_share_is_dropped_and_the_next_mask_is_another():
    rng, backend = np.random.default_rng(0), make_backend()
    first, second = (backend.dropout_mask(rng, (200, 50), 0.2, np.dtype(np.float32)).copy_to_host() for _ in range(2))
    for mask in (first, second):
        assert set(np.unique(mask)) == {0, np.float32(1.25)}
        assert abs((mask == 0).mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / mask.size)
    both = ((first == 0) & (second == 0)).mean()
    assert abs(both - 0.04) < 4 * np.sqrt(0.04 * 0.96 / first.size)


def test_the_cpus_masks_are_as_ever():
    """Earlier runs repeat bit for bit."""
    rng, twin = np.random.default_rng(5), np.random.default_rng(5)
    mask = ReferenceBackend().dropout_mask(rng, (6, 4), 0.3, np.dtype(np.float32))
    kept = twin.random((6, 4), np.float32) >= 0.3
    np.testing.assert_array_equal(mask, kept * np.float32(1 / 0.7))
    assert rng.bit_generator.state == twin.bit_generator.state
