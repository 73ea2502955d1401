"""MODPO: preferences of one objective, the reward of another as a margin."""

import torch
from torch import Tensor

from bfpo_pl.batch import REFERENCE, Annotations, Label, LogProbs, Requirements
from bfpo_pl.component import check_range
from bfpo_pl.labeling import LabelingFunction
from bfpo_pl.losses import Logistic


class MarginReward(LabelingFunction):
    """The chosen response wins (g = 1/2), with the offset m_chosen − m_rejected read from a score column.

    Args:
        column: Response column of the margin reward m, for instance ``score``, or ``safe`` for the safety flags.
    """

    def __init__(self, column: str = "score") -> None:
        self.column = column

    @property
    def requires(self) -> Requirements:
        return Requirements(columns=(f"chosen_{self.column}", f"rejected_{self.column}"))

    def __call__(self, annotations: Annotations) -> Label:
        offset = annotations[f"chosen_{self.column}"] - annotations[f"rejected_{self.column}"]
        return Label(target=torch.full_like(offset, 0.5), offset=offset)


class MODPO(Logistic):
    """−log σ((β h − w1 (m_w − m_l)) / w0), w1 = 1 − w0: the preferences' reward and m, weighted.

    With r the reward that the preferences reveal, the optimum is ref · exp((w0 r + w1 m) / β), normalised. m is the
    label's offset (`MarginReward`), or, as the authors have it, the implicit reward β (log π_m − log π_ref) of a model
    aligned before. Source: Zhou et al., "Beyond One-Preference-Fits-All Alignment", arXiv 2310.03708.

    Args:
        beta: Strength of the KL anchor, > 0. The authors use 0.1.
        w0: Weight of the preferences, in (0, 1]; the authors use 0.1, 0.5 and 0.9.
        margin_reference: Name under ``model.references`` of the model that gives m. Default: the label alone gives it.

    Raises:
        UserError: An argument lies outside its range.
    """

    def __init__(self, beta: float, w0: float = 0.5, margin_reference: str | None = None) -> None:
        super().__init__(beta)
        self.w0 = check_range(self, "w0", w0, 0.0, 1.0, low_open=True)
        self.margin_reference = margin_reference

    @property
    def requires(self) -> Requirements:
        return Requirements(references=(REFERENCE, self.margin_reference) if self.margin_reference else (REFERENCE,))

    def scaled_margin(self, log_probs: LogProbs, label: Label) -> Tensor:
        margin = label.offsets
        if self.margin_reference:
            reward = self.beta * (log_probs.references[self.margin_reference] - log_probs.references[REFERENCE])
            margin = margin + log_probs.chosen(reward) - log_probs.rejected(reward)
        return (self.beta * log_probs.margin() - (1 - self.w0) * margin) / self.w0
