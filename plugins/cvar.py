"""CVaR: learn from the worst pairs of a batch alone."""

import torch
from torch import Tensor

from bfpo_pl.component import check_range
from bfpo_pl.reductions import PairReduction


class CVaR(PairReduction):
    """The mean of the worst ``fraction`` of a stream's weighted losses (the last one in part, where it is not whole).

    Equals min over η of η + mean(max(0, loss − η)) / fraction (Rockafellar and Uryasev, 2000); 1 gives the mean, 1/n
    the worst of n. It is taken over the micro-batch of each process, not over the global batch, and the processes are
    averaged by their numbers of pairs. Inspired by the risk measures of safe reinforcement learning, but static: over
    the data, not over what follows a token, so it is not iterated CVaR. It amplifies label noise: a mislabelled pair is
    among the worst. With `BFPO` and `Squared` beware: at the start a pair's loss is (g/tau)², so the worst pairs are
    those of one safe and one unsafe response, whatever the policy finds hard.

    Args:
        fraction: Share of the pairs, in (0, 1].

    Raises:
        UserError: ``fraction`` lies outside (0, 1].
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = check_range(self, "fraction", fraction, 0.0, 1.0, low_open=True)

    def __call__(self, losses: Tensor, weights: Tensor, count: Tensor) -> Tensor:
        dropped = weights <= 0
        weighted = (weights * losses).masked_fill(dropped, 0.0)
        order = weighted.detach().masked_fill(dropped, -torch.inf).argsort(descending=True)
        rank = torch.arange(len(losses), device=losses.device)
        taken = (self.fraction * (~dropped).sum() - rank).clamp(0, 1)  # 1, …, 1, a part, 0, …, 0
        return (taken * weighted[order]).sum() / (self.fraction * count).clamp(min=1e-12)
