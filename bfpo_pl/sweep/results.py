"""What a trial's run left: its folder, its metric, and the end of its log."""

from __future__ import annotations

import csv
import difflib
import math
from pathlib import Path

from bfpo_pl.redaction import redacted_text
from bfpo_pl.resuming import FAILED, STATUS, read_status


def run_folder(trial: Path) -> Path | None:
    """The newest run below a trial's folder, if there is one."""
    found = sorted(trial.glob(f"*/*/{STATUS}"), key=lambda file: file.parent.name[:15])
    return found[-1].parent if found else None


def last_value(run: Path, metric: str) -> float | None:
    """The last value of a metric in a run's metrics.csv; None if it has none."""
    try:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            values = [row[metric] for row in csv.DictReader(file) if row.get(metric)]
    except OSError:
        return None
    return float(values[-1]) if values and math.isfinite(float(values[-1])) else None


def missing_column(run: Path, metric: str) -> str | None:
    """What to say if a run's metrics.csv lacks the column of a metric; None if it has it."""
    try:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            columns = csv.DictReader(file).fieldnames or []
    except OSError:
        columns = []
    if metric in columns:
        return None
    near = difflib.get_close_matches(metric, columns, 3, cutoff=0.5)
    return f"{run / 'metrics.csv'} has no column {metric}" + (f"; near it: {', '.join(near)}." if near else ".")


def reason(run: Path | None, log: Path, code: int) -> str:
    """Why a trial failed: what its run says, or else the last words of its log."""
    if run is not None:
        said = read_status(run) or {}
        if said.get("state") == FAILED and said.get("reason"):
            return str(said["reason"])
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    errors = [line for line in lines if line.startswith("bfpo: error:")]
    last = errors[-1] if errors else lines[-1] if lines else "it said nothing"
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return redacted_text(f"{ended}: {last.removeprefix('bfpo: error: ')}")
