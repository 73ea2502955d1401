"""A run's validation metrics as a table on the screen."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bfpo_pl.metrics import QUADRANTS

COLUMNS = ("loss", "margin", "target", "reward_margin", "accuracy", "accuracy_helpfulness", "perplexity")
"""The metrics that are shown, as far as a run has them."""


def print_validation(metrics: Mapping[str, Any]) -> None:
    """Prints the metrics named ``val/{stream}/{quadrant}/{metric}``, a row for each stream and quadrant, and the rest.

    Args:
        metrics: Values by name, as a Trainer's ``callback_metrics``.
    """
    groups: dict[tuple[str, str], dict[str, float]] = {}
    others: dict[str, float] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if len(parts) == 4 and parts[0] == "val" and parts[2] in ("all", *QUADRANTS):
            groups.setdefault((parts[1], parts[2]), {})[parts[3]] = float(value)
        elif parts[0] == "val":
            others[name.removeprefix("val/")] = float(value)
    if len({stream for stream, _ in groups}) == 2:  # one stream: "all" says the same again
        groups = {key: values for key, values in groups.items() if key[0] != "all"}
    console = Console(width=None if sys.stdout.isatty() else 120)
    if groups:
        shown = [column for column in COLUMNS if any(column in values for values in groups.values())]
        table = Table(title="Validation", title_justify="left", title_style="bold")
        table.add_column("stream")
        table.add_column("chosen_rejected")
        for column in shown:
            table.add_column(column.replace("_", "\n", 1), justify="right")
        for (stream, quadrant), values in groups.items():
            cells = (f"{values[column]:.4g}" if column in values else "" for column in shown)
            table.add_row(stream, quadrant, *cells)
        console.print(table)
    if others:
        table = Table(title="Judged", title_justify="left", title_style="bold", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in others.items():
            table.add_row(name, f"{value:.4g}")
        console.print(table)
