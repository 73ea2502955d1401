"""Streaming: rows that are read, shuffled and tokenised while training goes on, for sources too large to be kept."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import get_worker_info

from bfpo_pl.data.checked import adapt
from bfpo_pl.data.reading import DataError
from bfpo_pl.data.rows import Row, RowError
from bfpo_pl.data.streams import Stream
from bfpo_pl.data.trees import PairTree

_COUNTED = ("dropped", "prompts_cut", "responses_cut", "stop_token_in_text", "special_token_in_prompt")
_PROCESSES = 257  # of one loader: the main one and its workers
_TOLD = {10**power for power in range(10)}
Encode = Callable[[Sequence[Row]], Sequence[PairTree | RowError]]
"""Encodes rows together: for each its pair tree, or what makes it useless."""


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
    the next useful row of the block instead, in shuffled order, the first after the last; that row comes twice.

    Reading goes forward and keeps one block in memory. A position before that block is found by reading the pass again
    from its beginning, and one far ahead by reading everything up to it, which is right but slow; so is resuming.
    Every process (worker of a loader) opens the source for itself, reads all of it, and tokenises what it is asked for.

    Args:
        name: The stream's name.
        stream: The stream, whose source has the same rows in the same order whenever it is read.
        on_bad_row: ``fail`` stops at the first bad row; ``drop`` goes on without it.
        seed: Seed of the order.
        encode: What turns rows into pair trees; to be picklable where workers do not fork.
        counts: What ``encode`` counts as it goes, such as ``responses_cut``.
    """

    def __init__(
        self,
        name: str,
        stream: Stream,
        on_bad_row: Literal["fail", "drop"],
        seed: int,
        encode: Encode,
        counts: Counter[str] | None = None,
    ) -> None:
        self.name, self.stream, self.on_bad_row, self.seed, self.encode = name, stream, on_bad_row, seed, encode
        self._counts = Counter() if counts is None else counts
        self._shared = torch.zeros(_PROCESSES, len(_COUNTED), dtype=torch.int64).share_memory_()
        self.dropped: Counter[str] = Counter()
        """Bad rows that this process has met so far, each counted once, by reason."""
        self.key = f"streaming, shuffle_buffer {stream.shuffle_buffer}"
        self._dropped: set[int] = set()
        self._pass_size: int | None = None  # good rows of the source, known once it has been read to its end
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
        trees: dict[int, PairTree] = {}
        ahead = sorted(set(positions))
        while ahead:
            block = self._block_with(ahead[0])
            here = [position for position in ahead if position < block.last]
            trees.update(zip(here, self._trees(block, [position - block.first for position in here]), strict=True))
            ahead = ahead[len(here) :]
        return [trees[position] for position in positions]

    def summary(self) -> dict[str, Any]:
        """Counts as plain data, of what this process's loader has read so far, its workers included.

        Every worker reads all rows, so that the bad ones are those of the one that has come furthest; rows with cut
        texts are counted when they are tokenised, by the one worker that does.
        """
        each = self._shared
        counts = [int(each[:, 0].max()), *each[:, 1:].sum(dim=0).tolist()]
        return {"streaming": True, **dict(zip(_COUNTED, counts, strict=True))}

    def _own_counts(self) -> torch.Tensor:
        worker = get_worker_info()
        return self._shared[0 if worker is None else 1 + worker.id % (_PROCESSES - 1)]

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
        source = self.stream.source.describe()
        if not size:
            dropped = "".join(f" Dropped: {number:,} × {reason}." for reason, number in self.dropped.items())
            raise DataError(f"Stream '{self.name}' has no row to use in its train split: {source}.{dropped}")
        if self._pass_size not in (None, size):
            raise DataError(
                f"Stream '{self.name}': the source ended after {size:,} good rows, and after {self._pass_size:,} when "
                f"it was read before: {source}. Its rows must be the same whenever they are read; pin its revision, "
                f"or set data.streams.{self.name}.source.streaming: false."
            )
        self._pass_size = size

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
        before = [self._counts[name] for name in _COUNTED]
        results = self.encode([block.rows[place][1] for place in places])
        self._own_counts()[1:] += torch.tensor([self._counts[name] for name in _COUNTED[1:]]) - torch.tensor(before[1:])
        return [
            self._next_useful(block, place, result) if isinstance(result, RowError) else result
            for place, result in zip(places, results, strict=True)
        ]

    def _next_useful(self, block: _Block, place: int, error: RowError) -> PairTree:
        self._drop(block.rows[place][0], error)
        for index, row in (*block.rows[place + 1 :], *block.rows[:place]):
            result = self.encode([row])[0]
            if not isinstance(result, RowError):
                return result
            self._drop(index, result)
        raise DataError(
            f"Stream '{self.name}': none of {len(block.rows):,} rows that are shuffled together can be used; the last: "
            f"{error} Raise data.streams.{self.name}.shuffle_buffer, if there are good rows among the others."
        )

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
        if index not in self._dropped:
            self._dropped.add(index)
            self.dropped[error.reason] += 1
            own = self._own_counts()
            own[0] = max(int(own[0]), self.dropped.total())
            if self.dropped.total() in _TOLD:
                last = f"{error.origin}: {error.field} = {error.value}: {error.reason}"
                rank_zero_info(f"{self.name}, train: dropped so far: {self.dropped.total():,}, the last {last}")
