"""The run's own record of its metrics: one CSV file, which a run that goes on in its folder continues."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from bfpo_pl.checkpoints.atomic import write_text
from bfpo_pl.component import RunError


class _Continuing(ExperimentWriter):
    """Lightning's writer, which would delete a file that is there."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class MetricsFile(CSVLogger):
    """Writes ``metrics.csv`` into the run's folder; goes on with the one that is there.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder), name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Continuing(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def save(self) -> None:
        """Writes what was logged since the last time.

        Raises:
            RunError: It cannot be written, for instance because the disk is full.
        """
        try:
            super().save()
        except OSError as error:
            path = self.experiment.metrics_file_path
            raise RunError(
                f"The metrics of the run cannot be written to {path}: {error.strerror or error}. What is in it, and "
                f"the checkpoints, are as they were: once there is room, go on with --resume {Path(path).parent}."
            ) from error

    @rank_zero_only
    def forget_after(self, step: int, validated: int) -> None:
        """Leaves out the rows of later steps, which are trained again, and a last one that was not written to its end.

        Args:
            step: The optimizer step that the run goes on from.
            validated: The last step whose validation is kept; others run again.
        """
        path = Path(self.experiment.metrics_file_path)
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        names, rows = list(reader.fieldnames or []), list(reader)
        last = [validated if any(row[name] for name in names if name.startswith("val/")) else step for row in rows]
        kept = [row for row, most in zip(rows, last, strict=True) if int(row["step"]) <= most]
        if len(kept) == len(rows) and whole == text:
            return
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, file.getvalue())
