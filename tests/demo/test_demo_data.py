"""The demo's data: every image in one part only, turned by 90 degrees, noisy, the same for the same seed."""

import sys

import numpy as np
import pytest

from nblora.demo import data
from nblora.errors import MissingExtraError

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits():
    return data.load_digits(0)


def test_the_parts_hold_every_image_once(digits, monkeypatch):
    monkeypatch.setattr(data, "shift_domain", lambda pixels, rng: pixels)
    plain = data.load_digits(0)
    parts = [part for name, part in plain._asdict().items() if name != "upright_test"]
    together = np.concatenate([part.x for part in parts])
    original = (sklearn_datasets.load_digits().data / 16).astype(np.float32)
    assert together.shape == original.shape
    np.testing.assert_array_equal(_sorted(together), _sorted(original))
    sizes = {name: len(part.y) for name, part in digits._asdict().items()}
    assert sizes == {**data.PARTS, "test": 497, "upright_test": 497}


def _sorted(rows):
    return rows[np.lexsort(rows.T)]


def test_shapes_and_dtypes_are_those_of_the_network(digits):
    for part in digits:
        assert part.x.dtype == np.float32
        assert part.x.shape == (len(part.y), data.PIXELS)
        assert part.y.dtype == np.int64
        assert set(np.unique(part.y)) == set(range(data.CLASSES))


def test_the_test_split_is_the_upright_one_turned_with_noise(digits):
    turned = np.rot90(digits.upright_test.x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    noise = digits.test.x - turned
    assert np.std(noise) == pytest.approx(data.NOISE, rel=0.03)
    assert abs(np.mean(noise)) < 0.01
    np.testing.assert_array_equal(digits.test.y, digits.upright_test.y)


def test_turning_is_by_90_degrees():
    image = np.arange(4.0).reshape(1, 4)  # rows 0 1 / 2 3, which turned left reads 1 3 / 0 2
    rng = np.random.default_rng(0)
    noise = np.random.default_rng(0).normal(0, data.NOISE, (1, 4))
    np.testing.assert_allclose(data.shift_domain(image, rng) - noise, [[1, 3, 0, 2]], atol=1e-12)


def test_same_seed_same_data(digits):
    again, other = data.load_digits(0), data.load_digits(1)
    for name, part in digits._asdict().items():
        np.testing.assert_array_equal(part.x, getattr(again, name).x)
        np.testing.assert_array_equal(part.y, getattr(again, name).y)
        assert not np.array_equal(part.x, getattr(other, name).x)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nblora\[demo\]'"):
        data.load_digits(0)
