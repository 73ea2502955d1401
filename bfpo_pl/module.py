"""The preference-training step: where batch, labeling, loss and reductions meet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bfpo_pl.batch import REFERENCE, Label, LogProbs, PairBatch, Requirements, Window, membership
from bfpo_pl.component import RunError, UserError
from bfpo_pl.labeling import LabelingFunction
from bfpo_pl.losses import AuxiliaryLoss, PreferenceLoss
from bfpo_pl.metrics import PreferenceMetrics
from bfpo_pl.models.attention import AttentionBackend
from bfpo_pl.models.reference import FrozenCopy, Reference, RunContext
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.trainable import TrainablePart
from bfpo_pl.reductions import Mean, PairReduction
from bfpo_pl.schedules import Schedule
from bfpo_pl.strategies import FSDP1
from bfpo_pl.training import ResponseModule


class RequirementError(UserError):
    """A labeling or loss needs something that the data or the references do not give."""


class StartMarginError(RunError):
    """The first margin is not 0 although the reference is the policy's own start."""


@dataclass(frozen=True)
class Objective:
    """What a batch comes to.

    Args:
        loss: Scalar that is minimised: the sum over streams of weight · reduction.
        losses: ``[N]``, loss of each unit before its weight.
        label: What the labeling asked, ``[N]``.
        log_probs: Log-probs of policy and references.
    """

    loss: Tensor
    losses: Tensor
    label: Label
    log_probs: LogProbs


