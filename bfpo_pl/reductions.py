"""Reductions over pairs: from the losses of one stream's units to the scalar that is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from bfpo_pl.component import Component


class PairReduction(Component, ABC):
    """Reduces the losses of one stream to a scalar. Not to be confused with `logp_reduction`, which is over tokens."""

    @abstractmethod
    def __call__(self, losses: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        """Reduces one stream's losses on this process.

        Args:
            losses: ``[N]``, losses of the stream's units on this process; N may be 0.
            weights: ``[N]`` ≥ 0; units of weight 0 are dropped.
            count: Scalar, how many units of positive weight the stream has in the whole optimizer step, averaged over
                the processes and over the micro-batches that are accumulated. Since gradients are averaged over both
                too, dividing by it gives the mean over all units.

        Returns:
            A scalar attached to the graph of ``losses``; 0 where no unit is left.
        """


class Mean(PairReduction):
    """Weighted mean: Σ w · loss / #(w > 0)."""

    def __call__(self, losses: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        # A dropped unit's loss may be anything, so it is masked, not multiplied by zero.
        weighted = (weights * losses).masked_fill(weights <= 0, 0.0)
        return weighted.sum() / count.clamp(min=1e-12)  # an empty stream gives 0/1e-12 = 0, without a device sync
