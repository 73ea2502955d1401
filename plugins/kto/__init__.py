"""KTO: each response by itself is desirable or not; no pair is needed."""

import torch
from torch import Tensor

from bfpo_pl.batch import REFERENCE, Annotations, Label, LogProbs, Requirements
from bfpo_pl.component import check_range
from bfpo_pl.labeling import LabelingFunction
from bfpo_pl.losses import PreferenceLoss

from .mismatched import WithMismatched

__all__ = ["KTO", "Desirable", "WithMismatched"]


class Desirable(LabelingFunction):
    """A response is desirable (g = 1/2) if it is safe and no safe response is more helpful, else undesirable (−1/2).

    Thus of two safe ones the more helpful, of a safe and an unsafe one the safe, of two unsafe ones none. Soft flags
    are rounded. Mismatched responses get g = 0 and weight 0: they serve `KTO` to estimate z0 and are not learned.

    Args:
        desirable_weight: λ_D, ≥ 0.
        undesirable_weight: λ_U, ≥ 0.

    Raises:
        UserError: A weight is negative.
    """

    unit = "response"
    requires = Requirements(columns=("safe",))

    def __init__(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        self.desirable_weight = check_range(self, "desirable_weight", desirable_weight, 0.0)
        self.undesirable_weight = check_range(self, "undesirable_weight", undesirable_weight, 0.0)

    def __call__(self, annotations: Annotations) -> Label:
        safe = annotations["safe"].round()
        chosen, rejected = annotations.pairs.unbind(1)
        beaten = torch.zeros_like(safe).scatter_reduce(0, rejected, safe[chosen], "amax")
        good = safe * (1 - beaten)
        learned = 1 - annotations["mismatched"] if "mismatched" in annotations else 1.0
        weight = good * self.desirable_weight + (1 - good) * self.undesirable_weight
        return Label(target=learned * (good - 0.5), weight=learned * weight)


class KTO(PreferenceLoss):
    """Desirable: 1 − σ(β (r − z0)), undesirable: 1 − σ(β (z0 − r)); r is the response's log-ratio.

    z0 = max(0, mean log-ratio of the mismatched responses), without a gradient, estimates KL(π‖ref); it is taken over
    the micro-batch of each process. Source: Ethayarajh et al., "KTO", arXiv 2402.01306.

    Args:
        beta: Strength of the KL anchor, > 0. The authors use 0.1.
        z0: A fixed z0 ≥ 0 instead; no mismatched responses are needed then. 0 is not KTO but APO-zero, unpaired.

    Raises:
        UserError: An argument lies outside its range.
    """

    unit = "response"

    def __init__(self, beta: float, z0: float | None = None) -> None:
        self.beta = check_range(self, "beta", beta, 0.0, low_open=True)
        self.z0 = None if z0 is None else check_range(self, "z0", z0, 0.0)

    @property
    def requires(self) -> Requirements:
        return Requirements(("mismatched",) if self.z0 is None else (), (REFERENCE,))

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, log_probs: LogProbs, label: Label) -> Tensor:
        ratio, z0 = log_probs.log_ratio(), self.z0
        if z0 is None:
            mismatched = label.target == 0
            z0 = (ratio.detach() * mismatched).sum().div(mismatched.sum().clamp(min=1)).clamp(min=0)
        return 1 - torch.sigmoid(torch.sign(label.target) * self.beta * (ratio - z0))
