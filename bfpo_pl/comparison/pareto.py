"""The Pareto front of two quantities that are both to be large, and how sure it is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_DIGITS = 12  # means of the same values over other numbers of seeds differ by rounding


def on_front(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other point dominates (is as good in both and better in one).

    Args:
        x: First quantity [..., points].
        y: Second quantity [..., points].

    Returns:
        Whether each point is on the front of its row [..., points]; equal points are on it together.
    """
    x, y = np.round(x, _DIGITS), np.round(y, _DIGITS)
    front = np.ones(x.shape, dtype=bool)
    for place in range(x.shape[-1]):
        own_x, own_y = x[..., place : place + 1], y[..., place : place + 1]
        better = (x >= own_x) & (y >= own_y) & ((x > own_x) | (y > own_y))
        front[..., place] = ~better.any(axis=-1)
    return front


def front_probability(
    groups: Sequence[Mapping[Hashable, tuple[float, float]]], resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """How often each group is on the front when seeds are drawn again, with replacement.

    Seeds are drawn for all groups together, so that groups that share seeds stay paired. A group that has none of the
    seeds of a draw is drawn by itself. A group of one run does not vary.

    Args:
        groups: For each group, its two quantities by seed.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        Share of the draws in which the group's means are on the front [groups].
    """
    generator = np.random.default_rng(seed)
    seeds = list(dict.fromkeys(each for group in groups for each in group))
    counts = generator.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=resamples)
    means = np.empty((2, resamples, len(groups)))
    for place, group in enumerate(groups):
        own = np.array([group[each] for each in group])  # [runs, 2]
        weights = counts[:, [seeds.index(each) for each in group]].astype(float)  # [resamples, runs]
        empty = weights.sum(axis=1) == 0
        alone = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=int(empty.sum()))
        weights[empty] = alone
        means[:, :, place] = (weights @ own / weights.sum(axis=1, keepdims=True)).T
    return on_front(*means).mean(axis=0)
