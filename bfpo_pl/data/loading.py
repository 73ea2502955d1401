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


class TreesByStream(Dataset[Item]):
    """Pair trees by (stream, row), a batch at a time.

    Args:
        trees: Those of each stream; None for a stream that gives none here.
    """

    def __init__(self, trees: list[Trees | StreamingRows | None]) -> None:
        self.trees = trees

    def __len__(self) -> int:
        return sum(len(trees) for trees in self.trees if trees is not None and not isinstance(trees, StreamingRows))

    def __getitem__(self, key: Key) -> Item:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Item]:
        items: dict[Key, Item] = {}
        for stream in sorted({stream for stream, _ in keys}):
            trees, rows = self.trees[stream], [row for each, row in keys if each == stream]
            assert trees is not None
            items.update(((stream, row), (stream, tree)) for row, tree in zip(rows, trees.at(rows), strict=True))
        return [items[key] for key in keys]


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
