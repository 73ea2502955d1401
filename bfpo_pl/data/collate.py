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
    tokens: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    lengths: list[int] = []
    response_segment, prompt_segment, response_stream, pair_stream, pairs = [], [], [], [], []  # type: ignore[var-annotated]

    def add_segment(ids: list[int], first_position: int) -> int:
        starts.append(len(tokens))
        lengths.append(len(ids))
        tokens.extend(ids)
        positions.extend(range(first_position, first_position + len(ids)))
        return len(starts) - 1

    for stream, tree in trees_by_stream:
        first_response = len(response_segment)
        prompt = add_segment(tree.prompt_ids, 0)
        for ids in tree.response_ids:
            response_segment.append(add_segment(ids, len(tree.prompt_ids)))
            prompt_segment.append(prompt)
            response_stream.append(stream)
        for chosen, rejected in tree.pairs:
            pairs.append((first_response + chosen, first_response + rejected))
            pair_stream.append(stream)

    return PairBatch(
        tokens=_integers(tokens),
        positions=_integers(positions),
        segment_start=_integers(starts),
        segment_length=_integers(lengths),
        response_segment=_integers(response_segment),
        prompt_segment=_integers(prompt_segment),
        response_stream=_integers(response_stream),
        pair_stream=_integers(pair_stream),
        stream_weight=torch.tensor(list(weights), dtype=torch.float32),
        annotations=Annotations(
            pairs=_integers(pairs).view(-1, 2),
            response=_columns([(tree.columns, tree.origin) for tree in trees], columns),
            pair=_columns([(tree.pair_columns, tree.origin) for tree in trees], pair_columns),
        ),
        streams=tuple(streams),
        origins=tuple(tree.origin for tree in trees),
    )


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
