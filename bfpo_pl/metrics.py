"""Metrics as sums and counts by stream and by safety quadrant: right over ranks, accumulation and ragged batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from bfpo_pl.batch import REFERENCE, Label, LogProbs, PairBatch, membership

QUADRANTS = ("safe_safe", "safe_unsafe", "unsafe_safe", "unsafe_unsafe")
"""Safety of (chosen, rejected). With soft flags a pair counts in each quadrant by its probability."""

PAIR_METRICS = (
    "loss",
    "margin",
    "target",
    "log_prob_chosen",
    "log_prob_rejected",
    "log_ratio_chosen",
    "log_ratio_rejected",
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "accuracy",
    "accuracy_helpfulness",
)


def quadrant_weights(chosen_safe: Tensor, rejected_safe: Tensor) -> Tensor:
    """``[4, P]``, the probability that each pair lies in each quadrant, in the order of `QUADRANTS`."""
    return torch.stack(
        [
            chosen_safe * rejected_safe,
            chosen_safe * (1 - rejected_safe),
            (1 - chosen_safe) * rejected_safe,
            (1 - chosen_safe) * (1 - rejected_safe),
        ]
    )


def pair_values(log_probs: LogProbs, label: Label | None, losses: Tensor | None, scale: float) -> dict[str, Tensor]:
    """The metrics of each pair, each ``[P]``, as far as they apply to the method.

    ``accuracy`` compares the sign of the margin with that of the target; ``accuracy_helpfulness`` asks whether the more
    helpful response won. A margin of exactly 0 is half right.

    Args:
        log_probs: Log-probs of the responses.
        label: Labels of the pairs; None in methods that label responses.
        losses: ``[P]``, losses of the pairs; likewise.
        scale: The loss's tau or beta: reward = scale · log-ratio.
    """
    policy = log_probs.policy
    values = {"log_prob_chosen": log_probs.chosen(policy), "log_prob_rejected": log_probs.rejected(policy)}
    margin = values["log_prob_chosen"] - values["log_prob_rejected"]
    if REFERENCE in log_probs.references:
        ratio = log_probs.log_ratio()
        margin = log_probs.margin()
        values["log_ratio_chosen"], values["log_ratio_rejected"] = log_probs.chosen(ratio), log_probs.rejected(ratio)
        values["reward_chosen"] = scale * values["log_ratio_chosen"]
        values["reward_rejected"] = scale * values["log_ratio_rejected"]
        values["reward_margin"] = scale * margin
    values["margin"] = margin
    values["accuracy_helpfulness"] = (1 + torch.sign(margin)) / 2
    if label is not None and losses is not None:
        values["loss"] = losses
        values["target"] = label.target
        values["accuracy"] = (1 + torch.sign(margin) * torch.sign(label.target)) / 2
    return values


def counts_in(name: str, label: Label | None, size: int, device: torch.device) -> Tensor:
    """``[P]`` bool, which pairs a metric counts: loss and accuracy leave out weight 0, accuracy also g = 0."""
    every = torch.ones(size, dtype=torch.bool, device=device)
    if label is None or name not in ("loss", "accuracy"):
        return every
    return (label.weights > 0) & (label.target != 0) if name == "accuracy" else label.weights > 0


class PreferenceMetrics(Metric):
    """Means of the pairs' metrics, overall, by stream and by safety quadrant.

    Args:
        streams: Names of the data streams.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.streams = tuple(streams)
        shape = (len(self.streams), 1 + len(QUADRANTS), len(PAIR_METRICS))
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, batch: PairBatch, log_probs: LogProbs, label: Label | None, losses: Tensor | None, scale: float
    ) -> None:
        """Adds a batch; the arguments are those of `pair_values`."""
        if len(batch.pairs) == 0:
            return
        values = pair_values(log_probs, label, losses, scale)
        size, device = len(batch.pairs), values["margin"].device
        absent = torch.zeros(size, dtype=torch.bool, device=device)
        present = torch.stack(
            [counts_in(name, label, size, device) if name in values else absent for name in PAIR_METRICS]
        )  # [M, P]
        zero = torch.zeros_like(values["margin"])
        table = torch.stack([values.get(name, zero).detach().double() for name in PAIR_METRICS])  # [M, P]
        notes = batch.annotations
        groups = torch.ones(1, len(batch.pairs), dtype=torch.float64, device=table.device)
        if "chosen_safe" in notes and "rejected_safe" in notes:
            quadrants = quadrant_weights(notes["chosen_safe"].double(), notes["rejected_safe"].double())
            groups = torch.cat([groups, quadrants])  # [1 + 4, P]
        member = membership(batch.pair_stream, len(self.streams)).T.double()  # [P, K]
        used = slice(0, len(groups))
        counted = torch.einsum("pk,gp,mp->kgmp", member, groups, present.double())
        # A non-finite value must show in its own group and in no other, hence no product with a zero weight.
        self.total[:, used] += torch.where(counted > 0, counted * table, 0.0).sum(-1)
        self.count[:, used] += counted.sum(-1)

    def update_responses(self, batch: PairBatch, label: Label, losses: Tensor) -> None:
        """Adds the losses ``[R]`` of a method that labels responses, by stream."""
        member = membership(batch.response_stream, len(self.streams)).T.double()  # [R, K]
        counted = member * (label.weights > 0).double()[:, None]
        column = PAIR_METRICS.index("loss")
        self.total[:, 0, column] += torch.where(counted > 0, losses.detach().double()[:, None], 0.0).sum(0)
        self.count[:, 0, column] += counted.sum(0)

    def compute(self) -> dict[str, float]:
        """Means by name ``{stream|all}/{quadrant|all}/{metric}``; groups without a pair are left out."""
        total, count = (torch.cat([state.sum(0, keepdim=True), state]).cpu() for state in (self.total, self.count))
        return {
            f"{stream}/{quadrant}/{metric}": (total[k, q, m] / count[k, q, m]).item()
            for k, stream in enumerate(("all", *self.streams))
            for q, quadrant in enumerate(("all", *QUADRANTS))
            for m, metric in enumerate(PAIR_METRICS)
            if count[k, q, m] > 1e-9
        }


class TokenMetrics(Metric):
    """Loss and perplexity per response token, by stream, for supervised fine-tuning.

    Args:
        streams: Names of the data streams.
    """

    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, streams: tuple[str, ...]) -> None:
        super().__init__()
        self.streams = tuple(streams)
        self.add_state("nll", torch.zeros(len(self.streams), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(self.streams), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: PairBatch, nll: Tensor) -> None:
        """Adds a batch; ``nll`` ``[R]`` is the summed negative log-likelihood of each response."""
        self.nll.index_add_(0, batch.response_stream, nll.detach().double())
        self.tokens.index_add_(0, batch.response_stream, batch.response_lengths.double())

    def compute(self) -> dict[str, float]:
        """Means by name ``{stream|all}/all/{loss|perplexity}``."""
        nll, tokens = (torch.cat([state.sum(0, keepdim=True), state]).cpu() for state in (self.nll, self.tokens))
        values: dict[str, float] = {}
        for k, stream in enumerate(("all", *self.streams)):
            if tokens[k] > 0:
                mean = nll[k] / tokens[k]
                values[f"{stream}/all/loss"] = mean.item()
                values[f"{stream}/all/perplexity"] = mean.exp().item()
        return values
