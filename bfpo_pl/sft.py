"""Supervised fine-tuning, the stage before: the same sources, templates, trainable parts and strategies."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from bfpo_pl.batch import PairBatch, Window, membership
from bfpo_pl.component import UserError
from bfpo_pl.metrics import TokenMetrics
from bfpo_pl.models.attention import AttentionBackend
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.trainable import TrainablePart
from bfpo_pl.schedules import Schedule
from bfpo_pl.training import ResponseModule


class SFTModule(ResponseModule):
    """Trains a policy to give the responses of its data: mean negative log-likelihood per response token.

    Args:
        policy: Where the policy comes from.
        optimizer: Optimizer, called with the trainable parameters.
        trainable: What of the policy trains. Default: everything.
        schedule: Learning-rate schedule. Default: warm-up over 10 % of the steps, then cosine to 0.
        attention: How the network attends over prompts and responses. Default: `Auto`.
        chunk_size: Response tokens that meet the vocabulary at once; fewer take less memory.
        activation_checkpointing: What the backward pass computes again, to save memory: none; selective, what lies
            between linear layers and attention, which costs little; full, all of each transformer block.
        max_nonfinite_steps: Optimizer steps with a loss or gradient that is NaN or infinite which are skipped, and
            counted, before the run stops. Default: it stops at the first.
    """

    def __init__(
        self,
        policy: ModelSource,
        optimizer: OptimizerCallable,
        trainable: TrainablePart | None = None,
        schedule: Schedule | None = None,
        attention: AttentionBackend | None = None,
        chunk_size: int = 4096,
        activation_checkpointing: Literal["none", "selective", "full"] = "none",
        max_nonfinite_steps: int = 0,
    ) -> None:
        super().__init__(
            policy=policy,
            optimizer=optimizer,
            schedule=schedule,
            trainable=trainable,
            attention=attention,
            logp_reduction="sum",
            chunk_size=chunk_size,
            activation_checkpointing=activation_checkpointing,
            max_nonfinite_steps=max_nonfinite_steps,
        )
        self._head_checked = False
        self._train_metrics: Any
        self._val_metrics: TokenMetrics | None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if getattr(getattr(self.trainer, "datamodule", None), "has_pairs", False):
            raise UserError(
                "`bfpo sft` imitates every response, and this data has rejected ones. Read it with an SFT adapter: "
                "Messages, or Columns with rejected: null."
            )

    def objective(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The scalar loss, Σ over streams of weight · NLL / tokens, and the NLL of each response ``[R]``."""
        nll = -self.log_probs_of(batch)
        member = membership(batch.response_stream, len(batch.streams)).to(nll.dtype)  # [K, R]

        def count(part: PairBatch | Window) -> Tensor:
            of_stream = membership(part.response_stream, len(batch.streams)).to(nll.dtype)
            return of_stream @ part.response_lengths.to(nll.dtype)

        tokens = self.mean_over_step(count, batch)
        loss = (batch.stream_weight.to(nll.dtype) * (member @ nll) / tokens.clamp(min=1e-12)).sum()
        return loss, nll

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        if not self._head_checked:
            self.check_network(batch.tokens.device)
            self._head_checked = True
        loss, nll = self.objective(batch)
        self.guard.watch(loss, batch.origins)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        if self._train_metrics is None:
            self._train_metrics = self.going_on(TokenMetrics(batch.streams))
        self._train_metrics.update(batch, nll)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        if self._val_metrics is None:
            self._val_metrics = TokenMetrics(batch.streams).to(self.device)
        self._val_metrics.update(batch, self.objective(batch)[1])
