"""Collation: pair trees of several streams to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bfpo_pl.batch import Annotations, PairBatch
from bfpo_pl.data.templates import PairTree

Item = tuple[int, PairTree]
"""A pair tree and the index of its stream."""


def collate(
    trees_by_stream: Sequence[Item],
    streams: Sequence[str],
    weights: Sequence[float],
    columns: Sequence[str] | None = None,
    pair_columns: Sequence[str] | None = None,
) -> PairBatch:
    """Lays pair trees out in one token row, each prompt followed by its responses.

    Args:
        trees_by_stream: Pair trees, each with the index of its stream; none at all gives an empty batch.
        streams: Names of the streams.
        weights: Weight of each stream's loss.
        columns: Per-response columns to take. Default: all; then every tree must have the same.
        pair_columns: The same for per-pair columns.

    Raises:
        ValueError: A tree lacks a column.
    """
    trees = [tree for _, tree in trees_by_stream]
    layout = _Layout()
    for stream, tree in trees_by_stream:
        layout.add(stream, tree)
    return PairBatch(
        tokens=_integers(layout.tokens),
        positions=_integers(layout.positions),
        segment_start=_integers(layout.starts),
        segment_length=_integers(layout.lengths),
        response_segment=_integers(layout.response_segment),
        prompt_segment=_integers(layout.prompt_segment),
        response_stream=_integers(layout.response_stream),
        pair_stream=_integers(layout.pair_stream),
        stream_weight=torch.tensor(list(weights), dtype=torch.float32),
        annotations=Annotations(
            pairs=_integers(layout.pairs).view(-1, 2),
            response=_columns([(tree.columns, tree.origin) for tree in trees], columns),
            pair=_columns([(tree.pair_columns, tree.origin) for tree in trees], pair_columns),
        ),
        streams=tuple(streams),
        origins=tuple(tree.origin for tree in trees),
    )


class _Layout:
    """The token row as it grows, and where in it the segments, responses and pairs are."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.response_segment: list[int] = []
        self.prompt_segment: list[int] = []
        self.response_stream: list[int] = []
        self.pair_stream: list[int] = []
        self.pairs: list[tuple[int, int]] = []

    def add(self, stream: int, tree: PairTree) -> None:
        """Puts a tree at the end: the prompt, then its responses."""
        first_response = len(self.response_segment)
        prompt = self._add_segment(tree.prompt_ids, 0)
        for ids in tree.response_ids:
            self.response_segment.append(self._add_segment(ids, len(tree.prompt_ids)))
            self.prompt_segment.append(prompt)
            self.response_stream.append(stream)
        for chosen, rejected in tree.pairs:
            self.pairs.append((first_response + chosen, first_response + rejected))
            self.pair_stream.append(stream)

    def _add_segment(self, ids: list[int], first_position: int) -> int:
        self.starts.append(len(self.tokens))
        self.lengths.append(len(ids))
        self.tokens.extend(ids)
        self.positions.extend(range(first_position, first_position + len(ids)))
        return len(self.starts) - 1


@dataclass(frozen=True)
class Collator:
    """:func:`collate` with the streams filled in; picklable, for DataLoader workers.

    Args:
        streams: Names of the streams.
        weights: Weight of each stream's loss.
        columns: Per-response columns to take.
        pair_columns: Per-pair columns to take.
    """

    streams: tuple[str, ...]
    weights: tuple[float, ...]
    columns: tuple[str, ...]
    pair_columns: tuple[str, ...]

    def __call__(self, items: Sequence[Item]) -> PairBatch:
        """Collates the items of one batch."""
        return collate(items, self.streams, self.weights, self.columns, self.pair_columns)


def _integers(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _columns(tables: list[tuple[dict[str, tuple[float, ...]], str]], names: Sequence[str] | None) -> dict[str, Tensor]:
    """Each named column over all trees."""
    if names is None:
        names = sorted({name for table, _ in tables for name in table})
    columns = {}
    for name in names:
        values: list[float] = []
        for table, origin in tables:
            if name not in table:
                raise ValueError(
                    f"{origin}: the row has no column '{name}', which others in the batch have. Give it to every "
                    "stream (a safety flag: assume_safe: true in the stream), or to none."
                )
            values.extend(table[name])
        columns[name] = torch.tensor(values, dtype=torch.float32)
    return columns
