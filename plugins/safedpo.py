"""SafeDPO: the safer response wins, ties go to the more helpful one, and crossing safety costs a margin Delta."""

import torch

from bfpo_pl.batch import Annotations, Label, Requirements
from bfpo_pl.component import check_range
from bfpo_pl.labeling import LabelingFunction


class SafeDPO(LabelingFunction):
    """SafeDPO's transformed pairs; with `Logistic` (beta 0.1) the loss is −log σ(β h − (u_l − u_w) Δ), u = 1 − safe.

    A pair is kept if its winner is safe, swapped if only its loser is, dropped if both are unsafe. Soft flags are
    rounded. The optimum is DPO's with the unsafe responses removed, for every Δ. Source: Kim et al., "SafeDPO", arXiv
    2505.20065.

    Args:
        delta: Δ, the extra margin asked of a safe response over an unsafe one, ≥ 0. The authors use 10.

    Raises:
        UserError: ``delta`` is negative.
    """

    requires = Requirements(columns=("chosen_safe", "rejected_safe"))

    def __init__(self, delta: float = 10.0) -> None:
        self.delta = check_range(self, "delta", delta, 0.0)

    def __call__(self, annotations: Annotations) -> Label:
        chosen, rejected = annotations["chosen_safe"].round(), annotations["rejected_safe"].round()
        return Label(
            target=0.5 - rejected * (1 - chosen),  # −1/2, the pair swapped, where only the rejected one is safe
            weight=torch.maximum(chosen, rejected),
            # In the sense chosen minus rejected, in swapped pairs too: −log σ(−β h − Δ) = −log σ(−(β h − offset)).
            offset=self.delta * (chosen - rejected),
        )
