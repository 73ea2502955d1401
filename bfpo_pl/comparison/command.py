"""`bfpo compare`: a table, JSON, CSV, figures and a report page of runs, of experiments or of a sweep."""

from __future__ import annotations

import secrets
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bfpo_pl.comparison.analysis import Comparison, Question, analyse
from bfpo_pl.comparison.figures import FIGURES, draw_all
from bfpo_pl.comparison.reading import read
from bfpo_pl.comparison.report import report
from bfpo_pl.comparison.tables import as_csv, as_json, print_table
from bfpo_pl.component import UserError

RUNS = Path("runs")


def compare(
    runs: list[str],
    to: str | None = None,
    baseline: str | None = None,
    names: list[str] | None = None,
    helpfulness: str | None = None,
    harmlessness: str | None = None,
    metrics: list[str] | None = None,
    at: str = "last",
) -> Comparison:
    """Compares runs: mean and 95 % interval over seeds, differences from a baseline, the Pareto front of helpfulness
    and harmlessness. Prints a table and writes comparison.json, comparison.csv, report.html and its figures.

    Runs whose configs differ in nothing but seeds are replicates of one group. Runs that did not finish are left out,
    and named.

    Args:
        runs: Folders of runs, of experiments (all runs below) or of sweeps; several are compared as one.
        to: Folder to write to. Default: report/ in the folder of a single sweep, else runs/compare/<time>-<id>.
        baseline: Label of the group that the others are compared with, over the seeds that both have.
        names: Other labels, each as LABEL=NEW.
        helpfulness: Column of metrics.csv. Default: test/microworld/greedy/helpfulness if all runs have it, else val/….
        harmlessness: Column of metrics.csv, likewise.
        metrics: Further columns.
        at: last for each metric's last value; best:COLUMN or least:COLUMN for those at the step where a column is
            largest or smallest.

    Returns:
        What was computed.

    Raises:
        UserError: A folder, a metric or a label does not exist, or no run has finished.
    """
    question = Question(helpfulness, harmlessness, tuple(metrics or ()), at, baseline, tuple(names or ()))
    reading = read(runs, question.needs)
    comparison = analyse(reading, question)
    if to is not None:
        folder = Path(to).expanduser()
    else:
        new = RUNS / "compare" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        folder = reading.sweep / "report" if reading.sweep else new
    try:
        _write(comparison, folder)
    except OSError as error:
        raise UserError(
            f"The comparison cannot be written to '{folder}' ({error.strerror}). Name another --to."
        ) from error
    print_table(comparison)
    Console(soft_wrap=True).print(
        Text(f"Written to {folder}: report.html, its figures, comparison.json, comparison.csv")
    )
    return comparison


def _write(comparison: Comparison, folder: Path) -> None:
    """Writes all files, or none: an earlier comparison in the folder stays whole until this one is."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as name:
        new = Path(name)
        (new / "comparison.json").write_text(as_json(comparison), encoding="utf-8")
        (new / "comparison.csv").write_text(as_csv(comparison), encoding="utf-8")
        page = report(comparison, draw_all(comparison, new))
        (new / "report.html").write_text(page, encoding="utf-8")
        for pattern in FIGURES:
            for stale in folder.glob(pattern):
                stale.unlink()
        for path in new.iterdir():
            path.replace(folder / path.name)
