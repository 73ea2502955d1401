"""Loading: batches of pair trees from the streams' rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from bfpo_pl.data.collate import Item
from bfpo_pl.data.packing import Trees
from bfpo_pl.data.streaming import StreamingRows
from bfpo_pl.data.streams import Key


class TreesByStream(Dataset[list[Item]]):
    """Pair trees by (stream, row), a batch at a time.

    Args:
        trees: Those of each stream; None for a stream that gives none here.
    """

    def __init__(self, trees: list[Trees | StreamingRows | None]) -> None:
        self.trees = trees

    def __len__(self) -> int:
        return sum(len(trees) for trees in self.trees if trees is not None and not isinstance(trees, StreamingRows))

    def __getitem__(self, key: Key) -> list[Item]:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        """The trees of a batch, in the order of the keys; a key of packed rows may stand for several.

        Args:
            keys: Index of the stream, and place in it, of each.
        """
        items: dict[Key, list[Item]] = {}
        for stream in sorted({stream for stream, _ in keys}):
            trees, rows = self.trees[stream], [row for each, row in keys if each == stream]
            assert trees is not None
            if isinstance(trees, StreamingRows):  # faster together
                found = [[tree] for tree in trees.at(rows)]
            else:
                found = [trees.at([row]) for row in rows]
            items.update(
                ((stream, row), [(stream, tree) for tree in some]) for row, some in zip(rows, found, strict=True)
            )
        return [item for key in keys for item in items[key]]


class Loader(DataLoader):
    """A loader that measures how long it is waited for; its place in the data is kept by the data module."""

    waited = 0.0
    """Seconds that training has waited for batches, over all epochs."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - began
            yield batch

    # Lightning would warn of a loader without these two.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the data module has the place."""
