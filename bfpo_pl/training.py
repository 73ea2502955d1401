"""Common ground of supervised fine-tuning and preference training: the policy, its optimizer, its guards."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bfpo_pl.batch import PairBatch, Window
from bfpo_pl.component import RunError, UserError, check_range
from bfpo_pl.data.loading import of_every_share, rank_and_world
from bfpo_pl.fit_loop import GoingOn
from bfpo_pl.guard import Stopped, UpdateGuard
from bfpo_pl.models.attention import AttentionBackend, Auto
from bfpo_pl.models.buffers import float_buffers, restore_buffers
from bfpo_pl.models.checkpointing import Checkpointing, check_checkpointing, checkpoint_activations
from bfpo_pl.models.loading import load_in_shards
from bfpo_pl.models.log_probs import METHODS, bind_log_probs
from bfpo_pl.models.sharding import shard
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.tensor_parallel import check_plan
from bfpo_pl.models.trainable import Everything, TrainablePart, parameter_counts
from bfpo_pl.optimizers import clip_before_the_step, warn_of_lost_updates
from bfpo_pl.schedules import Schedule, WarmupCosine

STATE = "bfpo_pl"
"""Key of the module's own state in a checkpoint."""


class HeadMismatchError(RunError):
    """The model's own logits differ from those that the log-probs are computed from."""


class AttentionMismatchError(RunError):
    """The model's hidden states under the attention backend differ from those of plain rows."""


