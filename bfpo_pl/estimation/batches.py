"""The batches that an estimate is made for: real ones where the data is at hand, else of given or greatest lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import UserError
from bfpo_pl.data.batching import TokenBudget
from bfpo_pl.data.collate import collate
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety, MicroworldSFT
from bfpo_pl.data.packing import DocumentPacking, OfficialPacking, Trees
from bfpo_pl.data.streams import FixedBatches, StreamSampler
from bfpo_pl.data.trees import PairTree

LARGEST_READ = 64 * 2**20
"""Bytes of local files up to which rows are read and tokenised for an estimate."""
_LOOKED_AT = 4000  # batches of an epoch whose sizes are compared
_MICROWORLD = (MicroworldHelpfulness, MicroworldSafety, MicroworldSFT)


@dataclass(frozen=True)
class Lengths:
    """Tokens of every row, where they are given.

    Args:
        prompt: Of a prompt.
        response: Of each response.
    """

    prompt: int
    response: int


@dataclass(frozen=True)
class Workload:
    """What one device is given.

    Args:
        largest: The largest batch: memory is for it.
        typical: A batch of about the average size: time is for it.
        validation: The largest validation batch; None without validation.
        rows: Rows of the driver in an epoch; None if nobody knows.
        batches: Batches of an epoch for each device; of 1,000 rows of the driver where ``rows`` is None.
        assumption: Where lengths and rows are from.
    """

    largest: PairBatch
    typical: PairBatch
    validation: PairBatch | None
    rows: int | None
    batches: int
    assumption: str


def workload_of(
    data: AlignmentData,
    trainer: Namespace,
    devices: int,
    lengths: Lengths | None,
    paired: bool,
    padded: bool = False,
) -> Workload:
    """The batches of a config.

    Args:
        data: The data module, with its tokenizer if rows are to be read.
        trainer: The section ``trainer`` of the config.
        devices: Processes that see different rows.
        lengths: Lengths of all rows; None: those of the data if it is local and small, else the greatest that the
            truncation lets through.
        paired: Whether rows have two responses, rather than one.
        padded: Whether rows are padded to the longest of a batch.
    """
    if lengths is None and (why := not_at_hand(data)) is None:
        return _real(data, trainer, devices, padded)
    if lengths is not None:
        assumption = f"all prompts have {lengths.prompt:,} tokens and all responses {lengths.response:,}, as given"
    else:
        lengths = _greatest(data)
        assumption = (
            f"{why}, so all prompts have {lengths.prompt:,} tokens and all responses {lengths.response:,}, the most "
            "that data.truncation lets through; --prompt_tokens and --response_tokens say otherwise"
        )
    batch = _synthetic(data, lengths, paired)
    validates = bool(data._streams_of("validation")) and trainer.limit_val_batches != 0
    whole = None
    if validates:
        unit, responses, rows = _unit(data, lengths, paired)
        items = _items(unit, responses, [data.validation_batch_size * rows])
        whole = collate(items, list(data.streams), _ones(data))
    taken = data.streams[data.driver].batch_size
    return Workload(batch, batch, whole, None, math.ceil(1000 / (taken * devices)), assumption)


def not_at_hand(data: AlignmentData) -> str | None:
    """Why rows are not read for an estimate; None if they are, which takes a tokenizer.

    Args:
        data: The data module.
    """
    for name, stream in data.streams.items():
        source = stream.source
        if isinstance(source, _MICROWORLD):
            continue
        if not isinstance(source, LocalFiles):
            return f"the rows of stream '{name}' are not local files"
        files = [each for split in ("train", "validation") if source.has_split(split) for each in source._places(split)]
        found = [each for place in files for each in (place.rglob("*") if place.is_dir() else [place])]
        size = sum(Path(each).stat().st_size for each in found)
        if size > LARGEST_READ:
            return f"the files of stream '{name}' have {size / 2**20:,.0f} MiB, too many to be read for an estimate"
    return None


def _greatest(data: AlignmentData) -> Lengths:
    whole = getattr(data.truncation, "max_length", None)
    if whole is None:
        raise UserError(
            f"bfpo estimate: {type(data.truncation).__name__} names no max_length: give --prompt_tokens and "
            "--response_tokens."
        )
    prompt = min(getattr(data.truncation, "max_prompt_length", whole // 2), whole - 1)
    return Lengths(prompt, whole - prompt)


def _ones(data: AlignmentData) -> list[float]:
    return [1.0] * len(data.streams)


def _synthetic(data: AlignmentData, lengths: Lengths, paired: bool) -> PairBatch:
    """A training batch whose rows all have the same lengths, joined as ``data.packing`` and ``data.batching`` do."""
    lengths, paired, rows = _unit(data, lengths, paired)
    quotas = [stream.batch_size * rows for stream in data.streams.values()]
    if isinstance(data.batching, TokenBudget):
        units = max(1, data.batching.tokens // (sum(quotas) * _tokens(lengths, paired)))
        quotas = [units * quota for quota in quotas]
    return collate(_items(lengths, paired, quotas), list(data.streams), _ones(data))


def _unit(data: AlignmentData, lengths: Lengths, paired: bool) -> tuple[Lengths, bool, int]:
    """What a batch size counts, a row or a block: its lengths, whether it has pairs, and the rows in it."""
    if isinstance(data.packing, OfficialPacking):
        return Lengths(1, data.packing.length - 1), False, 1
    if isinstance(data.packing, DocumentPacking):
        return lengths, paired, max(1, data.packing.length // _tokens(lengths, paired))
    return lengths, paired, 1


def _tokens(lengths: Lengths, paired: bool) -> int:
    return lengths.prompt + (1 + paired) * lengths.response


def _items(lengths: Lengths, paired: bool, quotas: list[int]) -> list[tuple[int, PairTree]]:
    responses = [np.zeros(lengths.response, dtype=np.int32)] * (1 + paired)
    tree = PairTree(np.zeros(lengths.prompt, dtype=np.int32), responses, ((0, 1),) if paired else ())
    return [(stream, tree) for stream, quota in enumerate(quotas) for _ in range(quota)]


# ---------------------------------------------------------------------------------------------------- real rows


def _real(data: AlignmentData, trainer: Namespace, devices: int, padded: bool) -> Workload:
    data.setup("fit")
    loader = data.train_dataloader()
    trees: list[Trees] = loader.dataset.trees  # type: ignore[attr-defined]
    sizes = {name: len(rows) for name, rows in zip(data.streams, trees, strict=True)}
    quotas = {name: stream.batch_size for name, stream in data.streams.items()}
    fixed = FixedBatches(sizes, quotas, data.driver, data._seed(), devices)
    batches = data.batching(fixed, {name: rows.lengths for name, rows in zip(data.streams, trees, strict=True)})
    limit = StreamSampler(batches, epoch_batches=_given_limit(trainer)).limit
    first, end = batches.epoch(0, limit)
    assert end is not None  # local rows have a number
    count, looked = end - first, min(end - first, _steps(trainer), _LOOKED_AT)
    keys = [share for number in range(looked) for share in batches.batch(number) if share]
    tokens = np.array([sum(int(trees[stream].lengths[row]) for stream, row in share) for share in keys])
    collated = [loader.collate_fn(loader.dataset.at(keys[each])) for each in np.argsort(-tokens)[:8]]  # type: ignore[attr-defined]
    largest = max(collated, key=lambda batch: len(batch) * batch.max_length if padded else len(batch.tokens))
    typical = loader.collate_fn(loader.dataset.at(keys[int(np.abs(tokens - tokens.mean()).argmin())]))  # type: ignore[attr-defined]
    return Workload(
        largest,
        typical,
        _validation(data, trainer),
        sizes[data.driver],
        count,
        f"lengths and {sizes[data.driver]:,} rows of the driver as in the data; memory for the largest of "
        f"{looked:,} batches ({len(largest.tokens):,} tokens), time for an average one ({len(typical.tokens):,})",
    )


def _steps(trainer: Namespace) -> int:
    """Batches that the run takes at most."""
    most = int(trainer.max_steps if trainer.max_steps is not None else -1)
    return most * int(trainer.accumulate_grad_batches or 1) if most > 0 else _LOOKED_AT


def _given_limit(trainer: Namespace) -> int | float:
    return 1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches


def _validation(data: AlignmentData, trainer: Namespace) -> PairBatch | None:
    loader: Any = data.val_dataloader()
    if not loader or trainer.limit_val_batches == 0:
        return None
    trees = loader.dataset.trees
    keys = list(loader.batch_sampler)
    tokens = [sum(int(trees[stream].lengths[row]) for stream, row in share) for share in keys]
    return loader.collate_fn(loader.dataset.at(keys[int(np.argmax(tokens))]))


def half_of(batch: PairBatch) -> PairBatch:
    """A batch of every second prompt of a batch, with all its responses.

    Args:
        batch: The batch; its tokens' ids are not kept.
    """
    trees: dict[int, PairTree] = {}
    lengths = batch.segment_length.tolist()
    for prompt, response in zip(batch.prompt_segment.tolist(), batch.response_segment.tolist(), strict=True):
        held = trees.get(prompt, PairTree(np.zeros(lengths[prompt], dtype=np.int32), []))
        responses = [*held.response_ids, np.zeros(lengths[response], dtype=np.int32)]
        trees[prompt] = PairTree(held.prompt_ids, responses)
    return collate([(0, tree) for tree in list(trees.values())[::2]], batch.streams, [1.0] * len(batch.streams))
