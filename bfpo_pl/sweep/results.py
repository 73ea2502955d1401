"""What a trial's run left: its folder, its metric, and the end of its log."""

from __future__ import annotations

import csv
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Before:
    """What a trial's folder held before an attempt: what it says of an earlier one is no reason for this one's failure.

    Args:
        log: Bytes of its log.
        status: What its newest run said of itself.
    """

    log: int
    status: dict[str, Any] | None


def before_attempt(trial: Path, log: Path) -> Before:
    """What is there before an attempt.

    Args:
        trial: The trial's folder.
        log: Its log.
    """
    run = run_folder(trial)
    return Before(log.stat().st_size if log.is_file() else 0, None if run is None else read_status(run))


def reason(run: Path | None, log: Path, code: int, before: Before) -> str:
    """Why an attempt failed: what its run says, or else the last words of its log.

    Args:
        run: The trial's newest run.
        log: The trial's log.
        code: The exit code; below 0, the signal that ended it.
        before: What was there before the attempt.
    """
    said = None if run is None else read_status(run)
    if said is not None and said != before.status and said.get("state") == FAILED and said.get("reason"):
        return str(said["reason"])
    lines = [line.strip() for line in _written_since(log, before.log).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("bfpo: error:")]
    last = errors[-1] if errors else lines[-1] if lines else "it said nothing"
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return redacted_text(f"{ended}: {last.removeprefix('bfpo: error: ')}")


def _written_since(log: Path, position: int) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(position)
        return file.read().decode(errors="replace")
