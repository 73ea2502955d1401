"""What a config's data comes to, bad rows and all, as far as it can be had."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from bfpo_pl.component import UserError
from bfpo_pl.data.arrow import default_cache
from bfpo_pl.data.checked import adapt, check_rows
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.loading import TreesByStream
from bfpo_pl.data.reading import DataError, Reading
from bfpo_pl.data.rows import Row, RowError
from bfpo_pl.data.selection import select
from bfpo_pl.data.streaming import StreamingRows
from bfpo_pl.data.streams import StreamSampler
from bfpo_pl.data.tokens import TemplateError
from bfpo_pl.inspection.lengths import Lengths, lengths_of, stored_trees

Split = tuple[str, str]
"""Names of a stream and of a split."""
_ROWS_LOOKED_AT = 1000  # of a stream, for one that can be shown


@dataclass
class Survey:
    """What was found.

    Args:
        readings: The rows that are used, by stream and split, and what is wrong with the others.
        lengths: Their lengths; of none if they cannot be tokenised.
        summaries: Counts as plain data, as a run records them.
        cuts: Prompts and responses there are to cut.
        batches: What an epoch of one process has, in words.
        example: A row that can be used.
        failure: Why the data cannot be trained on, besides bad rows; None if it can.
    """

    readings: dict[Split, Reading] = field(default_factory=dict)
    lengths: dict[Split, Lengths] = field(default_factory=dict)
    summaries: dict[Split, dict[str, Any]] = field(default_factory=dict)
    cuts: dict[Split, tuple[int, int]] = field(default_factory=dict)
    batches: str = ""
    example: Row | None = None
    failure: UserError | None = None


def survey(data: AlignmentData) -> Survey:
    """Reads and tokenises all rows that can be used.

    Args:
        data: The data, with a tokenizer; its rows have not been read. From now on it drops bad rows.

    Raises:
        UserError: A source cannot be read, or settings contradict each other.
    """
    found = Survey()
    data.on_bad_row = "drop"
    data.num_workers = 0
    try:
        data.setup("fit")
    except (DataError, TemplateError) as error:
        found.failure = error
        _read_alone(data, found)
    else:
        _take(data, found)
    found.example = _example(data, found)
    return found


def _take(data: AlignmentData, found: Survey) -> None:
    found.readings = dict(data.readings)
    loader = data.train_dataloader()
    loaders = {"train": loader, "validation": data.val_dataloader()}
    for split, each in loaders.items():
        if not isinstance(each, DataLoader):
            continue  # nothing to validate on
        assert isinstance(each.dataset, TreesByStream)
        for name, some in zip(data.streams, each.dataset.trees, strict=True):
            if some is None or isinstance(some, StreamingRows):
                continue
            key = name, split
            found.lengths[key] = lengths_of(found.readings[key], some)
            counts = stored_trees(some).tokens.counts
            found.cuts[key] = counts["prompts"], counts["responses"]
    found.summaries = {(name, split): each for name, own in data.report.items() for split, each in own.items()}
    sampler = loader.batch_sampler
    assert isinstance(sampler, StreamSampler)
    found.batches = _batches(sampler)


def _batches(sampler: StreamSampler) -> str:
    first, last = sampler.batches.epoch(0)
    if last is None:
        return "no end: the driver's source streams"
    if sampler.batches.length is None:
        return f"{last - first:,} batches on one process, the first one; epochs differ"
    return f"{last - first:,} batches on one process"


def _read_alone(data: AlignmentData, found: Survey) -> None:
    """Reads each split by itself, where one of them or its tokens cannot be used."""
    cache = default_cache() if data.cache is None else Path(data.cache).expanduser()
    for name, stream in data.streams.items():
        if stream.source.streaming:
            continue
        validated = stream.validation_fraction or stream.source.has_split("validation")
        for split in ("train", "validation") if validated else ("train",):
            own = "train" if stream.validation_fraction else split
            rows = check_rows(cache / "rows", f"{name}, {own}", stream.source, own, stream.adapter, stream.assume_safe)
            reading = select(name, split, stream, rows, data.contamination, with_train=True)
            found.readings[name, split] = reading
            found.summaries[name, split] = reading.summary()


def _example(data: AlignmentData, found: Survey) -> Row | None:
    for reading in found.readings.values():
        if len(reading.kept):
            return reading.rows.rows(reading.kept[:1])[0]
    for stream in data.streams.values():
        for origin, raw in islice(stream.source.rows("train"), _ROWS_LOOKED_AT) if stream.source.streaming else ():
            try:
                if not isinstance(raw, RowError):
                    return adapt(raw, origin, stream.adapter, stream.assume_safe)
            except RowError:
                continue
    return None
