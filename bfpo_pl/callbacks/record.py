"""Writes what a run was, and what became of it, into its folder and to W&B."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bfpo_pl.callbacks.validation import is_missing
from bfpo_pl.checkpoints.atomic import write_text
from bfpo_pl.component import UserError
from bfpo_pl.guard import Stopped
from bfpo_pl.loggers import MetricsFile
from bfpo_pl.redaction import redacted, redacted_text
from bfpo_pl.resuming import FAILED, FINISHED, RUNNING, STOPPED, read_status, write_status
from bfpo_pl.runs import environment
from bfpo_pl.wandb_views import define_metrics, wandb_loggers


class RunRecord(Callback):
    """Writes ``config.yaml``, ``environment.json``, ``data.json`` and ``status.json`` into the run's folder.

    The folder is locked while a process runs in it. A run that goes on in its folder keeps what is recorded there up to
    the step it goes on from.

    Args:
        folder: The run's folder, as this process sees it; rank 0's is everybody's.
        config: The whole resolved config of the command.
        subcommand: The command that runs.
        notes: Further plain data for ``environment.json``, such as the plugins loaded and the parent checkpoint.
    """

    def __init__(self, folder: Path, config: dict[str, Any], subcommand: str, notes: dict[str, Any]) -> None:
        self.folder = folder
        self.config = redacted(config)
        self.subcommand = subcommand
        self.notes = notes
        self._lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        self._agree_on_checkpoint(trainer)
        mistake = self._begin(trainer) if trainer.is_global_zero else None
        if mistake := trainer.strategy.broadcast(mistake):
            raise UserError(mistake)
        rank_zero_info(f"Run folder: {self.folder}")

    @staticmethod
    def _agree_on_checkpoint(trainer: Trainer) -> None:
        """Every process has looked for the run to go on with by itself; on machines of their own they may differ."""
        mine = str(trainer.ckpt_path)
        first = trainer.strategy.broadcast(mine)
        if not trainer.strategy.reduce_boolean_decision(first == mine, all=True):
            raise UserError(
                f"Process {trainer.global_rank} would go on from checkpoint {mine} and process 0 from {first}: --runs "
                f"must lie on a file system that all machines see."
            )

    def _begin(self, trainer: Trainer) -> str | None:
        """Takes the folder and writes the records; says why if that cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "run.lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            status = read_status(self.folder) or {}
            return (
                f"The run {self.folder} is still running: process {status.get('process')} on {status.get('host')}. "
                f"Stop it first, or start another one without --resume."
            )
        except OSError as error:
            return _unwritable(self.folder, error)
        try:
            self._write_records(trainer)
        except OSError as error:
            self._lock.release()
            return _unwritable(self.folder, error)
        return None

    def _write_records(self, trainer: Trainer) -> None:
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True, width=120)
        write_text(self.folder / "config.yaml", f"# bfpo {self.subcommand}\n{text}")
        record = environment() | {"subcommand": self.subcommand, **self.notes}
        self._write_environment(record)
        self._write_data(trainer)
        more: dict[str, Any] = {"step": trainer.global_step, "reason": None}
        for logger in wandb_loggers(trainer):
            logger.experiment.config.update(self.config | {"environment": record}, allow_val_change=True)
            define_metrics(logger)
            more["wandb_id"] = logger.experiment.id
        write_status(self.folder, RUNNING, **more)

    def _write_environment(self, record: dict[str, Any]) -> None:
        """The first start's record, with those of later starts in the same folder as a list in it."""
        path = self.folder / "environment.json"
        if path.is_file():
            first = json.loads(path.read_text(encoding="utf-8"))
            record = {**first, "resumed": [*first.get("resumed", []), record]}
        write_text(path, json.dumps(record, indent=2) + "\n")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets the time of `max_time` begin anew; else a run that it ended could never go on."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer):
                checkpoint["callbacks"].pop(callback.state_key, None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what was recorded after the step that the run goes on from."""
        if trainer.is_global_zero:
            step, again = trainer.global_step, is_missing(trainer, pl_module)
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.forget_after(step, step - 1 if again else step)
            _keep_samples(self.folder / "samples.jsonl", step - 1 if again else step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_data(trainer)  # streaming sources count as they are read

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # it would hide what happened
            self._write_data(trainer)
        if trainer.is_global_zero and self._lock is not None and self._lock.is_locked:
            stopped = isinstance(exception, Stopped | KeyboardInterrupt | SIGTERMException)
            reason = redacted_text(str(exception)) or type(exception).__name__
            with suppress(OSError):
                write_status(self.folder, STOPPED if stopped else FAILED, step=trainer.global_step, reason=reason)
            self._lock.release()

    def finish(self, trainer: Trainer) -> None:
        """Marks the run as finished, for all that it leaves is there; or as stopped, where its time was up before."""
        if trainer.is_global_zero and self._lock is not None:
            reason = _out_of_time(trainer)
            write_status(self.folder, STOPPED if reason else FINISHED, step=trainer.global_step, reason=reason)
            if reason:
                rank_zero_info(f"{reason} --resume auto goes on from there.")
            self._lock.release()

    def _write_data(self, trainer: Trainer) -> None:
        report = getattr(getattr(trainer, "datamodule", None), "report", None)
        if report and trainer.is_global_zero and self.folder.is_dir():
            write_text(self.folder / "data.json", json.dumps(report, indent=2) + "\n")


def _out_of_time(trainer: Trainer) -> str | None:
    """Why a fit ended before its last step or epoch, if it was for the time that it was given."""
    loop = trainer.fit_loop
    steps, epochs = loop.max_steps, -1 if loop.max_epochs is None else loop.max_epochs
    progress: Any = loop.epoch_progress.current
    ended = 0 <= steps <= trainer.global_step or 0 <= epochs <= progress.processed
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [each.time_remaining() for each in timers]
    if ended or not trainer.should_stop or not any(seconds is not None and seconds <= 0 for seconds in left):
        return None
    return f"trainer.max_time was over after step {trainer.global_step}."


def _unwritable(folder: Path, error: OSError) -> str:
    return f"The run folder {folder} cannot be written: {error.strerror or error}."


def _keep_samples(path: Path, step: int) -> None:
    """Leaves out samples of later steps, which are generated again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
