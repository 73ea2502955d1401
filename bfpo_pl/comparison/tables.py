"""The comparison as a table in the terminal, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bfpo_pl.comparison.analysis import WORSE, Comparison, Row
from bfpo_pl.comparison.grouping import short_names
from bfpo_pl.comparison.provenance import origins, place
from bfpo_pl.comparison.statistics import LEVEL, Difference, Mean
from bfpo_pl.redaction import redacted

SCHEMA = 1
SPLITS = {"test": "held-out", "val": "validation", "train": "training"}


def metric_names(comparison: Comparison) -> dict[str, str]:
    """Metrics by short names, which say the split where metrics of several splits are shown."""
    by_split: dict[str, list[str]] = {}
    for key in comparison.metrics:
        if key != WORSE:
            by_split.setdefault(_split(key), []).append(key)
    names = {key: name for keys in by_split.values() for key, name in short_names(keys, "/").items()}
    splits = {key: split for split, keys in by_split.items() for key in keys}
    if comparison.pair:
        names[WORSE] = "the worse of both"
        first, second = (_split(key) for key in comparison.pair)
        splits[WORSE] = first if first == second else ""
    if len(by_split) > 1:
        names = {key: f"{name} ({splits[key]})" if splits[key] else name for key, name in names.items()}
    return names


def columns_text(comparison: Comparison) -> str:
    """Which column each short name stands for, and of which prompts it is."""
    names = metric_names(comparison)
    keys = [key for key in comparison.metrics if key not in (WORSE, names[key])]
    splits = dict.fromkeys(_split(key) for key in keys if "/microworld/" in key)
    prompts = [f"{split}/… is on {SPLITS[split]} prompts" for split in splits if split in SPLITS]
    return "; ".join([*(f"{names[key]} is {key}" for key in keys), *prompts])


def mean_text(mean: Mean, runs: int | None = None) -> str:
    """A mean with its interval, such as ``0.912 ± 0.013``; it says of how many values if not of one for each run.

    Args:
        mean: The mean.
        runs: Runs of the group.
    """
    if mean.n == 0:
        return "–"
    text = _number(mean.mean) + ("" if mean.half_width is None else f" ± {_number(mean.half_width)}")
    return text + _of(mean.n, mean.half_width, runs)


def difference_text(difference: Difference | None, seeds: int | None = None) -> str:
    """A difference with its interval and p-value, and whether it is not of pairs of runs.

    Args:
        difference: The difference.
        seeds: Number of pairs that are told elsewhere; if it is of another number, it says so.
    """
    if difference is None or math.isnan(difference.mean):
        return "–"
    text = ("+" if difference.mean >= 0 else "−") + _number(abs(difference.mean))
    text += "" if difference.half_width is None else f" ± {_number(difference.half_width)}"
    text += _of(difference.n, difference.half_width, seeds if difference.paired else None)
    if difference.p_holm is not None:
        text += f", p {'< 0.001' if difference.p_holm < 0.001 else f'{difference.p_holm:.3f}'}"
    return text if difference.paired else f"{text}, unpaired"


def front_text(row: Row) -> str:
    """Front membership, such as ``yes, 93 %``: of the means, and the share of the draws."""
    if row.on_front is None or row.front_probability is None:
        return "–"
    share = f"{row.front_probability:.0%}".replace("%", " %") if len(row.group.replicates) > 1 else "n=1"
    return f"{'yes' if row.on_front else 'no'}, {share}"


def print_table(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the comparison.

    Args:
        comparison: What to print.
        console: Where to.
    """
    console = console or Console()
    console = console if console.is_terminal else Console(width=160, file=console.file)
    names = metric_names(comparison)
    table = Table(title=Text(f"{comparison.title}: mean ± {LEVEL:.0%} interval over seeds"))
    table.add_column("group", overflow="fold")
    table.add_column("runs", justify="right")
    for key in comparison.metrics:
        table.add_column(Text(names[key]), justify="right")
    if comparison.pair:
        table.add_column("on the front", justify="right")
    for row in comparison.rows:
        runs = len(row.group.replicates)
        cells = [row.label, str(runs), *(mean_text(row.means[key], runs) for key in comparison.metrics)]
        if comparison.pair:
            cells.append(front_text(row))
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if comparison.baseline:
        console.print(_table_of_differences(comparison))
    if columns := columns_text(comparison):
        console.print(Text(f"{columns}."))
    for note in comparison.notes:
        console.print(Text(f"Note: {note}"))
    for each in comparison.left_out[:10]:
        console.print(Text(f"Left out: {each.name}: {each.reason}"))
    if len(comparison.left_out) > 10:
        console.print(f"… and {len(comparison.left_out) - 10} more are left out; the report names them all.")


