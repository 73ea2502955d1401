"""Intervals, tests and the front against independent computations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bfpo_pl.comparison.pareto import front_probability, on_front
from bfpo_pl.comparison.statistics import difference, holm, mean_over

SAMPLE = [0.81, 0.93, 0.78, 0.88, 0.90]
OTHER = [0.70, 0.91, 0.75, 0.80, 0.79]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_half_widths_are_those_of_scipy(n):
    values = SAMPLE[:n]
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    mean = mean_over(values)
    assert mean.mean - mean.half_width == pytest.approx(low, rel=1e-12)
    assert mean.mean + mean.half_width == pytest.approx(high, rel=1e-12)


def test_the_interval_of_two_values_by_hand():
    # t(0.975, 1) = tan(0.475 pi) = 12.7062; s / sqrt 2 = |a - b| / 2
    assert mean_over([0.4, 0.6]).half_width == pytest.approx(math.tan(0.475 * math.pi) * 0.1, rel=1e-9)


def test_one_value_has_no_interval_and_equal_ones_have_none_of_any_width():
    assert (mean_over([0.5]).half_width, mean_over([0.5]).n) == (None, 1)
    assert mean_over([0.1 + 0.2, 0.3, 0.3]).half_width == 0.0
    assert math.isnan(mean_over([]).mean)


def test_paired_differences_are_those_of_scipy_at_the_shared_seeds():
    group = dict(enumerate(SAMPLE)) | {9: 0.0}  # seed 9 is not the baseline's
    baseline = dict(enumerate(OTHER)) | {7: 1.0}
    found = difference(group, baseline)
    test = stats.ttest_rel(SAMPLE, OTHER)
    interval = test.confidence_interval(0.95)
    assert found.paired
    assert found.n == 5
    assert found.p == pytest.approx(test.pvalue, rel=1e-9)
    assert found.mean - found.half_width == pytest.approx(interval.low, rel=1e-9)
    assert found.mean + found.half_width == pytest.approx(interval.high, rel=1e-9)


def test_without_shared_seeds_the_test_is_welchs():
    found = difference(dict(enumerate(SAMPLE)), {10 + i: value for i, value in enumerate(OTHER[:4])})
    test = stats.ttest_ind(SAMPLE, OTHER[:4], equal_var=False)
    interval = test.confidence_interval(0.95)
    assert not found.paired
    assert found.p == pytest.approx(test.pvalue, rel=1e-9)
    assert found.mean - found.half_width == pytest.approx(interval.low, rel=1e-9)


def test_a_group_does_not_differ_from_itself():
    found = difference(dict(enumerate(SAMPLE)), dict(enumerate(SAMPLE)))
    assert (found.mean, found.half_width, found.p) == (0.0, 0.0, 1.0)


def test_one_shared_seed_has_a_difference_without_interval_or_test():
    found = difference({0: 0.9, 1: 0.8}, {0: 0.7})
    assert found.mean == pytest.approx(0.2)
    assert (found.half_width, found.p, found.n, found.paired) == (None, None, 1, True)


def test_the_same_difference_at_every_seed_has_no_test():
    found = difference({0: 0.9, 1: 0.8}, {0: 0.7, 1: 0.6})
    assert found.half_width == 0.0
    assert found.p is None


def test_holm_by_hand():
    # sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.04 * 1, never falling
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def brute_force(points):
    def dominated(one, other):
        return other[0] >= one[0] and other[1] >= one[1] and other != one

    return [not any(dominated(one, other) for other in points) for one in points]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_front_is_that_of_brute_force(points):
    x, y = np.array(points, dtype=float).T
    assert on_front(x, y).tolist() == brute_force(points)


def test_front_probability_is_the_exact_one():
    """Two groups on three shared seeds: all 27 draws can be listed."""
    one = {0: (0.2, 0.5), 1: (0.9, 0.4), 2: (0.6, 0.9)}
    two = {0: (0.5, 0.6), 1: (0.7, 0.1), 2: (0.5, 0.8)}
    exact = np.zeros(2)
    for draw in itertools.product(range(3), repeat=3):
        means = [tuple(np.mean([group[seed] for seed in draw], axis=0).round(12)) for group in (one, two)]
        exact += brute_force(means)
    found = front_probability([one, two], resamples=40_000)
    assert found == pytest.approx(exact / 27, abs=0.01)
    assert 0.1 < exact[1] / 27 < 0.9  # or the test would say nothing


def test_front_probability_pairs_groups_by_seed():
    """The same values in both groups: they are on the front together in every draw."""
    group = {seed: (seed / 5, 1 - seed / 7) for seed in range(5)}
    assert front_probability([group, dict(group)]).tolist() == [1.0, 1.0]


def test_front_probability_of_disjoint_seeds_and_of_single_runs():
    certain = front_probability([{0: (0.9, 0.9)}, {1: (0.1, 0.1)}, {2: (0.2, 0.95), 3: (0.1, 0.94)}], resamples=500)
    assert certain.tolist() == [1.0, 0.0, 1.0]
