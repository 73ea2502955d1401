"""When a run saves, and which of its checkpoints it keeps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from bfpo_pl.checkpoints.atomic import discard, point, recover
from bfpo_pl.checkpoints.check import checkpoint_step, problem
from bfpo_pl.checkpoints.index import Index
from bfpo_pl.checkpoints.space import SaveError
from bfpo_pl.component import UserError

PATTERN = "*" + ModelCheckpoint.FILE_EXTENSION
"""Glob of the names of checkpoints."""
LAST = ModelCheckpoint.CHECKPOINT_NAME_LAST + ModelCheckpoint.FILE_EXTENSION
"""Name of the link to the newest checkpoint."""


class RunCheckpoints(ModelCheckpoint):
    """Saves checkpoints, and keeps the newest and the best of them.

    Kept are the newest `keep_last` and, where a metric is monitored, the `save_top_k` best. A checkpoint is deleted
    only after a newer one is complete on the disk, and one that is damaged does not count as kept. ``last.ckpt`` is a
    link to the newest. ``index.json`` beside them names those that this run made, with their scores; nothing else in
    the folder is ever deleted, and a run that goes on in its folder goes on with them.

    Where a metric of validation is monitored, its value belongs to the checkpoint of the same step, and a validation
    that is among the best has its checkpoint saved, whether or not one was due.

    Args:
        keep_last: How many of the newest checkpoints are kept, at least 1. Two, so that there is one to fall back to.
        save_last: Keep a link ``last.ckpt`` to the newest checkpoint, and save one when training ends.
        save_top_k: How many of the best are kept beside the newest, by the value of `monitor`; -1 keeps all.
        monitor: Metric by which a checkpoint is better, such as ``val/all/all/loss``.
    """

    def __init__(
        self,
        keep_last: int = 2,
        save_last: bool | Literal["link"] | None = True,
        save_top_k: int = 1,
        monitor: str | None = None,
        **kwargs: Any,
    ) -> None:
        if keep_last < 1:
            raise UserError(
                f"checkpoint.keep_last must be at least 1, not {keep_last}: a run that keeps no newest checkpoint "
                f"cannot go on after a stop. No checkpoints at all: --trainer.enable_checkpointing=false."
            )
        if "://" in str(kwargs.get("dirpath")):
            raise UserError(
                f"checkpoint.dirpath: {kwargs['dirpath']} is an address. Checkpoints are renamed when they are "
                f"complete, which needs a file system: mount it, and name the folder."
            )
        super().__init__(save_last=save_last, save_top_k=save_top_k, monitor=monitor, **kwargs)
        self.keep_last = keep_last
        self._index = Index(monitor, self.mode)
        self._validated_step = -1

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        return {}  # the folder's index holds it, and cannot contradict what is there

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the folder's index holds it."""

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return Path(str(self.dirpath))

    # ---- when ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _on_rank_zero(trainer, self._open_folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # there is nothing new to save yet

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # never amid an optimizer step
        due = self._every_n_train_steps > 0 and trainer.global_step % self._every_n_train_steps == 0
        if self._train_time_interval is not None and self._last_time_checked is not None:
            passed = time.monotonic() - self._last_time_checked >= self._train_time_interval.total_seconds()
            if passed := trainer.strategy.broadcast(passed):
                self._last_time_checked = time.monotonic()
            due = due or passed
        if due:
            self.save_now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._validated_step = trainer.global_step
        epochs = self._every_n_epochs
        if not self._should_save_on_train_epoch_end(trainer) and epochs and not (trainer.current_epoch + 1) % epochs:
            self.save_now(trainer)
        if self.monitor is not None and self._is_validations:
            self._score_validated(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_last:
            self.save_now(trainer)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        self.save_now(trainer)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Nothing: ``last.ckpt`` is a link, and led to the newest checkpoint when that was complete."""

    def save_now(self, trainer: Trainer) -> None:
        """Saves at the present step, unless that is done or nothing has been trained. Every process must call it.

        Raises:
            SaveError: It cannot be saved; on every process. Older checkpoints are as they were.
        """
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_checkpoint(trainer, self._get_metric_interpolated_filepath_name(candidates, trainer))

    # ---- how -------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        path = Path(filepath)
        _on_rank_zero(trainer, lambda: self._announce(path.name))
        _save_together(trainer, filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = self.last_model_path = filepath
        _on_rank_zero(trainer, lambda: self._settle(path, self._score(trainer)))
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def _open_folder(self) -> None:
        """Reads the index, and tidies up after a process that was killed here."""
        if self.folder.is_dir():
            recover(self.folder, PATTERN)
        found = Index.read(self.folder)
        same = found.monitor == self.monitor
        scores = found.scores if same else dict.fromkeys(found.scores)
        self._index = Index(self.monitor, self.mode, scores)

    def _announce(self, name: str) -> None:
        """Notes a checkpoint before it is written, so that one completed just before a kill is known."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index.scores.pop(name, None)
        self._index.scores[name] = None
        self._index.write(self.folder)

    def _settle(self, path: Path, score: float | None) -> None:
        """Leads ``last.ckpt`` to the newest checkpoint that is complete, and deletes what is no longer kept."""
        self._index.scores[path.name] = score
        newest = self._newest_complete()
        if path.name not in newest:
            rank_zero_warn(f"{path} was saved, but {problem(path)}. It counts for nothing until it is complete.")
        if self.save_last and newest:
            point(self.folder / LAST, self.folder / newest[0])
        kept = self._kept(newest)
        for name in [name for name in self._index.scores if name not in kept]:
            discard(self.folder / name)
            del self._index.scores[name]
        self._index.write(self.folder)
        self._tell_best()

    def _newest_complete(self) -> list[str]:
        """Names of the newest `keep_last` that are complete, newest first."""
        complete = (name for name in reversed(self._index.scores) if problem(self.folder / name) is None)
        return list(islice(complete, self.keep_last))

    def _kept(self, newest: list[str]) -> set[str]:
        """Names of the newest and of the best, and of what is newer than any complete one."""
        if self.save_top_k == -1 or not newest:
            return set(self._index.scores)
        best = self._index.ranked()[: self.save_top_k] if self.monitor is not None else []
        newer = takewhile(lambda name: name != newest[0], reversed(self._index.scores))  # perhaps still being written
        return {*newest, *best, *newer}

    # ---- scores ----------------------------------------------------------------------------------------------------

    @property
    def _is_validations(self) -> bool:
        """Whether the monitored metric is one of validation, whose value at a save may be an older step's."""
        return self.monitor is not None and self.monitor.startswith("val")

    def _score(self, trainer: Trainer) -> float | None:
        if self.monitor is None or (self._is_validations and self._validated_step != trainer.global_step):
            return None
        value = self._monitor_candidates(trainer).get(self.monitor)  # metrics, and ``step`` and ``epoch``
        return float(value) if value is not None and math.isfinite(value) else None

    def _score_validated(self, trainer: Trainer) -> None:
        """Notes what validation said of this step's checkpoint, and saves one if there is none and it is worth it."""
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val")))
            raise UserError(f"checkpoint.monitor: validation has no metric '{self.monitor}'. It has: {known}.")
        score = self._score(trainer)
        saved = trainer.strategy.broadcast(self._saved_at(trainer.global_step))
        if saved is not None:
            _on_rank_zero(trainer, lambda: self._settle(self.folder / saved, score))
        elif trainer.strategy.broadcast(self._among_best(score)):
            self.save_now(trainer)

    def _saved_at(self, step: int) -> str | None:
        """Name of this run's checkpoint of a step, also of one saved before the run was stopped and went on."""
        return next(
            (name for name in reversed(self._index.scores) if checkpoint_step(self.folder / name) == step), None
        )

    def _among_best(self, score: float | None) -> bool:
        if score is None or self.save_top_k == 0:
            return False
        ranked = self._index.ranked()
        if self.save_top_k == -1 or len(ranked) < self.save_top_k:
            return True
        worst = self._index.scores[ranked[self.save_top_k - 1]]
        assert worst is not None
        return score < worst if self.mode == "min" else score > worst

    def _tell_best(self) -> None:
        """What loggers and `Trainer` ask a ModelCheckpoint for."""
        ranked = self._index.ranked()[: self.save_top_k if self.save_top_k > 0 else None]
        self.best_k_models = {str(self.folder / name): torch.tensor(self._index.scores[name]) for name in ranked}
        newest = next(reversed(self._index.scores), "")
        self.best_model_path = str(self.folder / (ranked[0] if ranked else newest))
        self.best_model_score = self.best_k_models[self.best_model_path] if ranked else None


def _save_together(trainer: Trainer, path: str, weights_only: bool) -> None:
    """Saves on all processes; a failure of the one that writes is a failure of all, so that none waits for it."""
    reason = None
    try:
        trainer.save_checkpoint(path, weights_only)
    except SaveError as error:
        reason = str(error)
        trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others are
    if reason := trainer.strategy.broadcast(reason):
        raise SaveError(reason)


def _on_rank_zero(trainer: Trainer, action: Callable[[], None]) -> None:
    """Does on process 0 what is to be done once; a failure there is one of all processes."""
    reason = None
    if trainer.is_global_zero:
        try:
            action()
        except OSError as error:
            reason = f"Checkpoints cannot be kept in order: {error.strerror or error} ({error.filename})."
        except SaveError as error:
            reason = str(error)
    if reason := trainer.strategy.broadcast(reason):
        raise SaveError(reason)