class PreferenceModule(ResponseModule):
    """Trains a policy against a frozen reference, with a labeling function and a loss of one's choice.

    Args:
        policy: Where the policy comes from.
        labeling: From safety flags and the helpfulness order to each pair's target.
        loss: From log-probs and targets to each pair's loss.
        optimizer: Optimizer, called with the trainable parameters. No default: torch's learning rates would ruin a
            trained model.
        reference: The KL anchor. Default: a frozen copy of the policy's start, if the loss needs one.
        references: Further frozen models by name, for methods that need them.
        trainable: What of the policy trains. Default: everything.
        schedule: Learning-rate schedule. Default: warm-up over 10 % of the steps, then cosine to 0.
        auxiliary: A further term of each pair's loss, such as `SafeChosenNLL`; not the paper's.
        pair_reduction: From the losses of a stream's pairs to a scalar. Default: their weighted mean.
        logp_reduction: Over the tokens of a response: sum (BFPO, and IPO as published) or mean.
        attention: How the network attends over pair trees. Default: `Auto`.
        chunk_size: Response tokens that meet the vocabulary at once; fewer take less memory.
        activation_checkpointing: What the backward pass computes again, to save memory: none; selective, what lies
            between linear layers and attention, which costs little; full, all of each transformer block.
        max_nonfinite_steps: Optimizer steps with a loss or gradient that is NaN or infinite which are skipped, and
            counted, before the run stops. Default: it stops at the first.
    """

    def __init__(
        self,
        policy: ModelSource,
        labeling: LabelingFunction,
        loss: PreferenceLoss,
        optimizer: OptimizerCallable,
        reference: Reference | None = None,
        references: dict[str, Reference] | None = None,
        trainable: TrainablePart | None = None,
        schedule: Schedule | None = None,
        auxiliary: AuxiliaryLoss | None = None,
        pair_reduction: PairReduction | None = None,
        logp_reduction: Literal["sum", "mean"] = "sum",
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
            logp_reduction=logp_reduction,
            chunk_size=chunk_size,
            activation_checkpointing=activation_checkpointing,
            max_nonfinite_steps=max_nonfinite_steps,
        )
        self.labeling = labeling
        self.loss = loss
        self.auxiliary = auxiliary
        self.pair_reduction = pair_reduction or Mean()
        self.references = dict(references or {})
        if reference is not None or REFERENCE in self.requires.references:
            self.references[REFERENCE] = reference or FrozenCopy()
        if labeling.unit != loss.unit:
            raise RequirementError(
                f"{labeling} labels each {labeling.unit}, but {loss} needs a label for each {loss.unit}."
            )
        if auxiliary is not None and loss.unit != "pair":
            raise RequirementError(f"{auxiliary} is a term of each pair, but {loss} has one loss a {loss.unit}.")
        missing = [name for name in self.requires.references if name not in self.references]
        if missing:
            raise RequirementError(
                f"{labeling} with {loss} needs the reference model(s) {', '.join(missing)}; name them under "
                f"model.references."
            )
        self._start_checked = False
        self._train_metrics: Any
        self._val_metrics: PreferenceMetrics | None

    @property
    def requires(self) -> Requirements:
        """What labeling, loss and auxiliary term need together."""
        needed = self.labeling.requires | self.loss.requires
        return needed | self.auxiliary.requires if self.auxiliary is not None else needed

    # ---- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for reference in self.references.values():
            reference.check()
            reference.check_strategy(self.trainer.strategy)
        datamodule = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "columns_of"):
            self._check_columns(datamodule)
        rank_zero_info(
            f"Labeling {self.labeling}, loss {self.loss}, log-probs reduced by {self.logp_reduction}, "
            f"pairs by {self.pair_reduction}"
            + (f", auxiliary {self.auxiliary} (not the paper's)." if self.auxiliary is not None else ".")
        )

    def _check_columns(self, datamodule: Any) -> None:
        needed = dict.fromkeys(self.requires.columns, str(self.labeling))
        for name, reference in self.references.items():
            needed.update(dict.fromkeys(reference.columns, f"the reference '{name}'"))
        for stream in datamodule.streams:
            have = set(datamodule.columns_of(stream))
            for column, owner in needed.items():
                if column not in have:
                    flags = column in ("chosen_safe", "rejected_safe")
                    remedy = "set assume_safe: true for that stream if all its rows are safe, or " if flags else ""
                    raise RequirementError(
                        f"{owner} with {self.loss} needs the column '{column}', which the stream '{stream}' lacks (it "
                        f"has: {', '.join(sorted(have)) or 'none'}): {remedy}name the column in the stream's adapter."
                    )

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        super().configure_model()
        assert self.policy is not None
        for reference in self.references.values():
            reference.prepare(self.policy, self.source, self.load)

    def _after_cast(self) -> None:
        super()._after_cast()
        for reference in self.references.values():
            reference.to(self.device, self.policy.dtype)  # type: ignore[union-attr]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._fill_references()

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._fill_references()

    def _fill_references(self) -> None:
        """Lets references compute what is computed before the first batch."""
        for name, reference in self.references.items():
            reference.fill(name, self._run_context)

    def _run_context(self) -> RunContext:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        policy, strategy = self.policy, self.trainer.strategy
        if not hasattr(datamodule, "rows"):
            raise UserError("A reference that is computed before training needs the rows of an AlignmentData.")
        assert policy is not None
        log_probs = self.summed_log_probs
        if isinstance(strategy, FSDP1):  # which gathers weights in the module's own calls alone
            log_probs = partial(strategy.call, "summed_log_probs")
        return RunContext(
            rows=datamodule.rows,
            cache=datamodule.cache_folder,
            policy=policy,
            policy_is_start=self.trainer.ckpt_path is None and self.trainer.global_step == 0,
            source=self.source,
            log_probs=log_probs,
            load=self.load,
            strategy=strategy,
            reduction=self.logp_reduction,
        )

    def summed_log_probs(self, batch: PairBatch) -> Tensor:
        """``[R]``, log-probs of the responses under the policy, summed over tokens."""
        return self.policy.response_log_probs(batch, reduction="sum")  # type: ignore[union-attr,operator]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what a run that goes on needs to know its references by."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["references"] = {name: reference.state() for name, reference in self.references.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares a checkpoint's weights and references with this run's.

        Raises:
            UserError: The weights are another model's; the message names the first that differs.
            RunError: A reference's log-probs are not those that the checkpoint's run trained with.
        """
        super().on_load_checkpoint(checkpoint)
        for name, state in checkpoint.get("references", {}).items():
            if name in self.references:
                self.references[name].check_state(state)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        for reference in self.references.values():
            batch = reference.annotate(batch)
        return batch

    # ---- steps ----------------------------------------------------------------------------------------------------

    def objective(self, batch: PairBatch) -> Objective:
        """The loss of a batch and all that it was made of.

        Args:
            batch: Pair trees of one or more streams.
        """
        assert self.policy is not None
        # References first: an adapter must be back on before the policy's graph is built.
        references = {name: reference.log_probs(self.policy, batch) for name, reference in self.references.items()}
        log_probs = LogProbs(self.log_probs_of(batch), batch.response_lengths, batch.pairs, references)
        label = self.labeling(batch.annotations)
        losses = self.loss(log_probs, label)
        if self.auxiliary is not None:
            losses = losses + self.auxiliary(log_probs, batch.annotations)
        return Objective(self._sum_over_streams(losses, label.weights, batch), losses, label, log_probs)

    def _sum_over_streams(self, losses: Tensor, weights: Tensor, batch: PairBatch) -> Tensor:
        """Σ over streams of stream weight · reduction over the stream's units: the paper adds the streams' means."""
        stream_weights = self._by_stream(weights, batch, len(batch.streams))  # [K, N]

        def count(part: PairBatch | Window) -> Tensor:
            of_part = weights if part is batch else self.labeling(part.annotations).weights
            return (self._by_stream(of_part, part, len(batch.streams)) > 0).sum(dim=1).to(losses.dtype)

        counts = self.mean_over_step(count, batch)
        reduced = [self.pair_reduction(losses, stream_weights[k], counts[k]) for k in range(len(batch.streams))]
        return (torch.stack(reduced) * batch.stream_weight.to(losses.dtype)).sum()

    def _by_stream(self, weights: Tensor, part: PairBatch | Window, streams: int) -> Tensor:
        """``[K, N]``, the weights of units in the row of their stream, 0 elsewhere."""
        stream = part.pair_stream if self.loss.unit == "pair" else part.response_stream
        return membership(stream, streams).to(weights.dtype) * weights

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        if not self._start_checked and self.trainer.global_step == 0:
            self.check_network(batch.tokens.device)
            self._check_start(batch)
        self._start_checked = True
        objective = self.objective(batch)
        self.guard.watch(objective.loss, batch.origins)
        self.log("loss", objective.loss.detach(), prog_bar=True, logger=False)
        if self._train_metrics is None:
            self._train_metrics = self.going_on(PreferenceMetrics(batch.streams))
        self._update(self._train_metrics, batch, objective)
        return objective.loss

    @torch.no_grad()
    def _check_start(self, batch: PairBatch) -> None:
        """Where the reference is the policy's own start, the margin must be 0 before the first update.

        Exactly 0 for a live reference; within its tolerance, on average, for one that was computed beforehand. Dropout,
        if there is any, is off meanwhile.

        Raises:
            StartMarginError: It is not.
        """
        reference = self.references.get(REFERENCE)
        if reference is None or not reference.starts_as_policy:
            return
        assert self.policy is not None
        training = self.policy.training
        self.policy.eval()
        ratio = self.log_probs_of(batch) - reference.log_probs(self.policy, batch)
        self.policy.train(training)
        if reference.start_tolerance:
            self._check_mean_margin(ratio, batch, reference.start_tolerance)
            return
        largest = ratio.abs().max().item() if len(ratio) else 0.0
        if largest != 0.0:
            raise StartMarginError(
                "Before the first update policy and reference are the same model, so every log-ratio must be 0, but "
                f"one is {largest:.3g}. Usual causes: an adapter that does not start at zero, or a policy whose "
                "weights were changed after it was loaded."
            )

    def _check_mean_margin(self, ratio: Tensor, batch: PairBatch, tolerance: float) -> None:
        margins = ratio[batch.pairs[:, 0]] - ratio[batch.pairs[:, 1]] if len(batch.pairs) else ratio
        mean = margins.abs().mean().item() if len(margins) else 0.0
        rank_zero_info(f"Before the first update the mean |margin| is {mean:.2g} nats ({tolerance:g} are allowed).")
        if not mean <= tolerance:
            raise StartMarginError(
                "Before the first update policy and reference are the same model, so margins must be near 0, but their "
                f"mean size is {mean:.3g} nats and start_tolerance is {tolerance:g}. Usual causes: an adapter that "
                "does not start at zero, or a policy whose weights were changed after it was loaded."
            )

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        objective = self.objective(batch)
        if self._val_metrics is None:
            self._val_metrics = PreferenceMetrics(batch.streams).to(self.device)
        self._update(self._val_metrics, batch, objective)

    def _update(self, metrics: PreferenceMetrics, batch: PairBatch, objective: Objective) -> None:
        label, losses = objective.label, objective.losses
        if self.loss.unit == "pair":
            metrics.update(batch, objective.log_probs, label, losses, self.loss.scale)
        else:
            metrics.update(batch, objective.log_probs, None, None, self.loss.scale)
            metrics.update_responses(batch, label, losses)
