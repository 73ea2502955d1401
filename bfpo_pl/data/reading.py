"""Reading: all rows of a split through an adapter, and one report of everything that is wrong with them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bfpo_pl.component import UserError
from bfpo_pl.data.adapters import Adapter
from bfpo_pl.data.rows import Row, RowError
from bfpo_pl.data.sources import Source

_EXAMPLES = 5
_SAFETY = {1: "safe", 0: "unsafe"}


class DataError(UserError):
    """The data cannot be used; the message says what is wrong, where, and what to set."""


@dataclass
class Reading:
    """What was read from one split of one stream.

    Args:
        stream: The stream's name.
        split: ``train`` or ``validation``.
        rows: The good rows, in order.
        errors: What is wrong with the others, in order.
    """

    stream: str
    split: str
    rows: list[Row] = field(default_factory=list)
    errors: list[RowError] = field(default_factory=list)

    @property
    def columns(self) -> tuple[set[str], set[str]]:
        """Names of the per-response and of the per-pair columns, which all rows have."""
        first = self.rows[0] if self.rows else None
        return (set(first.columns), set(first.pair_columns)) if first else (set(), set())

    def summary(self) -> dict[str, Any]:
        """Counts as plain data: rows used, rows dropped by reason, pairs by safety quadrant."""
        dropped = Counter(error.reason for error in self.errors)
        summary: dict[str, Any] = {"rows": len(self.rows), "dropped": dict(dropped)}
        if self.rows and "safe" in self.rows[0].columns and self.rows[0].pairs:
            summary["quadrants"] = quadrants(self.rows)
        return summary


def read(stream: str, split: str, source: Source, adapter: Adapter, assume_safe: bool = False) -> Reading:
    """Reads a split to its end, collecting the rows that cannot be used.

    Args:
        stream: The stream's name, for messages.
        split: ``train`` or ``validation``.
        source: Where raw rows come from.
        adapter: What reads them.
        assume_safe: Take responses without safety flags to be safe; flags that are there still must be valid.
    """
    reading = Reading(stream, split)
    for origin, raw in source.rows(split):
        if isinstance(raw, RowError):
            reading.errors.append(raw)
            continue
        if assume_safe:
            raw = {**raw, **{name: True for name in adapter.flag_fields if name not in raw}}
        try:
            row = adapter(raw, origin)
        except RowError as error:
            reading.errors.append(error)
            continue
        if assume_safe and "safe" not in row.columns:
            row = dataclasses.replace(row, columns={**row.columns, "safe": (1.0,) * len(row.responses)})
        reading.rows.append(row)
    _require_equal_columns(reading)
    return reading


def _require_equal_columns(reading: Reading) -> None:
    """Moves rows that lack a column which other rows of the split have to the errors."""
    names = {name for row in reading.rows for name in (*row.columns, *row.pair_columns)}
    kept = []
    for row in reading.rows:
        missing = sorted(names - {*row.columns, *row.pair_columns})
        if not missing:
            kept.append(row)
            continue
        remedy = f"Set data.streams.{reading.stream}.assume_safe: true to take such responses to be safe."
        reason = f"the column '{missing[0]}' is missing here, though other rows of the stream have it"
        error = RowError(row.origin, missing[0], None, reason, remedy if missing[0] == "safe" else "")
        reading.errors.append(error)
    reading.rows = kept


def quadrants(rows: Iterable[Row]) -> dict[str, float]:
    """Pairs by the safety of (chosen, rejected); with soft flags a pair counts in each by its probability.

    Args:
        rows: Rows with the column ``safe``.
    """
    counts = dict.fromkeys(
        (f"{chosen}_{rejected}" for chosen in _SAFETY.values() for rejected in _SAFETY.values()), 0.0
    )
    for row in rows:
        for pair in row.pairs:
            chosen, rejected = (row.columns["safe"][index] for index in pair)
            for c, chosen_name in _SAFETY.items():
                for r, rejected_name in _SAFETY.items():
                    share = (chosen if c else 1 - chosen) * (rejected if r else 1 - rejected)
                    counts[f"{chosen_name}_{rejected_name}"] += share
    return counts


def bad_row_report(readings: Iterable[Reading]) -> str:
    """Everything that is wrong with the rows: counts by reason, the first examples, what to set. Empty if nothing is.

    Args:
        readings: The splits that were read.
    """
    faulty = [reading for reading in readings if reading.errors]
    if not faulty:
        return ""
    total = sum(len(reading.errors) for reading in faulty)
    lines = [f"{total} {'row' if total == 1 else 'rows'} cannot be used:"]
    for reading in faulty:
        size = len(reading.rows) + len(reading.errors)
        for reason, count in Counter(error.reason for error in reading.errors).most_common():
            lines.append(f"  {reading.stream}, {reading.split}: {count} of {size}: {reason}")
    errors = [error for reading in faulty for error in reading.errors]
    lines.append("First examples:" if total > _EXAMPLES else "They are:")
    lines += [f"  {error.origin}: {error.field} = {error.value}: {error.reason}" for error in errors[:_EXAMPLES]]
    remedies = list(dict.fromkeys(error.remedy for error in errors if error.remedy))
    lines += ["What to do:", *(f"  {remedy}" for remedy in remedies)]
    lines.append("  To leave such rows out, and keep their count in the run's record, set data.on_bad_row: drop")
    return "\n".join(lines)
