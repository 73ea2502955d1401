"""What a row is once it is token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Ids = Sequence[int] | np.ndarray
"""Token ids: a list, or an int32 array that is a view of a memory-mapped file."""


@dataclass(frozen=True)
class PairTree:
    """A row as token ids: the prompt once, and each response, which continues it.

    Args:
        prompt_ids: Tokens of the prompt, the header of the assistant's turn among them.
        response_ids: Tokens of each response, the end-of-sequence token among them unless it was cut.
        pairs: (chosen, rejected) indices into the responses.
        columns: Per-response columns, one number a response.
        pair_columns: Per-pair columns, one number a pair.
        origin: Where the row came from.
    """

    prompt_ids: Ids
    response_ids: Sequence[Ids]
    pairs: Sequence[tuple[int, int]] = ()
    columns: Mapping[str, Sequence[float] | np.ndarray] = field(default_factory=dict)
    pair_columns: Mapping[str, Sequence[float] | np.ndarray] = field(default_factory=dict)
    origin: str = ""
