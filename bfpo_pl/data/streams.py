"""Streams: named sources of rows with a quota of each batch, and the order in which their rows come."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from bfpo_pl.component import UserError, check_range
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
        fraction: Share of the training rows that is used, in (0, 1]; of N rows, int(fraction * N).
        take: Which rows these are: the `first`, as in the paper's code, or a `random` choice.
        take_seed: Seed of the random choice; not the run's, so that runs with other seeds train on the same rows.
        validation_fraction: Share of the prompts, in [0, 1), that is held out of the training split for validation,
            with all their rows; for sources that have no validation split.
        duplicates: What becomes of training rows that repeat another one: `keep` or `drop`.
        shuffle_buffer: Rows that are shuffled together where the source streams; other sources are shuffled whole
            and do not use it.

    Raises:
        UserError: A value is out of its range.
    """

    source: Source
    adapter: Adapter
    batch_size: int
    weight: float = 1.0
    assume_safe: bool = False
    fraction: float = 1.0
    take: Literal["first", "random"] = "first"
    take_seed: int = 0
    validation_fraction: float = 0.0
    duplicates: Literal["keep", "drop"] = "keep"
    shuffle_buffer: int = 10_000

    def __post_init__(self) -> None:
        check_range(self, "batch_size", self.batch_size, 1)
        check_range(self, "weight", self.weight, 0.0)
        check_range(self, "fraction", self.fraction, 0.0, 1.0, low_open=True)
        check_range(self, "take_seed", self.take_seed, 0)
        check_range(self, "validation_fraction", self.validation_fraction, 0.0, 1.0, high_open=True)
        check_range(self, "shuffle_buffer", self.shuffle_buffer, 1)
        for name, values in (("take", ("first", "random")), ("duplicates", ("keep", "drop"))):
            if getattr(self, name) not in values:
                raise UserError(f"Stream: {name} must be {' or '.join(values)}, not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class StreamOrder:
    """The endless order in which the rows of one stream come: one fresh permutation after the other.

    A pure function of the seed, the stream's name and its number of rows; which row comes at which position depends
    on nothing else, not on workers, ranks, epochs or the other streams. The rows of a source that streams are not
    numbered: there the row at a position is the position itself, and what reads them shuffles
    (:class:`~bfpo_pl.data.streaming.StreamingRows`).

    Args:
        name: The stream's name.
        size: Its number of rows; None if its source streams.
        seed: The seed of the data.
    """

    name: str
    size: int | None
    seed: int

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows at positions ``start`` to ``stop`` (not included) of the endless order.

        Args:
            start: First position.
            stop: Position after the last.
        """
        if self.size is None:
            return list(range(start, stop))
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


class Batches(ABC):
    """The endless sequence of global batches; each a pure function of the seed and of its number.

    Batches are counted from 0 over all epochs. A global batch is shared out among ranks, so that what it holds depends
    on nothing but its size.
    """

    world: int
    """Processes that see different rows."""

    length: int | None
    """Batches of an epoch; None if epochs differ in it, or never end."""

    why_unknown: str = ""
    """Why epochs have no known length, where ``length`` is None."""

    @abstractmethod
    def batch(self, number: int) -> list[list[Key]]:
        """Every rank's rows of a global batch.

        Args:
            number: Its number.
        """

    def epoch(self, number: int, limit: int | None = None) -> tuple[int, int | None]:
        """The epoch that a batch lies in: its first batch, and that of the next epoch (None if there is none).

        Args:
            number: The batch's number.
            limit: Most batches of an epoch. A shorter epoch leaves nothing out: the next one goes on where it ended.
        """
        lengths = [each for each in (self.length, limit) if each is not None]
        if not lengths:
            return 0, None
        first = number // min(lengths) * min(lengths)
        return first, first + min(lengths)


class FixedBatches(Batches):
    """Global batches of the same number of rows of every stream.

    A global batch holds ``batch_size · world`` rows of each stream, the next ones of its order; rank r takes every
    ``world``-th of them, from the r-th on. The driver's rows set the length of an epoch; its last batch is kept as it
    is, so that a rank may get fewer of the driver's rows there, or none. The other streams go on over epochs and are
    shuffled afresh when exhausted. If the driver's source streams, there is one epoch, which never ends.

    Args:
        sizes: Number of rows of each stream, by name; None if its source streams.
        quotas: Rows of each stream in a batch of one process, by name.
        driver: The stream whose rows set the length of an epoch.
        seed: Seed of the order.
        world: Processes that see different rows.
    """

    def __init__(
        self, sizes: Mapping[str, int | None], quotas: Mapping[str, int], driver: str, seed: int = 0, world: int = 1
    ) -> None:
        self.orders = [StreamOrder(name, size, seed) for name, size in sizes.items()]
        self.quotas = [quotas[name] for name in sizes]
        self.driver = list(sizes).index(driver)
        self.seed, self.world = seed, world
        size = sizes[driver]
        self.length = None if size is None else math.ceil(size / (quotas[driver] * world))
        self.why_unknown = f"stream '{driver}', the driver, reads its rows as training goes on"

    def batch(self, number: int) -> list[list[Key]]:
        return by_rank(self.rows(number, number + 1), self.world)

    def rows(self, first: int, last: int) -> list[list[int]]:
        """Each stream's rows in consecutive global batches of one epoch.

        Args:
            first: Number of the first batch.
            last: Number after the last.
        """
        return [order.rows(*self._positions(index, first, last)) for index, order in enumerate(self.orders)]

    def _positions(self, index: int, first: int, last: int) -> tuple[int, int]:
        taken, driver = self.quotas[index] * self.world, self.orders[self.driver]
        if index != self.driver or driver.size is None or self.length is None:
            return first * taken, last * taken
        epoch, within = divmod(first, self.length)
        start = epoch * driver.size + within * taken
        return start, min(start + (last - first) * taken, (epoch + 1) * driver.size)


def by_rank(rows: Sequence[Sequence[int]], world: int) -> list[list[Key]]:
    """Shares the rows of a global batch out: rank r takes every ``world``-th row of each stream, from the r-th on.

    Args:
        rows: The rows of each stream.
        world: How many ranks there are.
    """
    return [
        [(index, int(row)) for index, taken in enumerate(rows) for row in taken[rank::world]] for rank in range(world)
    ]


class StreamSampler(Sampler[list[Key]]):
    """One rank's batches, an epoch at a time.

    Args:
        batches: The global batches.
        rank: This process among those that see different rows.
        start: Gives the number of batches consumed so far, over all epochs; asked whenever an iteration begins, which
            then goes from there to the epoch's end. Default: the batches that this sampler has itself yielded.
        epoch_batches: Most batches of an epoch, or the share of it as a float (`limit_train_batches`).
        repeat: Every epoch has the batches of the first (`overfit_batches`).

    Raises:
        UserError: A share, or a repetition, of an epoch of which nobody knows the length.
    """

    def __init__(
        self,
        batches: Batches,
        rank: int = 0,
        start: Callable[[], int] | None = None,
        epoch_batches: int | float = 1.0,
        repeat: bool = False,
    ) -> None:
        if not 0 <= rank < batches.world:
            raise ValueError(f"StreamSampler: rank must lie in [0, {batches.world - 1}], not {rank}.")
        self.batches, self.rank, self.start, self.repeat = batches, rank, start, repeat
        self.limit = _limit(epoch_batches, batches)
        if repeat and batches.epoch(0, self.limit)[1] is None:
            raise UserError(
                "trainer.overfit_batches repeats the batches of an epoch, and the epoch of a driver that streams never "
                "ends: set a whole number of batches."
            )
        self.yielded = 0

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the iteration starts.

        Raises:
            TypeError: Epochs differ in it, or never end; Lightning takes this to say so.
        """
        if self.batches.length is None:
            raise TypeError(f"The number of batches of an epoch is not known: {self.batches.why_unknown}.")
        return self.batches.length

    def __iter__(self) -> Iterator[list[Key]]:
        if self.start is not None:
            self.yielded = self.start()
        _, end = self._epoch(self.yielded)
        for number in count(self.yielded) if end is None else range(self.yielded, end):
            self.yielded = number + 1
            yield self.batch(number)

    def batch(self, number: int) -> list[Key]:
        """This rank's rows of a global batch.

        Args:
            number: Its number, counted from 0 over all epochs.
        """
        first, _ = self._epoch(number)
        return self.batches.batch(number - first if self.repeat else number)[self.rank]

    def _epoch(self, number: int) -> tuple[int, int | None]:
        if not self.repeat:
            return self.batches.epoch(number, self.limit)
        _, length = self.batches.epoch(0, self.limit)
        assert length is not None
        first = number // length * length
        return first, first + length


def _limit(epoch_batches: int | float, batches: Batches) -> int | None:
    """Most batches of an epoch; None if nothing limits it."""
    if isinstance(epoch_batches, int):
        return max(1, epoch_batches)  # with 0 the trainer asks for no batch
    if epoch_batches == 1.0:
        return None
    if batches.length is None:
        raise UserError(
            f"trainer.limit_train_batches = {epoch_batches:g} is a share of an epoch, whose number of batches is not "
            f"known ({batches.why_unknown}): set a whole number of batches."
        )
    return max(1, int(batches.length * epoch_batches))


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
