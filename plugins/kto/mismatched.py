"""Responses that belong to another prompt, from which KTO estimates how far the policy is from the reference."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bfpo_pl.data.adapters import Adapter
from bfpo_pl.data.rows import Row


class WithMismatched(Adapter):
    """Rows of another adapter, each with the responses of the row read before it (``mismatched`` = 1, in no pair).

    A row whose predecessor has the same prompt, or that has none, gets no such response.

    Args:
        adapter: What reads the rows.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._previous: Row | None = None

    def __call__(self, raw: Mapping[str, Any], origin: str) -> Row:
        previous, row = self._previous, self.adapter(raw, origin)
        self._previous = row
        others = previous.responses if previous and previous.prompt != row.prompt else ()
        columns = {**row.columns, "mismatched": (0.0,) * len(row.responses)}
        columns = {name: values + (float(name == "mismatched"),) * len(others) for name, values in columns.items()}
        return dataclasses.replace(row, responses=row.responses + others, columns=columns)
