"""Streaming: rows that are read, shuffled and tokenised while training goes on, for sources too large to be kept."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import get_worker_info

from bfpo_pl.data.checked import adapt
from bfpo_pl.data.encoding import COUNTED
from bfpo_pl.data.reading import DataError
from bfpo_pl.data.rows import Row, RowError
from bfpo_pl.data.streams import Stream
from bfpo_pl.data.trees import PairTree

_TOLD = {10**power for power in range(10)}
Encode = Callable[[Sequence[Row]], Sequence[PairTree | RowError]]
"""Encodes rows together: for each its pair tree, or what makes it useless."""


@dataclass
class Tally:
    """What a process has counted of a stream's rows.

    Args:
        dropped: Bad rows that it has met: the number of each in the source, the reason, and where and what it is.
        counts: What became of the texts of the trees that it gave.
    """

    dropped: dict[int, tuple[str, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Block:
    """Rows that are shuffled together.

    Args:
        first: Position of the first of them in the endless order.
        rows: The rows in shuffled order, each with its number in the source.
    """

    first: int
    rows: list[tuple[int, Row]]

    @property
    def last(self) -> int:
        """Position after the last row."""
        return self.first + len(self.rows)


class StreamingRows:
    """Pair trees by their position in the endless order of a source that streams.

    The order is a pure function of the seed, the stream's name and the source. It counts good rows alone: those that
    the adapter accepts and that have the columns of the first good row. They come in blocks of the stream's
    ``shuffle_buffer``, each shuffled by itself; when the source ends, so does the block, and the next pass begins,
    shuffled otherwise. A row that turns out to be useless as tokens keeps its position, which then gives the tree of
    the next useful row of the block instead, in shuffled order, the first after the last; that row comes twice. If the
    block has none, it is the first useful row of the blocks after it.

    Reading goes forward and keeps one block in memory. A position before that block is found by reading the pass again
    from its beginning, and one far ahead by reading everything up to it, which is right but slow; so is resuming.
    Every process (worker of a loader) opens the source for itself, reads all of it, and tokenises what it is asked for.
    What workers count goes to the main process with their batches (`take_tally`, `add_tally`).

    Args:
        name: The stream's name.
        stream: The stream, whose source has the same rows in the same order whenever it is read.
        on_bad_row: ``fail`` stops at the first bad row; ``drop`` goes on without it.
        seed: Seed of the order.
        encode: What turns rows into pair trees; to be picklable where workers do not fork.
        encoded: What ``encode`` counts as it goes, such as ``responses_cut``.
    """

    def __init__(
        self,
        name: str,
        stream: Stream,
        on_bad_row: Literal["fail", "drop"],
        seed: int,
        encode: Encode,
        encoded: Counter[str] | None = None,
    ) -> None:
        self.name, self.stream, self.on_bad_row, self.seed, self.encode = name, stream, on_bad_row, seed, encode
        self._encoded: Counter[str] = Counter() if encoded is None else encoded
        self.dropped: Counter[str] = Counter()
        """Bad rows that are known so far, each counted once, by reason."""
        self.counts: Counter[str] = Counter()
        """What became of the texts of the trees given so far."""
        self._tally = Tally()
        self.key = f"streaming, shuffle_buffer {stream.shuffle_buffer}"
        self._dropped: set[int] = set()
        self._pass_size: int | None = None  # good rows of the source, known once it has been read to its end
        self._barren = range(0)  # positions of blocks without a useful row, and the tree that stands in for them
        self._instead: PairTree | None = None
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        # An open source cannot be taken along; whoever unpickles this opens it anew.
        return {**vars(self), "_process": None, "_good_rows": iter(()), "_block": _Block(0, [])}

    def at(self, positions: Sequence[int]) -> list[PairTree]:
        """The trees at some positions of the endless order.

        Args:
            positions: The positions, in any order.

        Raises:
            DataError: A row is bad and may not be dropped, none is good, or the source has changed.
            SourceError: The source cannot be read.
        """
        before = self._encoded.copy()
        trees = self._at(positions)
        added = Counter({name: self._encoded[name] - before[name] for name in COUNTED})
        self.counts += added
        if get_worker_info() is not None:
            self._tally.counts += added
        return trees

    def probe(self, most: int) -> list[PairTree]:
        """The trees at the first positions; they are not counted as given.

        Args:
            most: How many, if the first block has as many.

        Raises:
            DataError: As `at`.
        """
        return self._at(range(min(most, self._block_with(0).last)))

    @cached_property
    def first(self) -> PairTree:
        """The tree at the first position, not counted as given."""
        return self.probe(1)[0]

    def summary(self) -> dict[str, Any]:
        """Counts as plain data, of all that this process's loader has given so far."""
        return {"streaming": True, "dropped": dict(self.dropped), **{name: self.counts[name] for name in COUNTED}}

    def take_tally(self) -> Tally:
        """What this worker has counted since it was last asked."""
        taken, self._tally = self._tally, Tally()
        return taken

    def add_tally(self, tally: Tally) -> None:
        """Adds what a worker has counted; a bad row that several have met counts once.

        Args:
            tally: What it has counted.
        """
        self.counts += tally.counts
        for index, (reason, words) in tally.dropped.items():
            self._note(index, reason, words)

    def _at(self, positions: Sequence[int]) -> list[PairTree]:
        trees: dict[int, PairTree] = {}
        ahead = sorted(set(positions))
        while ahead:
            if ahead[0] in self._barren and self._instead is not None:
                here = [position for position in ahead if position in self._barren]
                trees.update(dict.fromkeys(here, self._instead))
            else:
                block = self._block_with(ahead[0])
                here = [position for position in ahead if position < block.last]
                trees.update(zip(here, self._trees(block, [position - block.first for position in here]), strict=True))
            ahead = ahead[len(here) :]
        return [trees[position] for position in positions]

    # ------------------------------------------------------------------ blocks

    def _block_with(self, position: int) -> _Block:
        if self._process != os.getpid():  # a fork shares the open file, and where it is read, with its parent
            self._open(0)
        while True:
            number = self._pass if self._pass_size is None else position // self._pass_size
            if number != self._pass or position < self._block.first:
                self._open(number)
            elif position < self._block.last:
                return self._block
            else:
                self._read_block()

    def _open(self, number: int) -> None:
        """Goes to the beginning of a pass."""
        self._process: int | None = os.getpid()
        self._good_rows: Iterator[tuple[int, Row]] = self._read()
        self._pass = number
        self._first = number * (self._pass_size or 0)
        self._block = _Block(self._first, [])

    def _close(self) -> None:
        self._open(0)
        self._process = None

    def _read_block(self) -> None:
        size, first = self.stream.shuffle_buffer, self._block.last
        try:
            rows = list(islice(self._good_rows, size))
            if len(rows) < size:
                self._end_pass(first + len(rows) - self._first)
        except BaseException:
            self._close()  # the iterator is spent, the source is not: the next call reads it again
            raise
        seed = [self.seed, zlib.crc32(self.name.encode()), self._pass, (first - self._first) // size]
        order = np.random.default_rng(seed).permutation(len(rows))
        self._block = _Block(first, [rows[place] for place in order])

    def _end_pass(self, size: int) -> None:
        if not size:
            raise self._nothing()
        if self._pass_size not in (None, size):
            raise DataError(
                f"Stream '{self.name}': the source ended after {size:,} good rows, and after {self._pass_size:,} when "
                f"it was read before: {self.stream.source.describe()}. Its rows must be the same whenever they are "
                f"read; pin its revision, or set data.streams.{self.name}.source.streaming: false."
            )
        self._pass_size = size

    def _nothing(self) -> DataError:
        source = self.stream.source.describe()
        dropped = "".join(f" Dropped: {number:,} × {reason}." for reason, number in self.dropped.items())
        return DataError(f"Stream '{self.name}' has no row to use in its train split: {source}.{dropped}")

    # ------------------------------------------------------------------ rows

    def _read(self) -> Iterator[tuple[int, Row]]:
        """The good rows of one pass in the order of the source, each with its number in it."""
        columns: set[str] | None = None
        for index, (origin, raw) in enumerate(self.stream.source.rows("train")):
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = adapt(raw, origin, self.stream.adapter, self.stream.assume_safe)
                columns = {*row.columns, *row.pair_columns} if columns is None else columns
                self._check_columns(row, columns)
            except RowError as error:
                self._drop(index, error)
            else:
                yield index, row

    def _check_columns(self, row: Row, columns: set[str]) -> None:
        for column in sorted(columns - {*row.columns, *row.pair_columns}):
            remedy = f"Set data.streams.{self.name}.assume_safe: true to take such responses to be safe."
            raise RowError(
                row.origin,
                column,
                None,
                f"the column '{column}' is missing here, though the stream's first row has it",
                remedy if column == "safe" else "",
            )

    def _trees(self, block: _Block, places: list[int]) -> list[PairTree]:
        """The trees at some places of a block; in the place of a useless row, that of the next useful one."""
        results = self.encode([block.rows[place][1] for place in places])
        for place, result in zip(places, results, strict=True):
            if isinstance(result, RowError):
                self._drop(block.rows[place][0], result)
        trees = []
        for place, result in zip(places, results, strict=True):
            if isinstance(result, RowError):
                tree = self._first_useful((*block.rows[place + 1 :], *block.rows[:place]))
                if tree is None:
                    return [self._after(block)] * len(places)
                trees.append(tree)
            else:
                trees.append(result)
        return trees

    def _first_useful(self, rows: Iterable[tuple[int, Row]]) -> PairTree | None:
        """The tree of the first of some rows that is useful as tokens; None if none is."""
        for index, row in rows:
            if index in self._dropped:
                continue
            result = self.encode([row])[0]
            if not isinstance(result, RowError):
                return result
            self._drop(index, result)
        return None

    def _after(self, block: _Block) -> PairTree:
        """The first useful tree after a block that has none; it stands in for all positions up to its own block.

        Raises:
            DataError: A whole pass has none.
        """
        reached, tree = block, None
        while tree is None:
            if self._pass_size is not None and reached.last - block.first >= self._pass_size:
                raise self._nothing()
            reached = self._block_with(reached.last)
            tree = self._first_useful(reached.rows)
        self._barren, self._instead = range(block.first, reached.first), tree
        return tree

    def _drop(self, index: int, error: RowError) -> None:
        """Counts a bad row, or stops on it.

        Args:
            index: Its number in the source.
            error: What is wrong with it.
        """
        if self.on_bad_row == "fail":
            raise DataError(
                f"Stream '{self.name}' has a row that cannot be used: {error}\n"
                "To leave such rows out, and go on, set data.on_bad_row: drop"
            ) from error
        self._note(index, error.reason, f"{error.origin}: {error.field} = {error.value}: {error.reason}")

    def _note(self, index: int, reason: str, words: str) -> None:
        """Counts a bad row once; the main process tells of it now and then, workers hand it on."""
        if index in self._dropped:
            return
        self._dropped.add(index)
        self.dropped[reason] += 1
        if get_worker_info() is not None:
            self._tally.dropped[index] = (reason, words)
        elif self.dropped.total() in _TOLD:
            rank_zero_info(f"{self.name}, train: dropped so far: {self.dropped.total():,}, the last {words}")