def _table_of_differences(comparison: Comparison) -> Table:
    names = metric_names(comparison)
    table = Table(title=Text(f"Minus {comparison.baseline}: mean ± {LEVEL:.0%} interval over shared seeds"))
    table.add_column("group", overflow="fold")
    for key in comparison.metrics:
        table.add_column(Text(f"Δ {names[key]}"), justify="right")
    for row in comparison.rows:
        if row.label != comparison.baseline:
            runs = len(row.group.replicates)
            cells = [row.label, *(difference_text(row.differences.get(key), runs) for key in comparison.metrics)]
            table.add_row(*(Text(cell) for cell in cells))
    return table


def as_json(comparison: Comparison) -> str:
    """The whole comparison, with every run's values, as JSON text; what does not exist is null."""
    groups = []
    for row in comparison.rows:
        groups.append(
            {
                "label": row.label,
                "config": redacted({key: row.group.config.get(key) for key in comparison.keys}),
                "runs": [{"seed": run.seed, "folder": place(run.folder)} for run in row.group.runs],
                "metrics": {key: _metric(row, key) for key in comparison.metrics},
                "on_front": row.on_front,
                "front_probability": row.front_probability,
            }
        )
    content = {
        "schema_version": SCHEMA,
        "title": comparison.title,
        "helpfulness": comparison.pair[0] if comparison.pair else None,
        "harmlessness": comparison.pair[1] if comparison.pair else None,
        "at": comparison.at,
        "baseline": comparison.baseline,
        "level": LEVEL,
        "groups": groups,
        "notes": comparison.notes,
        "origins": origins(comparison.runs),
        "left_out": [{"name": each.name, "reason": each.reason} for each in comparison.left_out],
    }
    return json.dumps(_finite(content), indent=2, default=str, allow_nan=False) + "\n"


def as_csv(comparison: Comparison) -> str:
    """One line for each group and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("difference", "difference_ci_half_width", "p", "p_holm", "paired", "shared_seeds")
    writer.writerow(["group", "metric", "n", "mean", "ci_half_width", "on_front", "front_probability", *columns])
    for row in comparison.rows:
        for key in comparison.metrics:
            mean, delta = row.means[key], row.differences.get(key)
            line: list[Any] = [row.label, key, mean.n, mean.mean, mean.half_width, row.on_front, row.front_probability]
            if delta:
                line += [delta.mean, delta.half_width, delta.p, delta.p_holm, delta.paired]
                line += [delta.n if delta.paired else 0]
            writer.writerow(["" if each is None or each != each else each for each in line + [None] * (13 - len(line))])
    return text.getvalue()


def _of(n: int, half_width: float | None, expected: int | None) -> str:
    if half_width is None:
        return " (n=1)"
    return "" if expected in (None, n) else f" (n={n})"


def _split(key: str) -> str:
    """The split that a column is of; empty if its name does not say."""
    first = key.partition("/")[0]
    return first if first in SPLITS else ""


def _metric(row: Row, key: str) -> dict[str, Any]:
    mean, delta = row.means[key], row.differences.get(key)
    return {
        "n": mean.n,
        "mean": mean.mean,
        "ci_half_width": mean.half_width,
        "values": {str(seed): value for seed, value in row.values[key].items()},
        "difference": delta
        and {
            "mean": delta.mean,
            "ci_half_width": delta.half_width,
            "p": delta.p,
            "p_holm": delta.p_holm,
            "paired": delta.paired,
            "n": delta.n,
        },
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
