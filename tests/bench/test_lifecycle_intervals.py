"""Intervals cover what they promise, tests flag changes and let noise pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.bench.lifecycle.intervals import holm, interval, paired


def coverage(make, groups, trials=1000):
    """Share of trials whose interval holds the true mean, which is 0."""
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(trials):
        found = interval([make(random) for _ in range(groups)], resamples=500)
        hits += found.low <= 0.0 <= found.high
    return hits / trials


@pytest.mark.parametrize("groups", [8, 30])
def test_interval_covers_the_mean_of_few_examples(groups):
    assert 0.91 <= coverage(lambda random: [random.normal()], groups) <= 0.975


def test_interval_of_four_examples_covers_what_it_can():
    # All four fall on one side of the mean in 2 of 16 cases, and resamples with them.
    assert 0.80 <= coverage(lambda random: [random.normal()], 4) <= 0.90


def test_interval_covers_a_skewed_mean():
    assert coverage(lambda random: [random.exponential() - 1.0], 20) >= 0.90


def test_turns_of_one_example_are_no_independent_samples():
    # Ten turns that share their example's luck: taken for 80 samples, the interval is far too narrow.
    def example(random):
        return list(random.normal() + 0.1 * random.normal(size=10))

    assert coverage(example, 8) >= 0.90
    random = np.random.default_rng(1)
    naive = 0
    for _ in range(200):
        values = [[v] for _ in range(8) for v in example(random)]
        found = interval(values, resamples=200)
        naive += found.low <= 0.0 <= found.high
    assert naive / 200 < 0.6


def test_one_example_has_no_width_and_says_so():
    found = interval([[0.0, 1.0]])
    assert (found.mean, found.low, found.high, found.examples, found.turns) == (0.5, 0.5, 0.5, 1, 2)


def test_two_examples_reach_from_end_to_end():
    found = interval([[0.0], [1.0]])
    assert (found.low, found.high) == (0.0, 1.0)


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
    with pytest.raises(ValueError, match="at least one value"):
        interval([[1.0], []])


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=6))
def test_interval_holds_its_mean_and_stays_within_the_values(groups):
    found = interval(groups, resamples=200)
    values = [v for group in groups for v in group]
    assert min(values) - 1e-9 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= max(values) + 1e-9


def test_sign_flips_are_exact_for_few_examples():
    assert paired([0.2] * 6).p == pytest.approx(2 / 2**6)
    assert paired([0.2] * 6).least_p == pytest.approx(2 / 2**6)
    assert paired([0.5, -0.5]).p == 1.0
    # by hand: of the signs of 3, 1, 1 the sums reach 5 in 2 of 8 cases, and 3 in 6 of 8
    assert paired([3.0, 1.0, 1.0]).p == pytest.approx(2 / 8)
    assert paired([3.0, 1.0, -1.0]).p == pytest.approx(6 / 8)


def test_a_change_is_flagged_and_noise_passes_at_its_rate():
    random = np.random.default_rng(3)
    assert paired(random.normal(0.5, 0.5, 30)).p < 0.01
    for count in (10, 40):
        false = sum(paired(random.normal(size=count)).p < 0.05 for _ in range(200))
        assert 1 <= false <= 22, "10 of 200 are expected"


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_never_lowers(values):
    adjusted = holm(values)
    assert all(a >= v for a, v in zip(adjusted, values, strict=True))
    ranked = sorted(range(len(values)), key=values.__getitem__)
    assert [adjusted[i] for i in ranked] == sorted(adjusted)
    assert all(a <= 1.0 for a in adjusted)
