"""Which tokens are a row's prompt, where its tree does not say so because they carry loss (`loss_on: all`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from bfpo_pl.data.checked import adapt
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.loading import TreesByStream
from bfpo_pl.data.packing import Blocks, Groups, Trees
from bfpo_pl.data.rows import Row, RowError
from bfpo_pl.data.stored import StoredTrees
from bfpo_pl.data.streaming import StreamingRows
from bfpo_pl.data.streams import Key


def prompts_of(data: AlignmentData, trees: TreesByStream, keys: Sequence[Key]) -> list[list[bool]]:
    """For each tree of a batch and each of its tokens, whether it is of a row's prompt.

    Args:
        data: The data, set up.
        trees: Its trees.
        keys: Those of the batch.
    """
    encoder, found = data.encoder(), []
    for stream, place in keys:
        own = trees.trees[stream]
        assert own is not None
        found += _of_streaming(encoder, own, place) if isinstance(own, StreamingRows) else _of(encoder, own, place)
    return found


def _of(encoder: RowEncoder, trees: Trees, place: int) -> list[list[bool]]:
    if isinstance(trees, Groups):
        return [each for member in trees.members(place) for each in _of(encoder, trees.documents, member)]
    if isinstance(trees, Blocks):
        parts = [_of(encoder, trees.documents, document)[0][taken] for document, taken in trees.parts(place)]
        return [[each for part in parts for each in part]]
    assert isinstance(trees, StoredTrees)
    [row] = trees.rows.rows([int(trees.kept[place])])
    return [_of_row(encoder, row, int(trees.lengths[place]))]


def _of_streaming(encoder: RowEncoder, rows: StreamingRows, position: int) -> list[list[bool]]:
    """The same of a row that is found in its source once more."""
    [tree] = rows.at([position])
    stream = rows.stream
    raw = next(raw for origin, raw in stream.source.rows("train") if origin == tree.origin)
    row = adapt(raw, tree.origin, stream.adapter, stream.assume_safe)
    return [_of_row(encoder, row, len(tree.prompt_ids) + len(tree.response_ids[0]))]


def _of_row(encoder: RowEncoder, row: Row, size: int) -> list[bool]:
    """Of a row with one response: its prompt comes first, and truncation cuts the end."""
    template = copy.copy(encoder.template)
    template.loss_on = "response"
    split = template.encode(encoder.tokens, [row])[0]
    assert not isinstance(split, RowError)
    prompt = min(len(split[0]), size)
    return [True] * prompt + [False] * (size - prompt)
