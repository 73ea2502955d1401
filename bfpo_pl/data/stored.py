"""Pair trees of the rows of one stream, put together from the files on disk as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bfpo_pl.data.reading import Reading
from bfpo_pl.data.token_store import TokenStore
from bfpo_pl.data.trees import PairTree


class StoredTrees:
    """The pair trees of a split of a stream, by their place in its order of rows.

    Rows that turned out to be useless as tokens are added to the reading's faults and are not among the trees.

    Args:
        reading: Which rows are used.
        tokens: Their token ids.
    """

    def __init__(self, reading: Reading, tokens: TokenStore) -> None:
        useless = [(place, reading.fault(place, *words)) for place, *words in tokens.faults]
        self.tokens, self.key = tokens, tokens.folder.name
        self.places = np.delete(np.arange(len(reading.kept)), [place for place, _ in useless])
        reading.drop(useless)
        self.rows, self.kept = reading.rows, reading.kept
        self.lengths: np.ndarray = tokens.lengths[self.places]
        """``[N]``, tokens of each tree, the prompt counted once."""
        self._pairs, self._first_pair = reading.pairs, reading.first_pair
        self._tables = (reading.response_tables, reading.pair_tables)
        self._first = (reading.first_response, reading.first_pair)

    def __len__(self) -> int:
        return len(self.places)

    def at(self, places: Sequence[int]) -> list[PairTree]:
        """The trees at some places.

        Args:
            places: Their places, in any order.
        """
        return [self._tree(place) for place in places]

    def _tree(self, place: int) -> PairTree:
        row = int(self.kept[place])
        prompt, responses = self.tokens[int(self.places[place])]
        columns, pair_columns = (
            {name: values[first[row] : first[row + 1]] for name, values in table.items()}
            for table, first in zip(self._tables, self._first, strict=True)
        )
        pairs = self._pairs[self._first_pair[row] : self._first_pair[row + 1]]
        return PairTree(
            prompt, responses, [(c, r) for c, r in pairs.tolist()], columns, pair_columns, self.rows.origin(row)
        )
