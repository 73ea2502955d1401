"""Streams: named sources of rows with a quota of each batch, and the order in which their rows come."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from bfpo_pl.component import check_range
from bfpo_pl.data.adapters import Adapter
from bfpo_pl.data.sources import Source

Key = tuple[int, int]
"""Index of a stream, and of a row in it."""


@dataclass
class Stream:
    """A source of rows that gives a fixed share of every batch.

    Args:
        source: Where the raw rows come from.
        adapter: What reads them.
        batch_size: Rows (prompts with their responses) of this stream in each micro-batch of each process.
        weight: Weight of this stream's loss in the sum over streams.
        assume_safe: Take responses without safety flags to be safe. Without it, a labeling that reads safety flags
            refuses the stream.
    """

    source: Source
    adapter: Adapter
    batch_size: int
    weight: float = 1.0
    assume_safe: bool = False

    def __post_init__(self) -> None:
        check_range(self, "batch_size", self.batch_size, 1)
        check_range(self, "weight", self.weight, 0.0)


@dataclass(frozen=True)
class StreamOrder:
    """The endless order in which the rows of one stream come: one fresh permutation after the other.

    A pure function of the seed, the stream's name and its number of rows; which row comes at which position depends
    on nothing else, not on workers, ranks, epochs or the other streams.

    Args:
        name: The stream's name.
        size: Its number of rows.
        seed: The seed of the data.
    """

    name: str
    size: int
    seed: int

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows at positions ``start`` to ``stop`` (not included) of the endless order.

        Args:
            start: First position.
            stop: Position after the last.
        """
        taken: list[int] = []
        while start < stop:
            number, offset = divmod(start, self.size)
            end = min(self.size, offset + stop - start)
            taken.extend(_permutation(self.name, self.size, self.seed, number)[offset:end].tolist())
            start += end - offset
        return taken


@lru_cache(maxsize=16)
def _permutation(name: str, size: int, seed: int, number: int) -> np.ndarray:
    """The permutation of a stream's pass ``number`` through its rows."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), number]).permutation(size)


class StreamSampler(Sampler[list[Key]]):
    """Batches of rows of several streams; a pure function of the seed and of the global batch number.

    A global batch holds ``batch_size · world`` rows of each stream, the next ones of its order; rank r takes every
    ``world``-th of them, from the r-th on. Thus the global batches depend on nothing but their size. The driver's
    rows set the length of an epoch; its last batch is kept as it is, so that a rank may get fewer of the driver's
    rows there, or none. The other streams go on over epochs and are shuffled afresh when exhausted.

    Args:
        sizes: Number of rows of each stream, by name.
        quotas: Rows of each stream in a batch of one process, by name.
        driver: The stream whose rows set the length of an epoch.
        seed: Seed of the order.
        rank: This process among those that see different rows.
        world: How many of those there are.
        start: Gives the number of batches consumed so far, over all epochs; asked whenever an iteration begins, which
            then goes from there to the epoch's end. Default: the batches that this sampler has itself yielded.
        epoch_batches: Batches of an epoch, if it is shorter than the driver (`limit_train_batches`).
        repeat: Every epoch has the batches of the first (`overfit_batches`).
    """

    def __init__(
        self,
        sizes: dict[str, int],
        quotas: dict[str, int],
        driver: str,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: Callable[[], int] | None = None,
        epoch_batches: int | None = None,
        repeat: bool = False,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"StreamSampler: rank must lie in [0, {world - 1}], not {rank}.")
        self.orders = [StreamOrder(name, size, seed) for name, size in sizes.items()]
        self.quotas = [quotas[name] for name in sizes]
        self.driver = list(sizes).index(driver)
        self.rank, self.world = rank, world
        self.start = start
        self.length = math.ceil(sizes[driver] / (quotas[driver] * world))
        self.epoch_batches = min(self.length, epoch_batches or self.length)
        self.repeat = repeat
        self.yielded = 0

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the iteration starts."""
        return self.length

    def __iter__(self) -> Iterator[list[Key]]:
        if self.start is not None:
            self.yielded = self.start()
        end = (self.yielded // self.epoch_batches + 1) * self.epoch_batches
        for number in range(self.yielded, end):
            self.yielded = number + 1
            yield self.batch(number % self.epoch_batches if self.repeat else number)

    def batch(self, number: int) -> list[Key]:
        """This rank's rows of a global batch.

        Args:
            number: Its number, counted from 0 over all epochs.
        """
        return self.global_batch(number)[self.rank]

    def global_batch(self, number: int) -> list[list[Key]]:
        """Every rank's rows of a global batch.

        Args:
            number: Its number, counted from 0 over all epochs.
        """
        ranks: list[list[Key]] = [[] for _ in range(self.world)]
        for index, (order, quota) in enumerate(zip(self.orders, self.quotas, strict=True)):
            size = quota * self.world
            if index == self.driver:
                epoch, within = divmod(number, self.length)
                first = epoch * order.size + within * size
                last = min(first + size, (epoch + 1) * order.size)
            else:
                first, last = number * size, (number + 1) * size
            rows = order.rows(first, last)
            for rank in range(self.world):
                ranks[rank].extend((index, row) for row in rows[rank :: self.world])
        return ranks


class SequentialSampler(Sampler[list[Key]]):
    """Batches of one stream after the other, in the order of their rows, for validation.

    Every rank yields the same number of batches; the last of a stream is kept, and may be empty on some ranks.

    Args:
        sizes: (index, number of rows) of each stream.
        batch_size: Rows in a batch of one process.
        rank: This process among those that see different rows.
        world: How many of those there are.
    """

    def __init__(self, sizes: Sequence[Key], batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.sizes, self.size, self.rank, self.world = list(sizes), batch_size * world, rank, world

    def __len__(self) -> int:
        return sum(math.ceil(rows / self.size) for _, rows in self.sizes)

    def __iter__(self) -> Iterator[list[Key]]:
        for index, rows in self.sizes:
            for first in range(0, rows, self.size):
                taken = range(first, min(first + self.size, rows))
                yield [(index, row) for row in taken[self.rank :: self.world]]
