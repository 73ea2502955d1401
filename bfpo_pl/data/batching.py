"""Batching: how many rows of each stream a batch has, and which rows meet in it."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Mapping

import numpy as np

from bfpo_pl.component import Component, UserError, check_range
from bfpo_pl.data.streams import Batches, FixedBatches, Key, by_rank


class Batching(Component):
    """Every batch has `batch_size` rows of every stream, the next ones of its order.

    A subclass regroups these batches. Whatever it does, a batch must be a pure function of the seed and of its number,
    and the same for every rank.
    """

    def __call__(self, batches: FixedBatches, lengths: Mapping[str, np.ndarray]) -> Batches:
        """The global batches to train on.

        Args:
            batches: Those with the quota of every stream.
            lengths: ``[rows]``, tokens of each row of each stream, the prompt and all its responses; streams whose
                source streams have none.

        Raises:
            UserError: Lengths are needed of a stream that has none.
        """
        return batches

    def _lengths(self, batches: FixedBatches, lengths: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The lengths of every stream's rows, in the order of the streams."""
        for order in batches.orders:
            if order.size is None:
                raise UserError(
                    f"data.batching: {type(self).__name__} needs the length of every row beforehand, and stream "
                    f"'{order.name}' reads its rows as training goes on. Set data.streams.{order.name}.source."
                    "streaming: false, or leave out data.batching."
                )
        return [np.asarray(lengths[order.name]) for order in batches.orders]


class LengthBuckets(Batching):
    """Rows of about the same length meet in a batch; every batch still has `batch_size` rows of every stream.

    The rows of a window of batches are sorted by length and cut into batches anew, long rows of one stream with long
    ones of the others, and these batches come in random order. The ranks' shares of a batch are about equally long.
    An epoch's last batch is left as it is, if the driver has too few rows left to fill it. A stream with fewer rows
    than a window takes comes several times in it, and copies of a row then meet in a batch.

    Args:
        window: Batches whose rows are sorted together. The more, the more alike are the rows of a batch, and the less
            random is the company that a row keeps.
    """

    def __init__(self, window: int = 64) -> None:
        self.window = int(check_range(self, "window", window, 1))

    def __call__(self, batches: FixedBatches, lengths: Mapping[str, np.ndarray]) -> Batches:
        return BucketedBatches(batches, self._lengths(batches, lengths), self.window)


class TokenBudget(Batching):
    """Every batch has as many rows as fit into a number of tokens, in the proportion of the streams' `batch_size`.

    A unit is `batch_size` rows of every stream; a batch is as many consecutive units as fit in every process, and at
    least one: a unit that has more tokens is a batch by itself. No batch goes beyond the end of an epoch. Epochs
    differ in their number of batches, so that the trainer cannot know it beforehand: it shows no total, and
    `limit_train_batches` must be a whole number.

    Args:
        tokens: Most tokens of a batch of one process, prompts and responses together. A prompt counts once, and
            padding not at all; what the network is given of them is up to `model.attention`.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = int(check_range(self, "tokens", tokens, 1))

    def __call__(self, batches: FixedBatches, lengths: Mapping[str, np.ndarray]) -> BudgetedBatches:
        return BudgetedBatches(batches, self._lengths(batches, lengths), self.tokens)


class BucketedBatches(Batches):
    """Global batches whose rows are of about the same length.

    Args:
        fixed: The batches as they would be otherwise.
        lengths: ``[rows]`` of each stream, tokens of each row.
        window: Batches whose rows are sorted together.
    """

    def __init__(self, fixed: FixedBatches, lengths: list[np.ndarray], window: int) -> None:
        driver_rows = fixed.orders[fixed.driver].size
        assert driver_rows is not None
        assert fixed.length is not None
        self.fixed, self.lengths, self.window = fixed, lengths, window
        self.world, self.length, self._epoch_length = fixed.world, fixed.length, fixed.length
        self._whole = driver_rows // (fixed.quotas[fixed.driver] * fixed.world)
        """Batches of an epoch that have a whole quota of the driver's rows: all, or all but the last."""
        self._held: tuple[int, list[np.ndarray]] = (-1, [])

    def batch(self, number: int) -> list[list[Key]]:
        epoch, within = divmod(number, self._epoch_length)
        if within >= self._whole:
            return self.fixed.batch(number)
        first = within // self.window * self.window
        size = min(self.window, self._whole - first)
        rows = self._sorted(number - within + first, size)
        seed = [self.fixed.seed, zlib.crc32(b"order of the batches of a window"), epoch, first]
        place = np.random.default_rng(seed).permutation(size)[within - first]
        return by_rank([taken[place] for taken in rows], self.world)

    def _sorted(self, first: int, size: int) -> list[np.ndarray]:
        """``[size, rows of a global batch]`` of each stream, the rows of a window by length."""
        if self._held[0] != first:
            taken = [np.array(rows) for rows in self.fixed.rows(first, first + size)]
            self._held = (
                first,
                [
                    rows[np.argsort(lengths[rows], kind="stable")].reshape(size, -1)
                    for rows, lengths in zip(taken, self.lengths, strict=True)
                ],
            )
        return self._held[1]


