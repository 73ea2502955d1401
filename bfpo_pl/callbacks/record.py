"""Writes what a run was into its folder, and to W&B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from bfpo_pl.redaction import redacted
from bfpo_pl.runs import environment


class RunRecord(Callback):
    """Writes ``config.yaml``, ``environment.json`` and ``data.json`` into the run's folder before the first step.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True, width=120)
        (self.folder / "config.yaml").write_text(f"# bfpo {self.subcommand}\n{text}", encoding="utf-8")
        record = environment() | {"subcommand": self.subcommand, **self.notes}
        (self.folder / "environment.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        self._write_data(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(self.config | {"environment": record}, allow_val_change=True)
        rank_zero_info(f"Run folder: {self.folder}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_data(trainer)  # streaming sources count as they are read

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write_data(trainer)

    def _write_data(self, trainer: Trainer) -> None:
        report = getattr(getattr(trainer, "datamodule", None), "report", None)
        if report and trainer.is_global_zero and self.folder.is_dir():
            (self.folder / "data.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
