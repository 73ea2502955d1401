"""Responses that belong to another prompt, from which KTO estimates how far the policy is from the reference."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bfpo_pl.data.adapters import Adapter
from bfpo_pl.data.rows import Row


class WithMismatched(Adapter):
    """Rows of another adapter, each with the responses of the row read before it (``mismatched`` = 1, in no pair).

    A row whose predecessor has the same prompt, or that has none, as the first of a split, gets no such response.

    Args:
        adapter: What reads the rows.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.flag_fields = adapter.flag_fields
        self._previous: Row | None = None

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        previous, row = self._previous, self.adapter(raw, origin)
        self._previous = row
        others: tuple[str, ...] = ()
        if previous and _follows(previous.origin, row.origin) and previous.prompt != row.prompt:
            others = previous.responses
        columns = {**row.columns, "mismatched": (0.0,) * len(row.responses)}
        columns = {name: values + (float(name == "mismatched"),) * len(others) for name, values in columns.items()}
        return dataclasses.replace(row, responses=row.responses + others, columns=columns)


def _follows(previous: str, origin: str) -> bool:
    """Whether a row comes later in the same reading of a split; origins that are not ``name:number`` do not tell."""
    (name, _, number), (next_name, _, next_number) = previous.rpartition(":"), origin.rpartition(":")
    numbered = number.isdecimal() and next_number.isdecimal()
    return name == next_name and int(number) < int(next_number) if numbered else True
