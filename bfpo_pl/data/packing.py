"""Packing for supervised training: documents in a row, cut into blocks of equal length."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from bfpo_pl.component import Component, UserError, check_range
from bfpo_pl.data.trees import PairTree


class Trees(Protocol):
    """Pair trees by their place; what a stream gives to a batch."""

    lengths: np.ndarray
    key: str
    """Names their content."""

    def __len__(self) -> int: ...

    def at(self, places: Sequence[int]) -> list[PairTree]:
        """The trees at some places."""


class Packing(Component, ABC):
    """How the rows of supervised streams are joined. Default: not at all; each row is a document of its own.

    Batches have no padding in any case, and a document never sees another one: to fill a batch with documents up to a
    number of tokens, set `data.batching: TokenBudget`.
    """

    @abstractmethod
    def __call__(self, trees: Trees, stream: str) -> Blocks:
        """The joined rows of a stream.

        Args:
            trees: Its rows, with one response each.
            stream: Its name, for messages.
        """


class OfficialPacking(Packing):
    """The official code's packing: shuffled documents one after the other, cut into blocks of `length` tokens.

    Documents see those before them in the block, the loss falls on every token but a block's first, and what remains
    after the last whole block is dropped and counted. With `data.template: OfficialTemplate` each document is the
    beginning-of-sequence token, the rendered conversation and an end-of-sequence token, as there.

    Args:
        length: Tokens of a block.
        seed: Seed of the order of the documents; not the run's, so that runs with other seeds have the same blocks.
    """

    def __init__(self, length: int = 2048, seed: int = 0) -> None:
        self.length = int(check_range(self, "length", length, 2))
        self.seed = int(check_range(self, "seed", seed, 0))

    def __call__(self, trees: Trees, stream: str) -> Blocks:
        order = np.random.default_rng(self.seed).permutation(len(trees))
        return Blocks(trees, order, self.length, stream)


class Blocks:
    """Blocks of a fixed length, cut from documents that follow one another.

    Args:
        documents: The documents, with one response each.
        order: ``[documents]``, the order in which they follow one another.
        length: Tokens of a block.
        stream: The stream's name, for messages.
    """

    def __init__(self, documents: Trees, order: np.ndarray, length: int, stream: str) -> None:
        self.documents, self.order, self.length, self.stream = documents, order, length, stream
        self.key = f"{documents.key}/{length}/{hashlib.blake2b(order.tobytes(), digest_size=8).hexdigest()}"
        self.ends = np.cumsum(documents.lengths[order], dtype=np.int64)
        total = int(self.ends[-1]) if len(self.ends) else 0
        self.dropped_tokens = total % length
        self.lengths = np.full(total // length, length, dtype=np.int64)
        if not len(self.lengths):
            raise UserError(
                f"data.packing: the rows of stream '{stream}' have {total:,} tokens together, less than one block of "
                f"{length:,}. Lower data.packing.length."
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, places: Sequence[int]) -> list[PairTree]:
        return [self._block(place) for place in places]

    def _block(self, place: int) -> PairTree:
        start, stop = place * self.length, (place + 1) * self.length
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        documents = self.documents.at(self.order[first : last + 1].tolist())
        if any(len(document.response_ids) != 1 for document in documents):
            raise UserError(f"data.packing: stream '{self.stream}' has rows with several responses; it packs one.")
        ids = np.concatenate([part for tree in documents for part in (tree.prompt_ids, tree.response_ids[0])])
        begin = start - (int(self.ends[first - 1]) if first else 0)
        block = ids[begin : begin + self.length]
        return PairTree(block[:1], [block[1:]], origin=f"{documents[0].origin} to {documents[-1].origin}")
