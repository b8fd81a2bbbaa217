"""Means, deviations and intervals, and that no winner is claimed inside the noise."""

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from nblora.cli import main
from nblora.compare import FEWEST_SEEDS, compare, text_report


def by_seed(values, first=0):
    return dict(enumerate(map(float, values), first))


def against_zero(sample, **options):
    """The only difference of a method with these values from one that is zero for every seed."""
    results = {"zero": by_seed(np.zeros(len(sample))), "method": by_seed(sample)}
    (difference,) = compare(results, **options).differences
    return difference


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


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_is_scipys_for_paired_samples(level, rng):
    a, b = rng.normal(size=5), rng.normal(size=5) + 1
    (difference,) = compare({"a": by_seed(a), "b": by_seed(b)}, level=level).differences
    expected = stats.ttest_rel(b, a)
    assert difference.p == pytest.approx(expected.pvalue)
    assert (difference.low, difference.high) == pytest.approx(tuple(expected.confidence_interval(level)))
    middle = (difference.low + difference.high) / 2
    assert middle == pytest.approx(difference.difference)  # no side wider than the other


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


@pytest.mark.parametrize("interval", FEWEST_SEEDS)
def test_too_few_seeds_claim_nothing(interval):
    fewest = FEWEST_SEEDS[interval]
    values = 1 + 0.01 * np.arange(fewest)
    assert against_zero(values, interval=interval).decided
    difference = against_zero(values[:-1], interval=interval)
    assert difference.low > 0
    assert not difference.decided


def test_one_seed_says_nothing():
    one = compare({"a": {0: 1.0}, "b": {0: 2.0}})
    assert one.methods[0].std is None
    assert (one.differences[0].low, one.differences[0].p) == (None, None)
    assert "one common seed" in text_report(one)


def test_seeds_that_all_agree():
    assert against_zero(np.ones(5)).decided
    assert against_zero(np.ones(5)).low == against_zero(np.ones(5)).high == 1
    assert not against_zero(np.zeros(5)).decided


@pytest.mark.parametrize(("count", "interval"), [(5, "t"), (20, "t"), (30, "bootstrap")])
def test_intervals_cover_as_often_as_they_say(count, interval):
    """Of 400 intervals for normal samples of mean 0, about 95 % hold 0: three standard errors below at the worst."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        difference = against_zero(rng.normal(size=count), interval=interval, resamples=1000)
        held += difference.low <= 0 <= difference.high
        assert difference.decided == (not difference.low <= 0 <= difference.high)
    assert held >= 400 * (0.95 - 3 * np.sqrt(0.95 * 0.05 / 400))
    assert held < 400


def test_many_comparisons_err_as_seldom_as_one():
    """Of 150 tables of six methods that differ by noise alone, about 5 % name a winner; uncorrected, 39 % did."""
    rng = np.random.default_rng(6)
    erring = uncorrected = 0
    for _ in range(150):
        found = compare({name: by_seed(rng.normal(size=6)) for name in "abcdef"}).differences
        assert len(found) == 15
        erring += any(difference.decided for difference in found)
        uncorrected += any(not difference.low <= 0 <= difference.high for difference in found)
    assert erring <= 150 * (0.05 + 3 * np.sqrt(0.05 * 0.95 / 150))
    assert uncorrected > 3 * erring


def test_holm_by_hand(rng):
    """Three p values in order, times 3, 2 and 1, none below the one before."""
    results = {"zero": by_seed(np.zeros(6))} | {
        name: by_seed(shift + rng.normal(size=6)) for name, shift in {"far": 4.0, "near": 1.0, "none": 0.0}.items()
    }
    found = compare(results, baseline="zero").differences
    plain = np.array([stats.ttest_1samp(list(results[d.first].values()), 0).pvalue for d in found])
    order = np.argsort(plain)
    expected = np.empty(3)
    expected[order] = np.minimum(1, np.maximum.accumulate(plain[order] * [3, 2, 1]))
    np.testing.assert_allclose([d.p for d in found], expected)


def test_bootstrap_intervals_repeat_and_are_nested(rng):
    sample = rng.normal(size=24)
    first, second, narrow = (
        against_zero(sample, interval="bootstrap", level=level, resamples=2000) for level in (0.99, 0.99, 0.5)
    )
    assert first == second
    assert first.low < narrow.low < narrow.high < first.high


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
    assert "95 % t intervals" in text
    assert "corrected for 3 differences (Holm)" in text
    assert compare(results).as_dict()["format"] == "nblora.comparison"


def test_command_with_bootstrap(tmp_path, rng):
    lines = [f"{method},{seed},1,{rng.normal()}" for method in ("a", "b") for seed in range(24)]
    (tmp_path / "curves.csv").write_text("\n".join(["method,seed,epoch,loss", *lines]))
    for options, kind in ([], "t"), (["--bootstrap"], "bootstrap"):
        result = CliRunner().invoke(main, ["compare", str(tmp_path / "curves.csv"), *options])
        assert f"95 % {kind} intervals" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"results": {"a": {}}}, "at least one seed"),
        ({"results": {"a": {0: float("nan")}}}, "must be finite"),
        ({"results": {"a": {0: 1.0}}, "baseline": "z"}, "baseline must be one of 'a'"),
        ({"results": {"a": {0: 1.0}}, "level": 1.0}, "level must be below 1"),
        ({"results": {"a": {0: 1.0}}, "resamples": 3}, "resamples must be at least 100"),
        ({"results": {"a": {0: 1.0}}, "interval": "bca"}, "interval must be one of 't', 'bootstrap'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(**arguments)
