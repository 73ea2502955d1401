"""Means over seeds, their confidence intervals, and differences between groups of runs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of all confidence intervals."""

_ROUNDING = 1e-13


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Args:
        mean: The mean; NaN of no values.
        half_width: Half the width of its confidence interval; None for fewer than two values.
        n: Number of values.
    """

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """How far a group's mean lies from the baseline's.

    Args:
        mean: Group minus baseline.
        half_width: Half the width of its confidence interval; None if it has none.
        p: Of the two-sided t-test that there is no difference; None if there is no test.
        n: Shared seeds, if paired; else the smaller number of runs.
        paired: Whether runs of the same seed were compared with each other.
        p_holm: The same, corrected for the number of groups (Holm).
    """

    mean: float
    half_width: float | None
    p: float | None
    n: int
    paired: bool
    p_holm: float | None = None


def mean_over(values: Sequence[float]) -> Mean:
    """Mean and Student's t interval: t(n − 1) · s / √n on either side.

    Args:
        values: One for each seed.
    """
    n = len(values)
    if n == 0:
        return Mean(math.nan, None, 0)
    if n == 1:
        return Mean(float(values[0]), None, 1)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    if deviation <= _ROUNDING * max(1.0, abs(mean)):  # the same at every seed
        return Mean(mean, 0.0, n)
    return Mean(mean, _quantile(n - 1) * deviation / math.sqrt(n), n)


def difference(group: Mapping[Hashable, float], baseline: Mapping[Hashable, float]) -> Difference:
    """Group minus baseline: by the differences at shared seeds; without shared seeds, Welch's interval and test.

    Args:
        group: Value by seed.
        baseline: Value by seed.
    """
    shared = [seed for seed in group if seed in baseline]
    if shared:
        differences = [group[seed] - baseline[seed] for seed in shared]
        summary = mean_over(differences)
        return Difference(summary.mean, summary.half_width, _p_of(summary, summary.n - 1), summary.n, True)
    first, second = list(group.values()), list(baseline.values())
    n = min(len(first), len(second))
    apart = float(np.mean(first) - np.mean(second)) if n else math.nan
    if n < 2:
        return Difference(apart, None, None, n, False)
    one, two = (float(np.var(values, ddof=1)) / len(values) for values in (first, second))
    if one + two == 0:
        return Difference(apart, 0.0, 1.0 if apart == 0 else None, n, False)
    freedom = (one + two) ** 2 / (one**2 / (len(first) - 1) + two**2 / (len(second) - 1))
    half = _quantile(freedom) * math.sqrt(one + two)
    return Difference(apart, half, _p_of(Mean(apart, half, n), freedom), n, False)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the i-th smallest of m p-values times (m − i + 1), never falling, at most 1.

    Args:
        p_values: Of several tests; None where there was none, which does not count.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[place] = highest
    return corrected


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def _p_of(summary: Mean, freedom: float) -> float | None:
    """Two-sided p-value of a mean; None without an interval, and for a difference that is the same at every seed."""
    if summary.half_width is None:
        return None
    if summary.half_width == 0:
        return 1.0 if summary.mean == 0 else None
    t = abs(summary.mean) / summary.half_width * _quantile(freedom)
    return float(2 * stats.t.sf(t, freedom))
