"""Loading: batches of pair trees from the streams' rows, and what workers have to say besides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bfpo_pl.batch import Window
from bfpo_pl.component import UserError
from bfpo_pl.data.collate import Item
from bfpo_pl.data.packing import Trees
from bfpo_pl.data.reading import DataError
from bfpo_pl.data.streaming import StreamingRows, Tally
from bfpo_pl.data.streams import Key


@dataclass(frozen=True)
class Delivery:
    """What a worker gives for a batch.

    Args:
        content: Its trees, or the batch itself; or what is wrong with the data, for the main process to raise: raised
            in a worker, an error loses its class, and a traceback becomes part of its message.
        tallies: What the worker has counted since its last delivery, by index of the stream.
    """

    content: Any
    tallies: dict[int, Tally] = field(default_factory=dict)

    def pin_memory(self) -> Delivery:
        """The same with a batch in page-locked memory."""
        return replace(self, content=self.content.pin_memory()) if hasattr(self.content, "pin_memory") else self


@dataclass(frozen=True)
class _Mistake:
    """An error as plain data.

    Args:
        kind: Its class.
        message: Its message.
    """

    kind: type[UserError]
    message: str

    def error(self) -> UserError:
        """The error, of its own class."""
        return self.kind.__new__(self.kind, self.message)


class TreesByStream(Dataset[list[Item]]):
    """Pair trees by (stream, row), a batch at a time; in a worker as a `Delivery`.

    Args:
        trees: Those of each stream; None for a stream that gives none here.
    """

    def __init__(self, trees: list[Trees | StreamingRows | None]) -> None:
        self.trees = trees

    def __len__(self) -> int:
        return sum(len(trees) for trees in self.trees if trees is not None and not isinstance(trees, StreamingRows))

    def __getitem__(self, key: Key) -> list[Item]:
        return self.at([key])

    def __getitems__(self, keys: Sequence[Key]) -> list[Item] | Delivery:
        """The trees of a batch, as the loader asks for them.

        Args:
            keys: Index of the stream, and place in it, of each.
        """
        if get_worker_info() is None:
            return self.at(keys)
        try:
            content: list[Item] | _Mistake = self.at(keys)
        except UserError as error:
            content = _Mistake(type(error), str(error))
        return Delivery(content, {index: rows.take_tally() for index, rows in self._streaming()})

    def at(self, keys: Sequence[Key]) -> list[Item]:
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

    def add(self, tallies: dict[int, Tally]) -> None:
        """Adds what a worker has counted to what is counted here.

        Args:
            tallies: By index of the stream.
        """
        for index, rows in self._streaming():
            if index in tallies:
                rows.add_tally(tallies[index])

    def _streaming(self) -> list[tuple[int, StreamingRows]]:
        return [(index, rows) for index, rows in enumerate(self.trees) if isinstance(rows, StreamingRows)]


@dataclass(frozen=True)
class Collating:
    """Collates the trees of a batch, those of a delivery too.

    Args:
        collate: What makes a batch of trees.
    """

    collate: Callable[[Sequence[Item]], Any]

    def __call__(self, trees: Sequence[Item] | Delivery) -> Any:
        """The batch, in a delivery if the trees came in one."""
        if not isinstance(trees, Delivery):
            return self.collate(trees)
        content = trees.content if isinstance(trees.content, _Mistake) else self.collate(trees.content)
        return Delivery(content, trees.tallies)


class Loader(DataLoader):
    """A loader that measures how long it is waited for; its place in the data is kept by the data module."""

    waited = 0.0
    """Seconds that training has waited for batches, over all epochs."""

    accumulated: Callable[[], int] = staticmethod(lambda: 1)
    """Gives the number of micro-batches of an optimizer step, when the first of them is asked for."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches; where a step has several, each knows what all of them have, for the loss's denominators.

        Raises:
            UserError: The data cannot be used; of the class that it has in the worker that found out.
        """
        batches = self._batches()
        while True:
            size = self.accumulated()
            together = list(islice(batches, size))
            if not together:
                return
            if size == 1:
                yield together[0]
                continue
            window = Window.of(together, size)
            window = window.pin_memory() if self.pin_memory else window
            yield from (replace(batch, window=window) for batch in together)

    def _batches(self) -> Iterator[Any]:
        batches = super().__iter__()
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - began
            yield self._unpacked(batch) if isinstance(batch, Delivery) else batch

    def _unpacked(self, delivery: Delivery) -> Any:
        if isinstance(self.dataset, TreesByStream):
            self.dataset.add(delivery.tallies)
        if isinstance(delivery.content, _Mistake):
            raise delivery.content.error()
        return delivery.content

    # Lightning would warn of a loader without these two.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the data module has the place."""


def shares(strategy: Any) -> tuple[int, int]:
    """This process's number among those that see different rows, and how many they are.

    Processes that compute together (tensor parallelism) see the same rows and have the same number.

    Args:
        strategy: Lightning's.
    """
    kwargs = getattr(strategy, "distributed_sampler_kwargs", None)
    if kwargs:
        return kwargs["rank"], kwargs["num_replicas"]
    return int(getattr(strategy, "global_rank", 0)), int(getattr(strategy, "world_size", 1))


def of_every_share(trainer: Any, value: Any) -> list[Any]:
    """A value of each process that sees different rows, in their order. Every process must call.

    Args:
        trainer: The trainer.
        value: This process's; the same on those that see the same rows.
    """
    if trainer.world_size == 1:
        return [value]
    values = [None] * trainer.world_size
    distributed.all_gather_object(values, value)
    _, world = shares(trainer.strategy)
    return values[:: len(values) // world]  # those that see the same rows are neighbours


def rank_and_world(trainer: Any) -> tuple[int, int]:
    """This process among those that see different rows (under tensor parallelism some see the same).

    Args:
        trainer: The trainer, or None.

    Raises:
        DataError: The trainer would share the rows out once more.
    """
    if trainer is None:
        return 0, 1
    rank, world = shares(trainer.strategy)
    connector = getattr(trainer, "_accelerator_connector", None)
    if world > 1 and getattr(connector, "use_distributed_sampler", False):
        raise DataError("AlignmentData shares rows out among ranks itself: set use_distributed_sampler: false.")
    return rank, world