class BudgetedBatches(Batches):
    """Global batches of as many consecutive units as fit into a number of tokens on every rank.

    Args:
        units: The units: global batches with one quota of every stream.
        lengths: ``[rows]`` of each stream, tokens of each row.
        tokens: Most tokens of a batch of one rank.
    """

    length = None
    why_unknown = "data.batching: TokenBudget puts as many rows into a batch as fit, and epochs differ in it"

    def __init__(self, units: FixedBatches, lengths: list[np.ndarray], tokens: int) -> None:
        assert units.length is not None
        self.units, self.lengths, self.tokens = units, lengths, tokens
        self.world, self._epoch_units = units.world, units.length
        self._cuts: list[np.ndarray] = []
        """Of each epoch so far: the first unit of every batch, and the unit after the last."""
        self._firsts = [0]
        """The first batch of each epoch so far, and of the next."""

    @property
    def oversized(self) -> list[tuple[int, int]]:
        """Batches of the first epoch that are one unit with more tokens than there should be: number, tokens."""
        self._epoch_of(0)
        largest = self._unit_tokens(0).max(axis=1)
        units = np.flatnonzero(largest > self.tokens)
        numbers = np.searchsorted(self._cuts[0], units)
        return list(zip(numbers.tolist(), largest[units].tolist(), strict=True))

    def batch(self, number: int) -> list[list[Key]]:
        epoch = self._epoch_of(number)
        within = number - self._firsts[epoch]
        first, last = self._cuts[epoch][within : within + 2].tolist()
        units = [self.units.batch(unit) for unit in range(first, last)]
        return [[key for unit in units for key in unit[rank]] for rank in range(self.world)]

    def epoch(self, number: int, limit: int | None = None) -> tuple[int, int | None]:
        """As the base has it, except that a shortened epoch ends where the driver's rows do, too."""
        epoch = self._epoch_of(number)
        first, last = self._firsts[epoch : epoch + 2]
        if limit is None:
            return first, last
        first += (number - first) // limit * limit
        return first, min(first + limit, last)

    def _epoch_of(self, number: int) -> int:
        """The driver's epoch that a batch lies in; cuts all epochs up to it."""
        while number >= self._firsts[-1]:
            epoch = len(self._cuts)
            self._cuts.append(epoch * self._epoch_units + _cut(self._unit_tokens(epoch), self.tokens))
            self._firsts.append(self._firsts[-1] + len(self._cuts[-1]) - 1)
        return bisect_right(self._firsts, number) - 1

    def _unit_tokens(self, epoch: int) -> np.ndarray:
        """``[units, world]``, tokens of every unit of an epoch on each rank."""
        total = np.zeros((self._epoch_units, self.world), dtype=np.int64)
        first = epoch * self._epoch_units
        streams = zip(self.units.rows(first, first + self._epoch_units), self.lengths, self.units.quotas, strict=True)
        for rows, lengths, quota in streams:
            tokens = np.zeros(total.size * quota, dtype=np.int64)  # the driver's last unit may lack rows
            tokens[: len(rows)] = lengths[rows]
            total += tokens.reshape(self._epoch_units, quota, self.world).sum(axis=1)
        return total


def _cut(unit_tokens: np.ndarray, budget: int) -> np.ndarray:
    """Where batches begin, and where the last one ends; each holds units until one rank's budget is spent."""
    cuts, held = [0], np.zeros_like(unit_tokens[0])
    for unit, tokens in enumerate(unit_tokens):
        held = held + tokens
        if unit > cuts[-1] and held.max() > budget:
            cuts.append(unit)
            held = tokens
    return np.array([*cuts, len(unit_tokens)])
