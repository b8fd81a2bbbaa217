"""Means, deviations and intervals, and that no winner is claimed inside the noise."""

import numpy as np
import pytest

from nblora.compare import FEWEST_SEEDS, bootstrap_interval, compare, text_report


def by_seed(values, first=0):
    return dict(enumerate(map(float, values), first))


def test_summaries_and_differences_are_what_they_say(rng):
    a, b = rng.normal(size=8), rng.normal(size=8)
    found = compare({"a": by_seed(a), "b": by_seed(b)})
    first, second = found.methods
    assert (first.name, first.seeds) == ("a", 8)
    assert first.mean == pytest.approx(a.mean())
    assert second.std == pytest.approx(b.std(ddof=1))
    (difference,) = found.differences
    assert (difference.first, difference.second) == ("b", "a")
    assert difference.difference == pytest.approx((b - a).mean())
    assert difference.low < difference.difference < difference.high


def test_pairing_finds_what_the_spread_over_seeds_hides(rng):
    """Seeds differ by far more than methods do, but the same for both."""
    seeds = 10 * rng.normal(size=10)
    a, b = seeds + 0.01 * rng.normal(size=10), seeds + 1 + 0.01 * rng.normal(size=10)
    (difference,) = compare({"a": by_seed(a), "b": by_seed(b)}).differences
    assert difference.decided
    shuffled = rng.permutation(b)
    (difference,) = compare({"a": by_seed(a), "b": by_seed(shuffled)}).differences
    assert not difference.decided


def test_only_common_seeds_are_paired():
    (difference,) = compare({"a": by_seed([1, 2, 3]), "b": by_seed([12, 13, 14], first=1)}).differences
    assert difference.seeds == 2
    assert difference.difference == pytest.approx(10)
    with pytest.raises(ValueError, match="no seed in common"):
        compare({"a": {0: 1.0}, "b": {1: 1.0}})


def test_too_few_seeds_claim_nothing():
    few = FEWEST_SEEDS - 1
    (difference,) = compare(
        {"a": by_seed(np.zeros(few)), "b": by_seed(np.ones(few) + 0.1 * np.arange(few))}
    ).differences
    assert difference.low > 0
    assert not difference.decided
    one = compare({"a": {0: 1.0}, "b": {0: 2.0}})
    assert one.methods[0].std is None
    assert one.differences[0].low is None
    assert "one common seed" in text_report(one)


@pytest.mark.parametrize("count", [5, 10, 30])
def test_intervals_cover_as_often_as_they_say(count):
    """Of 400 intervals for normal samples of mean 0, about 95 % hold 0: three standard errors below at the worst."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.normal(size=count), resamples=1000)
        held += low <= 0 <= high
    assert held >= 400 * (0.95 - 3 * np.sqrt(0.95 * 0.05 / 400))
    assert held < 400


def test_intervals_repeat_and_are_nested(rng):
    sample = rng.normal(size=12)
    assert bootstrap_interval(sample) == bootstrap_interval(sample)
    low, high = bootstrap_interval(sample, 0.5)
    wide_low, wide_high = bootstrap_interval(sample, 0.99)
    assert wide_low < low < high < wide_high


def test_pairs_and_baseline():
    results = {name: by_seed([place, place + 1]) for place, name in enumerate("abcd")}
    assert len(compare(results).differences) == 6
    against = compare(results, baseline="b").differences
    assert [(row.first, row.second) for row in against] == [("a", "b"), ("c", "b"), ("d", "b")]
    assert compare({"a": {0: 1.0}}).differences == []


def test_report(rng):
    noise = 0.01 * rng.normal(size=6)
    results = {
        "LoRA": by_seed(noise),
        "Delta-LoRA": by_seed(1 + noise[::-1]),
        "Full": by_seed(0.001 + noise[[1, 0, 3, 2, 5, 4]]),
    }
    text = text_report(compare(results), "test_accuracy")
    assert "Delta-LoRA has the larger value" in text
    assert "within the noise" in text
    assert "test_accuracy, mean ± std" in text
    assert compare(results).as_dict()["format"] == "nblora.comparison"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"results": {"a": {}}}, "at least one seed"),
        ({"results": {"a": {0: float("nan")}}}, "must be finite"),
        ({"results": {"a": {0: 1.0}}, "baseline": "z"}, "baseline must be one of 'a'"),
        ({"results": {"a": {0: 1.0}}, "level": 1.0}, "level must be below 1"),
        ({"results": {"a": {0: 1.0}}, "resamples": 3}, "resamples must be at least 100"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(**arguments)
