"""Labeling functions: from safety flags and the helpfulness order to the target g of each pair.

A labeling function is pure: it sees annotations and nothing of the model. In every pair ``chosen`` is the more helpful
response; the flags say s = 1 for a safe response, 0 for an unsafe one, and anything between for a probability.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from bfpo_pl.batch import Annotations, Label, Requirements
from bfpo_pl.component import Component, check_range


class LabelingFunction(Component, ABC):
    """Turns annotations into a label for each pair (or each response, if ``unit`` says so)."""

    unit: Literal["pair", "response"] = "pair"
    """What one row of the label stands for."""

    requires: Requirements = Requirements()
    """The columns that the data must have."""

    @abstractmethod
    def __call__(self, annotations: Annotations) -> Label:
        """Labels every unit of the batch.

        Args:
            annotations: The batch's columns and its pair table.

        Returns:
            A label whose tensors have one entry a pair ``[P]`` (or a response ``[R]``).
        """


_SAFETY_FLAGS = Requirements(columns=("chosen_safe", "rejected_safe"))


class BFPO(LabelingFunction):
    """Bi-factorial labels: g = b3 · (b1 · s_chosen − s_rejected) − alpha, safety and helpfulness at once.

    At the paper's values (b1 = 3, b3 = 1/2, alpha = 1/2) the targets are: both safe 1/2; safe chosen, unsafe rejected
    1; both unsafe −1/2; unsafe chosen, safe rejected −1. With alpha = 1/2 and all pairs safe, `Squared` is exactly IPO.

    Source: Zhang et al., "Bi-Factorial Preference Optimization", arXiv 2408.15313, and its official code.

    Args:
        b1: Weight of safety against helpfulness, > 1: the additive constant of helpfulness in the optimum is
            1/(b1 − 1), so a smaller b1 lets safety weigh more.
        alpha: Shift of the labels, in [0, b3 · (b1 − 1)]. The middle of that range is the one value that makes labels
            antisymmetric; 0 gives, at b1 = 3, the bilinear reward (s + E s)(P + 1/2) if safety and helpfulness are
            independent.
        b3: Scale of the labels, > 0. Default: 1/(b1 − 1), which keeps the meaning of tau.

    Raises:
        UserError: An argument lies outside its range.
    """

    requires = _SAFETY_FLAGS

    def __init__(self, b1: float = 3.0, alpha: float = 0.5, b3: float | None = None) -> None:
        self.b1 = check_range(self, "b1", b1, 1.0, low_open=True)
        default_b3 = 1.0 / (self.b1 - 1.0)
        self.b3 = default_b3 if b3 is None else check_range(self, "b3", b3, 0.0, low_open=True)
        # A hair of room for rounding: b3 = 1/(b1 - 1), written out, must allow alpha = 1.
        highest_alpha = 1.0 if b3 is None else self.b3 * (self.b1 - 1.0) * (1 + 1e-12)
        self.alpha = check_range(self, "alpha", alpha, 0.0, highest_alpha)

    def __call__(self, annotations: Annotations) -> Label:
        chosen_safe, rejected_safe = annotations["chosen_safe"], annotations["rejected_safe"]
        return Label(target=self.b3 * (self.b1 * chosen_safe - rejected_safe) - self.alpha)


class HelpfulnessOnly(LabelingFunction):
    """The more helpful response always wins: g = 1/2, whatever the safety flags.

    With `Squared` this is IPO (target 1/(2 tau)), with `Logistic` it is DPO.
    Source: Azar et al., arXiv 2310.12036; Rafailov et al., arXiv 2305.18290.
    """

    def __call__(self, annotations: Annotations) -> Label:
        size = len(annotations.pairs)
        return Label(target=torch.full((size,), 0.5, device=annotations.pairs.device))


class SafetyOnly(LabelingFunction):
    """The safer response wins: g = sign(s_chosen − s_rejected) / 2; pairs with equal flags are dropped (weight 0)."""

    requires = _SAFETY_FLAGS

    def __call__(self, annotations: Annotations) -> Label:
        sign = torch.sign(annotations["chosen_safe"] - annotations["rejected_safe"])
        return Label(target=sign / 2, weight=sign.abs())


class SafetyFirst(LabelingFunction):
    """The safer response wins, ties go to the more helpful one: g = −1/2 if s_chosen < s_rejected, else 1/2."""

    requires = _SAFETY_FLAGS

    def __call__(self, annotations: Annotations) -> Label:
        difference = annotations["chosen_safe"] - annotations["rejected_safe"]
        return Label(target=torch.where(difference < 0, -0.5, 0.5).to(difference.dtype))


class Linear(LabelingFunction):
    """Linear scalarisation of the two orders: g = [(1 − w) + w · (s_chosen − s_rejected)] / 2.

    The naive mix is w = 1/2; 0 is `HelpfulnessOnly`.

    Args:
        w: Weight of safety, in [0, 1].

    Raises:
        UserError: ``w`` lies outside [0, 1].
    """

    requires = _SAFETY_FLAGS

    def __init__(self, w: float = 0.5) -> None:
        self.w = check_range(self, "w", w, 0.0, 1.0)

    def __call__(self, annotations: Annotations) -> Label:
        difference = annotations["chosen_safe"] - annotations["rejected_safe"]
        return Label(target=((1.0 - self.w) + self.w * difference) / 2)
