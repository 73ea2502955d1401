"""Preference losses: from log-probs and labels to one loss a pair, pure functions of tensors.

Throughout, h is the margin (log-ratio of chosen minus log-ratio of rejected), g the label's target, and
z = scale · h − offset. The loss owns the strength of the KL anchor: ``tau`` in the squared loss, ``beta`` in the
others. The implicit reward of a response is scale · log-ratio.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bfpo_pl.batch import REFERENCE, Annotations, Label, LogProbs, Requirements
from bfpo_pl.component import Component, check_range


class PreferenceLoss(Component, ABC):
    """Turns log-probs and labels into one loss a unit (a pair; a response if ``unit`` says so)."""

    unit: Literal["pair", "response"] = "pair"
    """What one entry of the loss stands for; must be the labeling function's."""

    requires: Requirements = Requirements(references=(REFERENCE,))
    """The reference models (and columns) that the loss needs."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Strength of the KL anchor: tau or beta. Reward = scale · log-ratio."""

    @abstractmethod
    def __call__(self, log_probs: LogProbs, label: Label) -> Tensor:
        """The loss of each unit, before weights and reductions.

        Args:
            log_probs: Log-probs of policy and references ``[R]``, lengths ``[R]``, pair table ``[P, 2]``.
            label: What the labeling function asks, ``[N]``.

        Returns:
            ``[N]``, differentiable in ``log_probs.policy``.
        """

    def scaled_margin(self, log_probs: LogProbs, label: Label) -> Tensor:
        """``[P]``, z = scale · h − offset."""
        return self.scale * log_probs.margin() - label.offsets


class Squared(PreferenceLoss):
    """Squared distance of the margin to its target: ((tau · h − offset − g) / tau)², that is (h − g/tau)².

    The loss of BFPO and, with g = 1/2, of IPO. Source: arXiv 2408.15313; Azar et al., arXiv 2310.12036, eq. 17.

    Args:
        tau: Strength of the KL anchor, > 0. The BFPO paper uses 0.01.

    Raises:
        UserError: ``tau`` is not positive.
    """

    def __init__(self, tau: float) -> None:
        self.tau = check_range(self, "tau", tau, 0.0, low_open=True)

    @property
    def scale(self) -> float:
        return self.tau

    def __call__(self, log_probs: LogProbs, label: Label) -> Tensor:
        # (h − (g + offset)/tau)², written so that tau · h never loses digits of a large h.
        return (log_probs.margin() - (label.target + label.offsets) / self.tau) ** 2


class Logistic(PreferenceLoss):
    """Logistic loss −p log σ(z) − (1 − p) log σ(−z), z = beta · h − offset: DPO, with soft preferences.

    p is the label's probability that chosen wins (by default 1, 1/2 or 0 by the sign of g). Label smoothing ε puts
    p ← (1 − ε) p + ε (1 − p), which is conservative DPO. Source: Rafailov et al., arXiv 2305.18290, eq. 7.

    Args:
        beta: Strength of the KL anchor, > 0. DPO's usual value is 0.1.
        label_smoothing: ε, the assumed share of flipped preferences, in [0, 0.5].

    Raises:
        UserError: An argument lies outside its range.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0) -> None:
        self.beta = check_range(self, "beta", beta, 0.0, low_open=True)
        self.label_smoothing = check_range(self, "label_smoothing", label_smoothing, 0.0, 0.5)

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, log_probs: LogProbs, label: Label) -> Tensor:
        z = self.scaled_margin(log_probs, label)
        p = label.probabilities
        p = (1 - self.label_smoothing) * p + self.label_smoothing * (1 - p)
        return -p * logsigmoid(z) - (1 - p) * logsigmoid(-z)


class RobustLogistic(PreferenceLoss):
    """Robust DPO: the logistic loss corrected for a known share ε of flipped preferences, unbiased under that noise.

    With ℓ(z) = −p log σ(z) − (1 − p) log σ(−z): [(1 − ε) ℓ(z) − ε ℓ(−z)] / (1 − 2ε).
    Source: Chowdhury et al., "Provably Robust DPO", arXiv 2403.00409.

    Args:
        beta: Strength of the KL anchor, > 0.
        label_smoothing: ε, the share of flipped preferences, in [0, 0.5).

    Raises:
        UserError: An argument lies outside its range.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.1) -> None:
        self.beta = check_range(self, "beta", beta, 0.0, low_open=True)
        self.label_smoothing = check_range(self, "label_smoothing", label_smoothing, 0.0, 0.5, high_open=True)

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, log_probs: LogProbs, label: Label) -> Tensor:
        z = self.scaled_margin(log_probs, label)
        p = label.probabilities
        kept = -p * logsigmoid(z) - (1 - p) * logsigmoid(-z)
        flipped = -p * logsigmoid(-z) - (1 - p) * logsigmoid(z)
        epsilon = self.label_smoothing
        return ((1 - epsilon) * kept - epsilon * flipped) / (1 - 2 * epsilon)


class Hinge(PreferenceLoss):
    """Hinge loss max(0, 1 − sign(g) · z), z = beta · h − offset: SLiC with a reference.

    A target of 0 gives the constant 1, without a gradient. Source: Zhao et al., "SLiC-HF", arXiv 2305.10425.

    Args:
        beta: Strength of the KL anchor, > 0.

    Raises:
        UserError: ``beta`` is not positive.
    """

    def __init__(self, beta: float) -> None:
        self.beta = check_range(self, "beta", beta, 0.0, low_open=True)

    @property
    def scale(self) -> float:
        return self.beta

    def __call__(self, log_probs: LogProbs, label: Label) -> Tensor:
        return torch.relu(1 - torch.sign(label.target) * self.scaled_margin(log_probs, label))


class AuxiliaryLoss(Component, ABC):
    """A term added to each pair's preference loss; not part of BFPO."""

    requires: Requirements = Requirements()
    """The columns and references that the term needs."""

    @abstractmethod
    def __call__(self, log_probs: LogProbs, annotations: Annotations) -> Tensor:
        """``[P]``, the term of each pair, differentiable in ``log_probs.policy``."""


class SafeChosenNLL(AuxiliaryLoss):
    """weight · s_chosen · (−log π(chosen)): keeps safe, helpful responses likely. Not the paper's; off by default.

    The squared loss bounds margins but not likelihoods: both responses of a pair may lose probability together, to text
    that is neither. This term holds on to the responses worth keeping.

    Args:
        weight: Weight of the term against the preference loss, ≥ 0.

    Raises:
        UserError: ``weight`` is negative.
    """

    requires = Requirements(columns=("chosen_safe",))

    def __init__(self, weight: float) -> None:
        self.weight = check_range(self, "weight", weight, 0.0)

    def __call__(self, log_probs: LogProbs, annotations: Annotations) -> Tensor:
        return -self.weight * annotations["chosen_safe"] * log_probs.chosen(log_probs.policy)
