"""What W&B shows of a run besides its metrics: summaries of the best, the Pareto plot, the exported model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

SUMMARIES = {
    "val/all/all/loss": "min,last",
    "val/microworld/greedy/both": "max,last",
    "val/microworld/t0.5/both": "max,last",
}
"""Metrics of which the run's summary keeps the best value beside the last one."""

STEP = "trainer/global_step"
"""The x-axis of every metric: optimizer steps."""


def wandb_loggers(trainer: Trainer) -> Iterator[WandbLogger]:
    """The W&B loggers of a run."""
    return (logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def define_metrics(logger: WandbLogger) -> None:
    """Tells W&B each metric's x-axis, and which summaries keep the best value. Called on rank 0.

    Args:
        logger: A W&B logger; Lightning has told it the axis of all other metrics.
    """
    for name, summary in SUMMARIES.items():
        logger.experiment.define_metric(name, step_metric=STEP, summary=summary)


def log_pareto(logger: WandbLogger, points: Sequence[dict[str, Any]], key: str) -> None:
    """Logs helpfulness against harmlessness as a scatter plot.

    Args:
        logger: A W&B logger.
        points: Plain rows with helpfulness, harmlessness and further columns, the same in all.
        key: The plot's name.
    """
    table = wandb.Table(columns=list(points[0]), data=[list(point.values()) for point in points])
    title = "Helpfulness (benign prompts) against harmlessness (harmful prompts)"
    logger.experiment.log({key: wandb.plot.scatter(table, "helpfulness", "harmlessness", title=title)})


def log_export(logger: WandbLogger, folder: Path, name: str) -> None:
    """Keeps an exported model as a W&B artifact.

    Args:
        logger: A W&B logger.
        folder: The exported Hugging Face folder.
        name: The artifact's name.
    """
    artifact = wandb.Artifact(name, type="model")
    artifact.add_dir(str(folder))
    logger.experiment.log_artifact(artifact)