class ResponseModule(LightningModule):
    """Holds a policy and trains it on batches of responses; what the loss is, subclasses say.

    No ``save_hyperparameters``: with it a checkpoint's arguments would silently override the command line.
    """

    policy: PreTrainedModel | None

    def __init__(
        self,
        policy: ModelSource,
        optimizer: OptimizerCallable,
        schedule: Schedule | None,
        trainable: TrainablePart | None,
        attention: AttentionBackend | None,
        logp_reduction: Literal["sum", "mean"],
        chunk_size: int,
        activation_checkpointing: Checkpointing,
        max_nonfinite_steps: int = 0,
    ) -> None:
        super().__init__()
        self.source = policy
        self.policy = None
        self.optimizer = optimizer
        self.schedule = schedule or WarmupCosine()
        self.trainable = trainable or Everything()
        self.attention = attention or Auto()
        self.logp_reduction = logp_reduction
        self.chunk_size = int(check_range(self, "chunk_size", chunk_size, 1))
        self.activation_checkpointing = check_checkpointing(activation_checkpointing)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._float_buffers: dict[str, Tensor] = {}
        self.guard = UpdateGuard(int(check_range(self, "max_nonfinite_steps", max_nonfinite_steps, 0)))
        self.validated_step = -1
        """Optimizer step of the last validation."""
        self._unlogged: dict[str, Tensor] | None = None
        self._train_metrics: Metric | None = None
        self._val_metrics: Metric | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded once; it needs no weights."""
        if self._tokenizer is None:
            self._tokenizer = self.source.load_tokenizer()
        return self._tokenizer

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a response besides the tokenizer's own, as the policy's generation config names them."""
        return self.source.stop_token_ids()

    # ---- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self._keep_batches_whole()
        self.source.check_training(self.trainable, str(self.trainer.precision))
        self.source.check()
        if (size := getattr(self.trainer.strategy, "tensor_parallel_size", 1)) > 1:
            self.trainable.apply(skeleton := self.source.skeleton())
            check_plan(skeleton, size)

    def _keep_batches_whole(self) -> None:
        """Under ``bf16-true`` Lightning converts every float of a batch, which would round soft flags and scores."""
        plugin = self.trainer.precision_plugin
        convert = plugin.convert_input
        plugin.convert_input = lambda data: data if isinstance(data, PairBatch) else convert(data)  # type: ignore

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        policy = self.load(self.source, self._prepare_policy)
        self._float_buffers = float_buffers(policy)
        policy.train()  # from_pretrained leaves eval mode, and Lightning keeps what it finds
        self.policy = policy

    def _prepare_policy(self, policy: PreTrainedModel) -> None:
        self.trainable.apply(policy)
        checkpoint_activations(policy, self.activation_checkpointing)
        trained, total = parameter_counts(policy)
        rank_zero_info(f"Policy {self.source}: {trained:,} of {total:,} parameters train ({trained / total:.1%}).")

    def on_fit_start(self) -> None:
        self._after_cast()

    def on_validation_start(self) -> None:
        self._after_cast()

    def _after_cast(self) -> None:
        """What Lightning's move and cast of the policy left to do."""
        assert self.policy is not None
        restore_buffers(self.policy, self._float_buffers, self.device)

    def load(self, source: ModelSource, prepare: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
        """A source's network with its weights and log-prob methods; under a sharding strategy, loaded in shards.

        Args:
            source: Where it comes from.
            prepare: Changes it before it is sharded: what trains, further modules.
        """
        mesh = self.device_mesh
        if mesh is not None:
            strategy = self.trainer.strategy
            device = getattr(strategy, "shard_device", strategy.root_device)
            return load_in_shards(source, prepare, self._shard, device)
        model = source.load_model()
        prepare(model)
        self._bind(model)
        return model

    def _bind(self, model: PreTrainedModel) -> None:
        bind_log_probs(model, self.attention, self.logp_reduction, self.chunk_size)

    def _shard(self, model: PreTrainedModel) -> None:
        assert self.device_mesh is not None
        self._bind(model)
        offload = getattr(self.trainer.strategy, "offload_policy", None)
        shard(model, self.device_mesh, METHODS, str(self.trainer.precision), offload)

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        try:
            optimizer = self.optimizer(p for p in self.policy.parameters() if p.requires_grad)
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}.") from error
        clip_before_the_step(optimizer)
        warn_of_lost_updates(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) or steps < 0:  # Lightning says -1 where epochs have no known length
            why = getattr(getattr(self.trainer, "datamodule", None), "why_length_unknown", "")
            remedy = f"max_steps, since epochs have no known length: {why}" if why else "max_steps or max_epochs"
            raise UserError(f"The learning-rate schedule needs the length of the run: set trainer.{remedy}.")
        scheduler = self.schedule.build(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- steps ----------------------------------------------------------------------------------------------------

    def log_probs_of(self, batch: PairBatch) -> Tensor:
        """``[R]``, log-probs of the responses under the policy."""
        return self.policy.response_log_probs(batch)  # type: ignore[union-attr,operator]

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        """The mean of a tensor over processes, without a gradient; itself on one process or without a trainer."""
        if self._trainer is None or self.trainer.world_size == 1:
            return values
        values = values.detach().clone()
        if not torch.distributed.is_initialized():
            return self.trainer.strategy.reduce(values, reduce_op="mean")
        # Not by the strategy, whose reduce begins with a barrier: the host would wait for the device in every step.
        torch.distributed.all_reduce(values)
        return values / self.trainer.world_size

    def mean_over_step(self, count: Callable[[PairBatch | Window], Tensor], batch: PairBatch) -> Tensor:
        """A count of an optimizer step's data, averaged over processes and the micro-batches that are accumulated.

        Lightning divides every micro-batch's loss by their number, and gradients are averaged over processes: a sum of
        losses over this count comes to the mean over the whole step, however unequal its parts are.

        Args:
            count: Counts what a batch has, or the whole window of micro-batches on this process.
            batch: The micro-batch at hand.

        Raises:
            UserError: The number of micro-batches changes during the run.
        """
        window = batch.window
        if window is None:
            return self.mean_over_ranks(count(batch))
        if self._trainer is not None and window.size != self.trainer.accumulate_grad_batches:
            raise UserError(
                f"This step accumulates {self.trainer.accumulate_grad_batches} batches, and the data was laid out for "
                f"{window.size}: set trainer.accumulate_grad_batches, once, instead of a callback that changes it."
            )
        return self.mean_over_ranks(count(window)) / window.size

    def check_network(self, device: torch.device) -> None:
        """Compares the head's logits and the attention with the model's own on a few tokens, once.

        Args:
            device: Where the policy computes.

        Raises:
            HeadMismatchError: The logits differ by more than rounding.
            AttentionMismatchError: The hidden states do.
        """
        discrepancy = self.policy.head_discrepancy(device).item()  # type: ignore[union-attr,operator]
        exact = self.policy.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled()  # type: ignore[union-attr]
        tolerance = 1e-3 if exact else 0.05
        name = type(self.policy).__name__
        if not discrepancy <= tolerance:
            raise HeadMismatchError(
                f"{name} changes its logits after the output head in a way that bfpo_pl does not "
                f"know (relative difference {discrepancy:.2g}). Its log-probs would be wrong, so the run stops."
            )
        discrepancy = self.policy.attention_discrepancy(device).item()  # type: ignore[union-attr,operator]
        if not discrepancy <= (1e-3 if exact else 0.1):
            raise AttentionMismatchError(
                f"{name} attends in a way that {self.attention} does not know (relative difference "
                f"{discrepancy:.2g}): responses might see each other, so the run stops. Set model.attention to Padded."
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds what is random in this batch (dropout): a run that goes on later draws what this one would have."""
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        number = total.processed
        rank, _ = rank_and_world(self.trainer)
        seed = int(os.environ.get("PL_GLOBAL_SEED") or 0)
        torch.manual_seed(int(np.random.SeedSequence([seed, number, rank]).generate_state(1, np.uint64)[0] >> 1))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Looks at losses and gradients before the update applies.

        Raises:
            NonFiniteError: One was not finite on some rank, and no more steps may be skipped.
        """
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        over_shards = getattr(self.trainer.strategy, "norm_over_shards", None)
        self.guard.decide(named, self.trainer.global_step, self.mean_over_ranks, not scaled, over_shards)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm that the guard has taken already, or by value."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.guard.norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.guard.norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the count of skipped steps, and each process's sums of the metrics that are not logged yet."""
        self._log_if_due()  # a kill between the save and the end of the step would leave these values out for ever
        metric = self._train_metrics
        own = None if metric is None or not metric.update_called else _sums(metric)
        checkpoint[STATE] = {
            "skipped_steps": self.guard.skipped,
            "train_metrics": of_every_share(self.trainer, own),
            "validated_step": self.validated_step,
        }

    def _restore_state(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get(STATE, {})
        self.guard.skipped = int(state.get("skipped_steps", 0))
        self.validated_step = int(state.get("validated_step", -1))
        saved = state.get("train_metrics", [])
        rank, world = rank_and_world(self.trainer)
        if len(saved) == world:
            self._unlogged = saved[rank]
        elif rank == 0:  # of another number of processes: their sum is what will be logged
            known = [each for each in saved if each]
            self._unlogged = {name: sum(each[name] for each in known) for name in known[0]} if known else None

    def going_on(self, metric: Metric) -> Metric:
        """A new training metric, on the module's device, with what a checkpoint had not logged of it."""
        metric = metric.to(self.device)
        saved, self._unlogged = self._unlogged, None
        for name, value in (saved or {}).items():
            setattr(metric, name, value.to(self.device))
        metric._update_count += bool(saved)
        return metric

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares a checkpoint's weights with the policy's before they load, and takes over the state of its metrics.

        Raises:
            UserError: They are another model's; the message names the first that differs.
        """
        step, last = int(checkpoint.get("global_step", 0)), self.trainer.max_steps
        new = self.trainer.state.fn == TrainerFn.FITTING and not isinstance(self.trainer.fit_loop, GoingOn)
        if new and 0 < last <= step:
            raise UserError(
                f"The checkpoint is at step {step} and trainer.max_steps is {last}: nothing is left to train. Raise it."
            )
        self._restore_state(checkpoint)
        own = self.state_dict()
        saved = checkpoint.get("state_dict", {})
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        if not shapes:  # a sharded checkpoint holds its weights elsewhere
            return
        for name in sorted(own.keys() | shapes.keys()):
            here = tuple(own[name].shape) if name in own else "no such weight"
            if shapes.get(name, "no such weight") != here:
                raise UserError(
                    f"The checkpoint is another model's: {name} is {shapes.get(name, 'no such weight')} there and "
                    f"{here} in this run's policy, {self.source} with {self.trainable}."
                )

    # ---- logging --------------------------------------------------------------------------------------------------

    def should_log(self) -> bool:
        """Whether the optimizer step that just ended is one to log, and has not been logged."""
        step = self.trainer.global_step
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped = not self.trainer.fit_loop._should_accumulate()
        return stepped and step > 0 and (step == 1 or step % every == 0)

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        self._log_if_due()
        if self.guard.agreed:  # checkpoints are saved before this hook, by callbacks
            raise Stopped(self.guard.agreed, self.trainer.global_step)

    def _log_if_due(self) -> None:
        metric = self._train_metrics
        if metric is not None and metric.update_called and self.should_log():
            self.log_train(metric)
            if self.guard.skipped:
                self.write({"train/skipped_steps": float(self.guard.skipped)})

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_step = self.trainer.global_step
        if self._val_metrics is not None:
            self.log_validation(self._val_metrics)

    def log_train(self, metric: Metric) -> None:
        """Writes a training metric to all loggers at the current optimizer step and resets it. Called on every rank."""
        self.write({f"train/{name}": value for name, value in metric.compute().items()})
        metric.reset()

    def log_validation(self, metric: Metric) -> None:
        """Writes a validation metric to all loggers, hands it to checkpoints and the progress bar, and resets it."""
        values = {f"val/{name}": value for name, value in metric.compute().items()}
        metric.reset()
        self.log_validation_values(values)

    def log_validation_values(self, values: dict[str, float]) -> None:
        """Writes values that are the same on every rank to all loggers, checkpoints and the progress bar."""
        self.write(values)
        # Lightning asks for sync_dist=True, but the metric's sums are over all ranks already.
        warnings.filterwarnings("ignore", ".*It is recommended to use `self.log.*sync_dist=True.*")
        for name, value in values.items():
            self.log(name, value, rank_zero_only=False, prog_bar=name == "val/all/all/loss", logger=False)

    def write(self, values: dict[str, float]) -> None:
        """Writes values to all loggers at the current optimizer step; what `self.log` gives them is a step behind."""
        if self.trainer.sanity_checking:
            return
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)
            logger.save()


def _sums(metric: Metric) -> dict[str, Tensor]:
    """A metric's state on the CPU; all of it is sums."""
    return {name: value.cpu() for name, value in metric.metric_state.items() if isinstance(value, Tensor)}
