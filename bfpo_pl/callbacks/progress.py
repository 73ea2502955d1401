"""Progress of long work: a rich bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_VARIABLE = "BFPO_PROGRESS_SECONDS"
"""Environment variable: least time between two progress lines, in seconds."""
_SECONDS_BETWEEN_LOSSES = 5.0  # that the bar shows: reading one waits for the device


class LineProgress(ProgressBar):
    """One line every so many seconds, for logs that are read later.

    Args:
        seconds: Least time between two lines. Default: `BFPO_PROGRESS_SECONDS`, else 15.
    """

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__()
        self.seconds = float(os.environ.get(SECONDS_VARIABLE, 15.0)) if seconds is None else seconds
        self._enabled = True
        self._started = self._printed = 0.0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._printed = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if not self._enabled or (now - self._printed < self.seconds and step != total):
            return
        self._printed = now
        loss = trainer.progress_bar_metrics.get("loss")
        shown = f", loss {loss:.4g}" if loss is not None else ""
        print(f"step {step}/{total}{shown}, {now - self._started:.0f} s", flush=True)


class StepProgress(ProgressBar):
    """One rich bar over the optimizer steps of a run, for terminals."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._read = -math.inf
        self._shown = "training"

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        total = trainer.estimated_stepping_batches
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn())
        self._bar.start()
        self._bar.add_task("training", total=None if math.isinf(total) else total, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None:
            return
        now = time.monotonic()
        if now - self._read >= _SECONDS_BETWEEN_LOSSES:
            self._read = now
            loss = trainer.progress_bar_metrics.get("loss")
            self._shown = f"training, loss {loss:.4g}" if loss is not None else "training"
        self._bar.update(self._bar.tasks[0].id, completed=trainer.global_step, description=self._shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=trainer.global_step)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def progress_callback() -> Callback:
    """A rich bar if the output is a terminal, lines otherwise."""
    return StepProgress() if sys.stdout.isatty() else LineProgress()
