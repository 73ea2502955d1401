"""Reading: which rows of a split are used, and one report of everything that is wrong with the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bfpo_pl.component import UserError
from bfpo_pl.data.checked import CheckedRows, Fault

_EXAMPLES = 5
_SAFETY = {1: "safe", 0: "unsafe"}


class DataError(UserError):
    """The data cannot be used; the message says what is wrong, where, and what to set."""


@dataclass
class Reading:
    """The rows that are used of one split of one stream, and what is wrong with the others.

    Args:
        stream: The stream's name.
        split: ``train`` or ``validation``.
        rows: The checked rows, on disk.
        kept: ``[N]``, indices of those that are used, in order.
        faults: What is wrong with rows that should be used and cannot.
        left_out: Rows that are left out because a setting says so, by what it is.
        notes: Further counts, for instance of duplicates.
    """

    stream: str
    split: str
    rows: CheckedRows
    kept: np.ndarray
    faults: list[Fault] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._raw_index = self.rows.numbers("raw_index")
        self.response_counts = self.rows.counts("responses")
        self.pair_counts = self.rows.counts("pairs") // 2
        self.response_tables = self.rows.tables("columns", self.response_counts)
        self.pair_tables = self.rows.tables("pair_columns", self.pair_counts)
        self.first_response = np.concatenate([[0], np.cumsum(self.response_counts)])
        self.first_pair = np.concatenate([[0], np.cumsum(self.pair_counts)])
        self.pairs = self.rows.flat("pairs").reshape(-1, 2)
        """``[P, 2]``, pairs of all rows, as indices into the responses of their own row."""

    @property
    def columns(self) -> tuple[set[str], set[str]]:
        """Names of the per-response and of the per-pair columns, which all rows that are used have."""
        return set(self.response_tables), set(self.pair_tables)

    @property
    def pairs_kept(self) -> np.ndarray:
        """``[P, 2]``, pairs of the rows that are used, as indices into all responses."""
        used = np.zeros(len(self.rows), dtype=bool)
        used[self.kept] = True
        owner = np.repeat(np.arange(len(self.rows)), self.pair_counts)
        taken = used[owner]
        return self.pairs[taken] + self.first_response[owner[taken], None]

    def fault(self, place: int, field: str, value: str, reason: str, remedy: str) -> Fault:
        """What is wrong with a row that is used so far.

        Args:
            place: Its place in ``kept``.
            field: The field at fault.
            value: Its value, abbreviated.
            reason: What is wrong.
            remedy: What to do about it.
        """
        index = int(self.kept[place])
        return Fault(int(self._raw_index[index]), self.rows.origin(index), field, value, reason, remedy)

    def drop(self, faults: Iterable[tuple[int, Fault]]) -> None:
        """Takes rows out of those that are used.

        Args:
            faults: Place of each in ``kept``, and what is wrong with it.
        """
        found = list(faults)
        self.faults += [fault for _, fault in found]
        self.kept = np.delete(self.kept, [place for place, _ in found])

    def summary(self) -> dict[str, Any]:
        """Counts as plain data: rows used, rows dropped by reason, pairs by safety quadrant."""
        summary: dict[str, Any] = {"rows": len(self.kept), "dropped": dict(Counter(f.reason for f in self.faults))}
        if self.left_out:
            summary["left_out"] = dict(self.left_out)
        pairs = self.pairs_kept
        if "safe" in self.response_tables and len(pairs):
            summary["quadrants"] = quadrants(self.response_tables["safe"][pairs])
        return {**summary, **self.notes}


def quadrants(safe: np.ndarray) -> dict[str, float]:
    """Pairs by the safety of (chosen, rejected); with soft flags a pair counts in each by its probability.

    Args:
        safe: ``[P, 2]``, the probability of being safe of the chosen and of the rejected response.
    """
    shares = {1: safe, 0: 1 - safe}
    return {
        f"{chosen_name}_{rejected_name}": float((shares[c][:, 0] * shares[r][:, 1]).sum())
        for c, chosen_name in _SAFETY.items()
        for r, rejected_name in _SAFETY.items()
    }


def bad_row_report(readings: Iterable[Reading]) -> str:
    """Everything that is wrong with the rows: counts by reason, the first examples, what to set. Empty if nothing is.

    Args:
        readings: The splits that were read.
    """
    faulty = [reading for reading in readings if reading.faults]
    if not faulty:
        return ""
    total = sum(len(reading.faults) for reading in faulty)
    lines = [f"{total:,} {'row' if total == 1 else 'rows'} cannot be used:"]
    for reading in faulty:
        size = len(reading.kept) + len(reading.faults)
        for reason, count in Counter(fault.reason for fault in reading.faults).most_common():
            lines.append(f"  {reading.stream}, {reading.split}: {count:,} of {size:,}: {reason}")
    faults = [fault for reading in faulty for fault in reading.faults]
    lines.append("First examples:" if total > _EXAMPLES else "They are:")
    lines += [f"  {fault.origin}: {fault.field} = {fault.value}: {fault.reason}" for fault in faults[:_EXAMPLES]]
    remedies = list(dict.fromkeys(fault.remedy for fault in faults if fault.remedy))
    lines += ["What to do:", *(f"  {remedy}" for remedy in remedies)]
    lines.append("  To leave such rows out, and keep their count in the run's record, set data.on_bad_row: drop")
    return "\n".join(lines)
