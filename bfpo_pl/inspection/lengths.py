"""Lengths in tokens: of prompts, responses and whole rows of a split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bfpo_pl.data.packing import Packed, Trees
from bfpo_pl.data.reading import Reading
from bfpo_pl.data.stored import StoredTrees

QUANTILES = (0.0, 0.05, 0.5, 0.95, 0.99, 1.0)
"""Those that are told: the least, the most, and what lies between."""

WHOLE_ROW = "whole row"
"""The part that is a prompt, once, with all its responses."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows that are used.

    Args:
        parts: ``prompt``, ``chosen`` and ``rejected`` (of every pair) or ``response``, and `WHOLE_ROW` (the prompt once
            and all its responses): one number each.
        responses: How many responses there are.
    """

    parts: dict[str, np.ndarray]
    responses: int

    def quantiles(self, part: str) -> list[float]:
        """The lengths at `QUANTILES`.

        Args:
            part: One of ``parts``.
        """
        return np.quantile(self.parts[part], QUANTILES).tolist()


def stored_trees(trees: Trees) -> StoredTrees:
    """The rows themselves, also of those that are packed.

    Args:
        trees: What a stream gives to a batch.
    """
    stored = trees.documents if isinstance(trees, Packed) else trees
    assert isinstance(stored, StoredTrees)
    return stored


def lengths_of(reading: Reading, trees: Trees) -> Lengths:
    """The lengths of a split's rows.

    Args:
        reading: Which rows are used.
        trees: The same rows as tokens.
    """
    stored = stored_trees(trees)
    # The store has no response of rows that are useless as tokens, so that its responses are those that are used.
    responses = stored.tokens.response_lengths
    used = np.zeros(len(reading.rows), dtype=bool)
    used[reading.kept] = True
    place = np.cumsum(np.repeat(used, reading.response_counts)) - 1
    parts = {"prompt": stored.tokens.prompt_lengths[stored.places]}
    pairs = place[reading.pairs_kept]
    if len(pairs):
        parts |= {"chosen": responses[pairs[:, 0]], "rejected": responses[pairs[:, 1]]}
    else:
        parts["response"] = responses
    return Lengths({**parts, WHOLE_ROW: stored.lengths}, len(responses))
