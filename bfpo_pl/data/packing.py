"""Packing: rows that go into a batch together, as blocks of about equal length."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from bfpo_pl.component import Component, UserError, check_range
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.data.trees import PairTree


class Trees(Protocol):
    """Pair trees by their place; what a stream gives to a batch."""

    lengths: np.ndarray
    """``[N]``, tokens at each place."""

    key: str
    """Names their content."""

    def __len__(self) -> int: ...

    def at(self, places: Sequence[int]) -> list[PairTree]:
        """The trees at some places, in their order: one at each, unless rows were packed."""


class Packed(ABC):
    """Rows that were packed: trees whose places are blocks.

    Args:
        documents: The rows.
        order: ``[documents]``, the order in which they are packed.
        length: Tokens of a block.
    """

    lengths: np.ndarray

    def __init__(self, documents: Trees, order: np.ndarray, length: int) -> None:
        self.documents, self.order, self.length = documents, order, length
        kind, digest = type(self).__name__, hashlib.blake2b(order.tobytes(), digest_size=8).hexdigest()
        self.key = f"{documents.key}/{kind}/{length}/{digest}"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    @abstractmethod
    def counts(self) -> dict[str, int]:
        """What a run's record says of the blocks."""

    @abstractmethod
    def at(self, places: Sequence[int]) -> list[PairTree]:
        """The trees of some blocks, in their order.

        Args:
            places: Places of the blocks.
        """


class Packing(Component, ABC):
    """How the rows of streams are joined to blocks, which `batch_size` then counts. Default: each is by itself."""

    one_response: ClassVar[bool] = False
    """Whether it joins rows with one response only."""

    @abstractmethod
    def __call__(self, trees: Trees, stream: str) -> Packed:
        """The blocks of a stream.

        Args:
            trees: Its rows.
            stream: Its name, for messages.
        """

    def check(self, template: ChatTemplate) -> None:
        """Refuses a template whose tokens it cannot join as it says.

        Args:
            template: How rows become tokens.

        Raises:
            UserError: It cannot.
        """


class OfficialPacking(Packing):
    """The official code's packing: shuffled documents one after the other, cut into blocks of `length` tokens.

    Documents see those before them in the block, the loss falls on every token but a block's first (so that the
    template must say `loss_on: all`), and what remains after the last whole block is dropped and counted. With
    `data.template: OfficialTemplate` each document is the beginning-of-sequence token, the rendered conversation and an
    end-of-sequence token, as there.

    Args:
        length: Tokens of a block.
        seed: Seed of the order of the documents; not the run's, so that runs with other seeds have the same blocks.
    """

    one_response = True

    def __init__(self, length: int = 2048, seed: int = 0) -> None:
        self.length = int(check_range(self, "length", length, 2))
        self.seed = int(check_range(self, "seed", seed, 0))

    def __call__(self, trees: Trees, stream: str) -> Blocks:
        order = np.random.default_rng(self.seed).permutation(len(trees))
        return Blocks(trees, order, self.length, stream)

    def check(self, template: ChatTemplate) -> None:
        if template.loss_on != "all":
            raise UserError(
                f"data.packing: OfficialPacking puts the loss on all tokens, and data.template.loss_on is "
                f"{template.loss_on}. Set data.template.loss_on: all, or data.packing: DocumentPacking, which leaves "
                "the loss where it is."
            )


class DocumentPacking(Packing):
    """Whole documents go into blocks of at most `length` tokens; they do not see each other.

    Shuffled documents are put into a block as long as they fit; the next one begins another block. One that is longer
    by itself is a block of its own, and counted. Nothing else changes: each row stays a tree, with all its responses,
    its pairs, and its loss. Batches then have about as many tokens each, and epochs a known length, which they have not
    with `data.batching: TokenBudget`.

    Args:
        length: Most tokens of a block, a prompt counted once with all its responses.
        seed: Seed of the order of the documents; not the run's, so that runs with other seeds have the same blocks.
    """

    def __init__(self, length: int = 2048, seed: int = 0) -> None:
        self.length = int(check_range(self, "length", length, 1))
        self.seed = int(check_range(self, "seed", seed, 0))

    def __call__(self, trees: Trees, stream: str) -> Groups:
        return Groups(trees, np.random.default_rng(self.seed).permutation(len(trees)), self.length)


class Blocks(Packed):
    """Blocks of a fixed length, cut from documents that follow one another.

    Args:
        documents: The documents, with one response each.
        order: ``[documents]``, the order in which they follow one another.
        length: Tokens of a block.
        stream: The stream's name, for messages.

    Raises:
        UserError: They are too short for one block.
    """

    def __init__(self, documents: Trees, order: np.ndarray, length: int, stream: str) -> None:
        super().__init__(documents, order, length)
        self.ends = np.cumsum(documents.lengths[order], dtype=np.int64)
        total = int(self.ends[-1]) if len(self.ends) else 0
        self.dropped_tokens = total % length
        self.lengths = np.full(total // length, length, dtype=np.int64)
        if not len(self.lengths):
            raise UserError(
                f"data.packing: the rows of stream '{stream}' have {total:,} tokens together, less than one block of "
                f"{length:,}. Lower data.packing.length."
            )

    @property
    def counts(self) -> dict[str, int]:
        return {"blocks": len(self), "tokens_after_the_last_block": self.dropped_tokens}

    def at(self, places: Sequence[int]) -> list[PairTree]:
        return [self._block(place) for place in places]

    def parts(self, place: int) -> list[tuple[int, slice]]:
        """The documents of a block: the place of each, and which of its tokens the block has.

        Args:
            place: The block's place.
        """
        start, stop = place * self.length, (place + 1) * self.length
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        found = []
        for number in range(first, last + 1):
            begin, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
            found.append((int(self.order[number]), slice(max(start, begin) - begin, min(stop, end) - begin)))
        return found

    def _block(self, place: int) -> PairTree:
        parts = self.parts(place)
        documents = self.documents.at([number for number, _ in parts])
        ids = np.concatenate(
            [
                np.concatenate([tree.prompt_ids, tree.response_ids[0]])[taken]
                for tree, (_, taken) in zip(documents, parts, strict=True)
            ]
        )
        return PairTree(ids[:1], [ids[1:]], origin=f"{documents[0].origin} to {documents[-1].origin}")


class Groups(Packed):
    """Blocks of whole documents, each of them a tree of its own.

    Args:
        documents: The documents.
        order: ``[documents]``, the order in which they are put into blocks.
        length: Most tokens of a block of several.
    """

    def __init__(self, documents: Trees, order: np.ndarray, length: int) -> None:
        super().__init__(documents, order, length)
        lengths = documents.lengths[order]
        starts: list[int] = []
        held = 0
        for number, tokens in enumerate(lengths.tolist()):
            if not starts or held + tokens > length:
                starts.append(number)
                held = 0
            held += tokens
        self._starts = [*starts, len(order)]
        self.longer = int((lengths > length).sum())
        """Documents that are longer than a block."""
        self.lengths = np.add.reduceat(lengths, starts) if starts else np.zeros(0, dtype=np.int64)

    @property
    def counts(self) -> dict[str, int]:
        return {"blocks": len(self), "documents_longer_than_a_block": self.longer}

    def at(self, places: Sequence[int]) -> list[PairTree]:
        return self.documents.at([number for place in places for number in self.members(place)])

    def members(self, place: int) -> list[int]:
        """Places of the documents of a block.

        Args:
            place: The block's place.
        """
        return self.order[self._starts[place] : self._starts[place + 1]].tolist()
