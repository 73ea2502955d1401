"""Collation: pair trees of several streams to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfpo_pl.batch import Annotations, PairBatch
from bfpo_pl.data.trees import Ids, PairTree

Item = tuple[int, PairTree]
"""A pair tree and the index of its stream."""
_Table = Mapping[str, Sequence[float] | np.ndarray]


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
        ValueError: A tree lacks a column, or its prompt or a response has no token.
    """
    trees = [tree for _, tree in trees_by_stream]
    layout = _Layout()
    for stream, tree in trees_by_stream:
        layout.add(stream, tree)
    lengths = np.array([len(ids) for ids in layout.segments], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) - np.repeat(starts - np.array(layout.first_positions, np.int64), lengths)
    tokens = np.concatenate([np.zeros(0, np.int64), *layout.segments], dtype=np.int64)
    responses, prompts = (
        lengths[np.array(table, np.int64)] for table in (layout.response_segment, layout.prompt_segment)
    )
    return PairBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        segment_start=torch.from_numpy(starts),
        segment_length=torch.from_numpy(lengths),
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
        max_length=int((responses + prompts).max(initial=0)),
        response_tokens=int(responses.sum()),
        most_responses=max((len(tree.response_ids) for tree in trees), default=0),
        key_tokens=int(responses.sum() + prompts.sum()),
        in_order=True,
    )


class _Layout:
    """The segments as they line up, and which of them are prompts, responses and pairs."""

    def __init__(self) -> None:
        self.segments: list[Ids] = []
        self.first_positions: list[int] = []
        self.response_segment: list[int] = []
        self.prompt_segment: list[int] = []
        self.response_stream: list[int] = []
        self.pair_stream: list[int] = []
        self.pairs: list[tuple[int, int]] = []

    def add(self, stream: int, tree: PairTree) -> None:
        """Puts a tree at the end: the prompt, then its responses."""
        first_response, prompt = len(self.response_segment), len(self.segments)
        count = len(tree.response_ids)
        if not all(map(len, (tree.prompt_ids, *tree.response_ids))):
            what = "a response" if len(tree.prompt_ids) else "the prompt, after which the first token is predicted,"
            raise ValueError(f"{tree.origin or 'A row'}: {what} has no token.")
        self.segments += [tree.prompt_ids, *tree.response_ids]
        self.first_positions += [0, *[len(tree.prompt_ids)] * count]
        self.response_segment += range(prompt + 1, prompt + 1 + count)
        self.prompt_segment += [prompt] * count
        self.response_stream += [stream] * count
        self.pairs += [(first_response + chosen, first_response + rejected) for chosen, rejected in tree.pairs]
        self.pair_stream += [stream] * len(tree.pairs)


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


def _columns(tables: list[tuple[_Table, str]], names: Sequence[str] | None) -> dict[str, Tensor]:
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
